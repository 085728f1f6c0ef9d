"""Models as their configurations describe them, and the seconds that parts of them take on this machine.

Nothing is downloaded: a network of a few blocks with random weights is as slow as the real one.
"""

from copy import deepcopy
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PhiConfig, PretrainedConfig

from chassis_utils.files import ROOT
from chassis_utils.lm.checkpoint import default_device, find_folder
from chassis_utils.lm.model import blocks_path
from chassis_utils.lm.tokenizer import read_tokenizer
from chassis_utils.metrics import kl_divergence
from chassis_utils.paper.plan import PlanError
from chassis_utils.timing import median_seconds

BLOCKS, LENGTH = 4, 32  # of a network, and tokens of a text, where a pass is timed


@dataclass(frozen=True, eq=False)
class Model:
    """What decides the cost of a model."""

    config: PretrainedConfig
    bytes_per_token: float  # of the questions that the notebooks ask

    @classmethod
    @cache
    def of(cls, name: str) -> "Model":
        """From its folder; `PlanError` where it is neither here nor published below."""
        if name in PUBLISHED:
            return PUBLISHED[name]
        try:
            folder = find_folder(name)
        except ValueError as error:
            raise PlanError(str(error)) from None
        tokenizer = read_tokenizer(folder / "tokenizer.json")
        texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "notebooks" / "questions").glob("*.txt"))]
        tokens = sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
        return cls(AutoConfig.from_pretrained(folder).get_text_config(), sum(len(t.encode()) for t in texts) / tokens)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def width(self) -> int:
        """Numbers of a state."""
        return int(self.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        """Tokens."""
        return int(self.config.vocab_size)

    @cached_property
    def block(self) -> int:
        """Weights of a block."""
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(self.config)
        return sum(parameter.numel() for parameter in network.get_submodule(blocks_path(network))[0].parameters())

    @property
    def weights(self) -> int:
        """All of them, embeddings and head included."""
        return self.depth * self.block + 2 * self.vocabulary * self.width

    @cached_property
    def few_blocks(self) -> torch.nn.Module:
        """The network up to its block `BLOCKS`, with random weights, to be timed."""
        config = deepcopy(self.config)
        config.num_hidden_layers, config.vocab_size, config.pad_token_id = BLOCKS, 64, None
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:BLOCKS]
        return AutoModelForCausalLM.from_config(config).base_model.to(default_device()).eval()


def llama(width: int, inner: int, depth: int, heads: int, kv_heads: int) -> PretrainedConfig:
    """The configuration of a Llama with 32000 tokens."""
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": depth}
    return LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=kv_heads)


PHI_2 = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 32}
TINY_LLAMA = Model(llama(2048, 5632, 22, 32, 4), 3.11)
PUBLISHED = {  # the models of the studies, as they are described on the hub
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": TINY_LLAMA,
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": TINY_LLAMA,
    "microsoft/phi-2": Model(PhiConfig(**PHI_2, vocab_size=51200), 3.3),
    "meta-llama/Llama-2-7b-hf": Model(llama(4096, 11008, 32, 32, 32), 3.11),
}


@cache
@torch.inference_mode()
def seconds(model: Model, kind: str, rows: int) -> float:
    """Seconds of this machine for one of `kind`, where a call has so many rows.

    These are a token in a block (`pass`), a row of the head (its dtype), a logit that is compared (`logits`), and a
    multiplication of a product of its width in float64 (`square`).
    """
    device, d = default_device(), model.width
    if kind == "pass":
        tokens = torch.ones(-(-rows // LENGTH), min(rows, LENGTH), dtype=torch.long, device=device)
        call, count = lambda: model.few_blocks(tokens, use_cache=False).last_hidden_state, BLOCKS * tokens.numel()
    elif kind == "logits":
        z = torch.randn(2, rows, model.vocabulary, device=device)
        call, count = lambda: kl_divergence(z[0], z[1]), z.numel()
    else:
        dtype, columns = (torch.float64, d) if kind == "square" else (getattr(torch, kind), model.vocabulary)
        x, y = (torch.randn(n, d, device=device, dtype=dtype) for n in (rows, columns))
        call, count = lambda: functional.linear(x, y), rows * d * d if kind == "square" else rows
    return median_seconds({"": lambda: float(call().flatten()[0])}, rounds=3)[""] / count  # a GPU is waited for
