"""LoRA by peft on a copy of the base, trained to follow an expert's next-token logits: the peer of closed forms.

Loss: mean over the tokens that count of KL(expert || student), AdamW, batches of rows of similar length in a random
order. Cost: a forward and a backward pass of the whole network for every row in every pass.
"""

import copy
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from chassis_utils.files import write_together
from chassis_utils.lm.checkpoint import require_weights
from chassis_utils.lm.forward import encode, pad, read_logits
from chassis_utils.lm.model import Head, LanguageModel
from chassis_utils.metrics import kl_loss

TARGETS = ("q_proj", "v_proj")  # what the LoRA paper adapts (Hu et al. 2022, section 4.2)


@dataclass(frozen=True)
class LoRA:
    """A copy of the base with low-rank changes of its weights."""

    model: LanguageModel
    losses: Sequence[float] = ()  # training KL of each pass so far, nats; none for what is not trained

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors by name."""
        return {name: value for name, value in self.model.network.named_parameters() if "lora_" in name}

    @property
    def parameters(self) -> int:
        """Numbers stored."""
        return sum(value.numel() for value in self.factors.values())

    def save(self, folder: str | Path) -> None:
        """Write a folder that peft reads: `PeftModel.from_pretrained(network, folder)`; `OSError` where it cannot."""
        config = self.model.network.peft_config["default"].to_dict()
        config |= {"base_model_name_or_path": self.model.name, "inference_mode": True}
        config["target_modules"] = sorted(config["target_modules"])
        named = {f"base_model.model.{k.replace('.default', '')}": v.detach() for k, v in self.factors.items()}
        weights = save({name: value.cpu().contiguous() for name, value in named.items()})
        text = json.dumps(config, indent=2, sort_keys=True, default=str) + "\n"
        write_together(
            {Path(folder) / "adapter_model.safetensors": weights, Path(folder) / "adapter_config.json": text}
        )

    def logits(self, prompts: Sequence[str]) -> Float[Tensor, "n vocab"]:
        """Next-token logits; `ValueError` for prompts that cannot be read."""
        return torch.cat(read_logits(self.model, encode(self.model, prompts), every_token=False))


def equal_rank(model: LanguageModel, parameters: int, targets: Sequence[str] | None = None) -> int:
    """The least rank at which LoRA has at least so many parameters; `ValueError` as of `train_lora`."""
    names = list(targets or _targets(model))
    modules = dict(model.network.named_modules())
    sizes = [sum(module.weight.shape) for path, module in modules.items() if path.rpartition(".")[2] in names]
    return math.ceil(parameters / sum(sizes))


def _targets(model: LanguageModel) -> list[str]:
    """The names of the layers to adapt: `TARGETS`, or where queries and values share a layer, what peft adapts."""
    names = {path.rpartition(".")[2] for path, _ in model.network.named_modules()}
    kind = model.network.config.model_type
    for targets in (TARGETS, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind, ())):
        if targets and names.issuperset(targets):
            return list(targets)
    raise ValueError(
        f"a {type(model.network).__name__} has no layers named {' and '.join(TARGETS)}, and peft knows no others of a "
        f"{kind!r}: train it with peft itself, which takes `target_modules`"
    )


def train_lora(
    base: LanguageModel,
    rows: Sequence[list[int]],
    expert: Sequence[Shaped[Tensor, "k d"]] | Sequence[Shaped[Tensor, "k vocab"]],
    rank: int,
    *,
    targets: Sequence[str] | None = None,
    passes: int = 2,
    batch: int = 32,
    rate: float = 2e-3,
    seed: int = 0,
) -> Iterator[LoRA]:
    """LoRA of `rank` fitted to an expert on rows of token ids, as it is after each pass; the base is left as it was.

    `expert` gives its logits at the last k tokens of each row, or its last states there where it shares the head.
    `targets` names the layers to adapt, queries and values unless given. What is yielded is trained on when the next
    is asked for. The rate falls linearly to zero over all `passes`. Raises `ValueError` for a base whose attention
    projections are not known.
    """
    model = injected(base, rank, list(targets or _targets(base)), seed)
    trained = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, passes * math.ceil(len(rows) / batch))
    losses: list[float] = []
    for _ in tqdm(range(passes), desc="LoRA", disable=None, leave=False):
        total = 0.0
        for numbers in _batches(rows, batch, generator):
            chosen = [expert[k] for k in numbers]
            loss = kl_loss(
                _logits(base.head, chosen), _tails(model, [rows[k] for k in numbers], list(map(len, chosen)))
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(numbers)
        losses.append(total / len(rows))
        now = replace(model, fingerprint=f"{base.fingerprint}+{digest(model)}")  # other weights, other states
        yield LoRA(now, list(losses))


def injected(base: LanguageModel, rank: int, targets: list[str], seed: int) -> LanguageModel:
    """A copy of the base with factors of `rank`, the up ones zero, in the layers named `targets`: they alone train."""
    require_weights(base.network, f"a LoRA of {base.name!r}")
    torch.manual_seed(seed)  # peft draws the factors
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    model = replace(base, network=inject_adapter_in_model(config, copy.deepcopy(base.network)))
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def _logits(head: Head, expert: Sequence[Shaped[Tensor, "k d"]]) -> Shaped[Tensor, "n vocab"]:
    """The expert's logits, of its states where these are what is given."""
    together = torch.cat(list(expert))
    return head(together) if together.shape[1] != len(head.weight) else together


def _tails(model: LanguageModel, rows: Sequence[list[int]], lengths: Sequence[int]) -> Float[Tensor, "n vocab"]:
    """Next-token logits at the last `lengths[k]` tokens of each row, row after row."""
    ids, mask = pad(rows, model.device)
    states = model.body(ids, attention_mask=mask, use_cache=False).last_hidden_state
    tails = [state[len(row) - length : len(row)] for state, row, length in zip(states, rows, lengths, strict=True)]
    return model.head.finish(model.network.get_output_embeddings()(torch.cat(tails)))


def digest(model: LanguageModel) -> str:
    """16 hex digits of the trained factors."""
    factors = {name: value.detach().contiguous() for name, value in LoRA(model).factors.items()}
    return hashlib.sha256(save(factors)).hexdigest()[:16]


def _batches(rows: Sequence[list[int]], size: int, generator: torch.Generator) -> list[list[int]]:
    """All rows in a random order of batches, each of rows of similar length: little of it is padding."""
    order = torch.randperm(len(rows), generator=generator)
    lengths = torch.tensor([len(rows[k]) for k in order.tolist()])
    batches = order[lengths.argsort(stable=True)].split(size)
    return [batches[k].tolist() for k in torch.randperm(len(batches), generator=generator).tolist()]
