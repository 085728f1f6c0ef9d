"""LoRA by peft on a copy of the base, trained to follow an expert's next-token logits: the peer of closed forms.

Loss: mean over prompts of KL(expert || student) at the last token, AdamW, batches of prompts of similar length in a
random order. Cost: a forward and a backward pass of the whole network for every prompt in every pass.
"""

import copy
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from chassis_utils.lm.forward import encode, read_logits, token_logits
from chassis_utils.lm.model import LanguageModel
from chassis_utils.metrics import kl_loss

TARGETS = ("q_proj", "v_proj")  # what the LoRA paper adapts (Hu et al. 2022, section 4.2)


@dataclass(frozen=True)
class LoRA:
    """A trained copy of the base."""

    model: LanguageModel
    parameters: int
    losses: list[float]  # training KL of each pass, nats

    def logits(self, prompts: Sequence[str]) -> Float[Tensor, "n vocab"]:
        """Next-token logits; `ValueError` for prompts that cannot be read."""
        return torch.cat(read_logits(self.model, encode(self.model, prompts), every_token=False))


def equal_rank(model: LanguageModel, parameters: int) -> int:
    """The least rank at which LoRA has at least so many parameters; `ValueError` as of `train_lora`."""
    names = _targets(model)
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
    prompts: Sequence[str],
    expert: Float[Tensor, "n vocab"],
    rank: int,
    *,
    passes: int = 2,
    batch: int = 32,
    rate: float = 2e-3,
    seed: int = 0,
) -> LoRA:
    """LoRA of `rank` fitted to the expert's logits on `prompts`; the base is left as it was.

    The rate falls linearly to zero. Raises `ValueError` for prompts that cannot be read and a base whose attention
    projections are not known.
    """
    ids = encode(base, prompts)
    torch.manual_seed(seed)  # peft draws the factors
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_targets(base))
    model = replace(base, network=inject_adapter_in_model(config, copy.deepcopy(base.network)))
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_("lora_" in name)
    trained = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    steps = passes * math.ceil(len(ids) / batch)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    losses = []
    for _ in tqdm(range(passes), desc="LoRA", disable=None, leave=False):
        total = 0.0
        for rows in _batches(ids, batch, generator):
            loss = kl_loss(expert[rows], token_logits(model, [ids[k] for k in rows.tolist()], every_token=False))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        losses.append(total / len(ids))
    model = replace(model, fingerprint=f"{base.fingerprint}+{_digest(model)}")  # other weights, other states
    return LoRA(model, sum(p.numel() for p in trained), losses)


def _digest(model: LanguageModel) -> str:
    """16 hex digits of the trained factors."""
    factors = {name: value for name, value in model.network.named_parameters() if "lora_" in name}
    return hashlib.sha256(save({name: value.detach().contiguous() for name, value in factors.items()})).hexdigest()[:16]


def _batches(ids: list[list[int]], size: int, generator: torch.Generator) -> list[Int[Tensor, "rows"]]:
    """All prompts in a random order of batches, each of prompts of similar length: little of it is padding."""
    order = torch.randperm(len(ids), generator=generator)
    lengths = torch.tensor([len(ids[k]) for k in order.tolist()])
    batches = order[lengths.argsort(stable=True)].split(size)
    return [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]
