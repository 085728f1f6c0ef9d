"""Loading any Hugging Face causal language model, and the map from its last state to its logits.

A model is named by a folder or by a hub id. Only
safetensors weights are read. The tokenizer is read from `tokenizer.json` itself: the
tokenizer classes rebuild some of them with other rules for leading spaces.
"""

import hashlib
import inspect
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version

import torch
from jaxtyping import Float, Float64, Int, Shaped
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging

from chassis_utils.limits import require_memory
from chassis_utils.linalg.moments import column_sums
from chassis_utils.lm import checkpoint
from chassis_utils.lm.tokenizer import read_tokenizer
from chassis_utils.text.prompts import require_texts

HEAD_TOLERANCE = 1e-3  # largest difference between head(state) and the model's logits, per unit of logit scale
ROWS = 256  # states whose logits are held at once
PROBE = "The quick brown fox"


@dataclass(frozen=True)
class Head:
    """State after the final norm -> logits: cap(scale (h W^T + b)); scale and cap as in Cohere, Granite, Gemma.

    A model's head is kept on the CPU, where states are collected and regressions are solved.
    """

    weight: Shaped[Tensor, "vocab d"]
    bias: Shaped[Tensor, "vocab"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of everything the head is: equal exactly where adapters may be exchanged."""
        digest = hashlib.sha256(repr((self.scale, self.softcap, self.weight.dtype, self.weight.shape)).encode())
        for tensor in (self.weight, self.bias):
            if tensor is not None:
                digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def __call__(self, h: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "n vocab"]:
        """Logits in the dtype of the weights; `h` is rounded to it first, as the model does."""
        return self.finish(self.product(h))

    def product(self, h: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "n vocab"]:
        """The product h W^T + b, where an adapter in vocabulary coordinates is added."""
        return torch.nn.functional.linear(h.to(self.weight.dtype), self.weight, self.bias)

    def mean_probabilities(self, h: Shaped[Tensor, "n d"]) -> Float64[Tensor, "vocab"]:
        """The mean of the next-token distributions at these states, without all of them at once."""
        sums = (column_sums(self(rows).softmax(-1)) for rows in h.split(ROWS))
        return torch.stack(list(sums)).sum(0) / len(h)

    def finish(self, product: Shaped[Tensor, "*n vocab"]) -> Shaped[Tensor, "*n vocab"]:
        """Scale and cap."""
        z = product if self.scale == 1 else product * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def unfinish(self, logits: Shaped[Tensor, "n vocab"]) -> Shaped[Tensor, "n vocab"]:
        """The product that scale and cap turn into these logits; `ValueError` for logits that no product gives."""
        if self.softcap is None:
            return logits / self.scale
        highest = float(logits.abs().max())
        if highest >= self.softcap:
            raise ValueError(
                f"logits of {highest:.4g} are beyond the base's cap of {self.softcap:g}: no edit of the base gives "
                "them, use an expert whose logits are capped as the base's are"
            )
        return self.softcap * torch.atanh(logits / self.softcap) / self.scale

    def to(self, dtype: torch.dtype) -> "Head":
        """The same head with weights in another dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return Head(self.weight.to(dtype), bias, self.scale, self.softcap)


@dataclass(frozen=True)
class LanguageModel:
    """A frozen causal language model with its tokenizer and head."""

    name: str  # as asked for, for tables
    fingerprint: str  # of config, weights and tokenizer: equal exactly when the content is
    network: PreTrainedModel
    tokenizer: Tokenizer
    head: Head

    @property
    def width(self) -> int:
        """Size of a state."""
        return self.head.weight.shape[1]

    @property
    def depth(self) -> int:
        """Number of blocks; states are numbered 0 (embeddings) to `depth` (after the final norm)."""
        return self.network.config.get_text_config().num_hidden_layers

    @property
    def blocks(self) -> torch.nn.ModuleList:
        """The transformer blocks; block l reads the states of layer l."""
        return self.network.get_submodule(blocks_path(self.network))

    @property
    def body(self) -> torch.nn.Module:
        """The network without its head: token ids to the state after the final norm."""
        return self.network.get_submodule(blocks_path(self.network).partition(".")[0])

    @property
    def final_norm(self) -> torch.nn.Module:
        """The norm between the last block and the head, beside the blocks; the identity where there is none (GPT-1)."""
        beside = self.network.get_submodule(blocks_path(self.network).rpartition(".")[0]).children()
        norms = [module for module in beside if "norm" in type(module).__name__.lower()]
        return norms[-1] if norms else torch.nn.Identity()

    @property
    def keeps_keys(self) -> bool:
        """Whether all that the blocks keep of what they have read is keys and values, and the body takes them back.

        A recurrent state (Mamba, RWKV, hybrids) cannot be cut back to an earlier token, and padding may run into it.
        """
        kept = DynamicCache(config=self.network.config).layers
        plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in kept)
        return plain and "past_key_values" in inspect.signature(self.body.forward).parameters

    @cached_property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def made_with(self) -> str:
        """What decides its numbers to the bit on one machine: for the keys of caches."""
        return f"{version('torch')} {version('transformers')} {self.network.dtype} {self.fingerprint}"

    @property
    def start_token(self) -> int | None:
        """The token that begins a text, where the configuration names one of the vocabulary."""
        token = self.network.config.get_text_config().bos_token_id
        return token if token is not None and token < len(self.head.weight) else None

    @property
    def end_tokens(self) -> list[int]:
        """The tokens that end a text, where the configuration names some of the vocabulary."""
        ends = self.network.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
        return [token for token in ends if token < len(self.head.weight)]

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        hook = getattr(self.network, "_hf_hook", None)  # of accelerate, where the weights are spread
        return self.network.device if hook is None else torch.device(hook.execution_device)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens as the tokenizer adds them, neither padded nor cut.

        Raises `TypeError` and `ValueError` for what `require_texts` refuses, `ValueError` for ids that the model lacks.
        """
        texts = require_texts(texts)
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts)]
        for text, row in zip(texts, rows, strict=True):
            if max(row, default=0) >= len(self.head.weight):
                raise ValueError(
                    f"text {text[:40]!r} has a token of id {max(row)}, {self.name!r} knows {len(self.head.weight)}: "
                    "use the tokenizer that belongs to the weights"
                )
        return rows

    def begun(self, row: list[int]) -> list[int]:
        """Token ids behind the token that begins a text, where there is one and the tokenizer has not added it."""
        return row if self.start_token is None or row[:1] == [self.start_token] else [self.start_token, *row]

    @torch.inference_mode()
    def greedy(self, text: str, tokens: int) -> str:
        """The greedy continuation of `text`, without it; `ValueError` for no tokens to read or none to write."""
        if not isinstance(tokens, int) or tokens < 1 or not self.encode([text])[0]:
            raise ValueError(f"text {text[:40]!r} is not continued by {tokens!r} tokens: give a text, and one or more")
        ids = torch.tensor(self.encode([text]), device=self.device)
        grown = self.network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
        return self.tokenizer.decode(grown[0].tolist()).removeprefix(self.tokenizer.decode(ids[0].tolist()))


def require_model(value: object) -> None:
    """Raise `TypeError` for anything but a loaded model."""
    if not isinstance(value, LanguageModel):
        shown = " ".join(repr(value).split())
        raise TypeError(f"{shown:.60} is no loaded model: give what `load` returns for its folder or hub id")


def load(name: str, dtype: torch.dtype = torch.float32, device: str | None = None) -> LanguageModel:
    """Load a frozen model by folder or hub id; `device` is CUDA where there is one unless named.

    With "auto", accelerate deals the blocks to GPUs, memory and disk: a model that does not fit is read block by block.
    A folder that peft wrote is a LoRA: its base is loaded, and the LoRA added to the weights.

    >>> from chassis_utils import load
    >>> load("models/port-llama").width
    256

    Raises `ValueError` for a name that is neither, a checkpoint without safetensors or
    without a tokenizer.json, files that are damaged or do not belong together, a head that does not reproduce the
    model's own logits, and one that reads states of another width than the blocks'; `MemoryError` where the weights
    do not fit.
    """
    checkpoint.check_place(dtype, device := device or checkpoint.default_device())
    (folder, lora), spread = checkpoint.find_parts(name), device == checkpoint.SPREAD
    if spread and lora:  # peft would write the sum into the files of the base
        raise ValueError(f"{name!r} is a LoRA, which weights that are spread do not take: name a device, or merge it")
    if not sys.stderr.isatty():  # bars have no place in notebooks and logs
        logging.disable_progress_bar()
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    size = 0 if spread else stored * max(1, dtype.itemsize // 2)  # as if stored in halves: the most it can grow
    require_memory(size, f"the weights of {name!r}", "use device='auto', a smaller model or a smaller dtype")
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    network = checkpoint.read_network(folder, name, dtype, spread)
    network = network if lora is None else checkpoint.add_lora(network, lora)
    network = (network if spread else network.to(device)).eval().requires_grad_(False)
    model = LanguageModel(name, checkpoint.fingerprint(folder, lora), network, tokenizer, _head(network))
    _check_head(model)
    return model


def blocks_path(network: PreTrainedModel) -> str:
    """Where in the network its blocks are: the first list of as many modules as it has layers.

    Raises `ValueError` where there is none.
    """
    depth = network.config.get_text_config().num_hidden_layers
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return name
    raise ValueError(
        f"a {type(network).__name__} holds no list of its {depth} blocks: use a model whose blocks are in one list"
    )


def describe(model: LanguageModel) -> dict[str, object]:
    """Architecture and sizes of a model, for a table."""
    layout = json.loads(model.tokenizer.to_str())
    byte_level = "ByteLevel" in json.dumps(layout["decoder"])
    return {
        "model": model.name.removeprefix("models/"),
        "architecture": type(model.network).__name__.removesuffix("ForCausalLM"),
        "tokenizer": "byte-level BPE" if byte_level else "SentencePiece BPE",
        "parameters": model.parameters,
        "layers": model.depth,
        "width": model.width,
        "vocabulary": model.tokenizer.get_vocab_size(),
    }


def _head(network: PreTrainedModel) -> Head:
    config: PretrainedConfig = network.config.get_text_config()
    output = network.get_output_embeddings()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    weight = checkpoint.on_cpu(output, "weight")
    bias = None if getattr(output, "bias", None) is None else checkpoint.on_cpu(output, "bias")
    return Head(weight, bias, scale, getattr(config, "final_logit_softcapping", None))


@torch.inference_mode()
def _check_head(model: LanguageModel) -> None:
    ids: Int[Tensor, "1 t"] = torch.tensor(model.encode([PROBE]), device=model.device)
    output = model.network(ids, output_hidden_states=True, use_cache=False)
    logits: Float[Tensor, "t vocab"] = output.logits[0].float().cpu()
    inner = output.hidden_states[0].shape[-1]
    if inner != model.width:  # OPT-350m
        raise ValueError(
            f"the blocks of {model.name!r} pass on states of {inner} numbers, its head reads {model.width}: "
            "use a model of one width"
        )
    rebuilt = model.head(output.hidden_states[-1][0].cpu()).float()
    difference = float((rebuilt - logits).abs().max() / logits.abs().max())
    tolerance = max(HEAD_TOLERANCE, 4 * torch.finfo(model.head.weight.dtype).eps)
    if not math.isfinite(difference):
        raise ValueError(f"the logits of {model.name!r} are not finite: use other weights, or torch.float32")
    if difference > tolerance:
        raise ValueError(
            f"the logits of {model.name!r} are not its head applied to its last state (off by {difference:.1e}): "
            "its head has a part that chassis_utils.lm.model.Head does not know"
        )
