"""Editing a middle layer at the last token, and running the remaining blocks for real.

What an edit does to the next token depends on every block after it. The prompts are read
once up to their last token, keys and values kept; then the last token alone runs through
the blocks from the lowest edit on, which gives what a full pass with the same hooks gives at a
fraction of its cost. Memory: two numbers per token, block and key-value width.

A model that keeps anything else of what it has read (Mamba, RWKV, hybrids) cannot be set back to a prefix: it
reads the prompts whole in every pass, those of equal length together, for the same result.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Float64, Int, Shaped
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from chassis_utils.limits import require_memory
from chassis_utils.linalg.moments import Moments
from chassis_utils.linalg.regression import mean_eigenvalue, ridge, solve_symmetric
from chassis_utils.lm.forward import batches, encode, layer_states, pad
from chassis_utils.lm.model import LanguageModel
from chassis_utils.lm.resume import resuming

# What is added to the states of a layer: a function of them, or one row for each prompt.
Edit = Callable[[Shaped[Tensor, "n d"]], Shaped[Tensor, "n d"]] | Tensor
PROBE = 0.1  # size of the random edits that a response is measured with, in standard deviations of the states
DAMPING = 0.1  # of a pulled-back edit, times the mean eigenvalue of its metric


@dataclass(frozen=True)
class _Batch:
    """Prompts of similar length, read up to their last token, or of equal length and not read yet."""

    rows: list[int]
    unread: Int[Tensor, "n left"]
    mask: Int[Tensor, "n t"]  # of whole prompts, padded on the left (sliding windows end at the last token)
    cache: DynamicCache | None  # of the prefixes

    @property
    def inputs(self) -> dict[str, Any]:
        """What the body takes beside the tokens that are left to read."""
        if self.cache is None:
            return {"attention_mask": self.mask, "use_cache": False}
        return {"attention_mask": self.mask, "position_ids": _places(self.mask)[:, -1:], "past_key_values": self.cache}


@dataclass(frozen=True)
class Prefixes:
    """Prompts read up to their last token."""

    model: LanguageModel
    count: int
    read: list[_Batch]

    @classmethod
    def of(cls, model: LanguageModel, texts: Sequence[str]) -> "Prefixes":
        """Read all prefixes; `ValueError` as of `forward.encode`, `MemoryError` where keys and values do not fit."""
        ids = encode(model, texts)
        if model.keeps_keys:
            config = model.network.config.get_text_config()
            shared = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            numbers = 2 * model.depth * model.width * sum(map(len, ids)) * shared // config.num_attention_heads
            what = f"the keys and values of {len(ids)} prompts"
            require_memory(numbers * model.network.dtype.itemsize, what, "use fewer prompts or a smaller model")
        planned = list(batches(ids, equal=not model.keeps_keys, stretch=math.inf))
        bar = tqdm(planned, desc=f"prefixes by {model.name}", disable=None, leave=False)
        return cls(model, len(ids), [_read(model, [ids[k] for k in rows], rows) for rows in bar])

    @torch.inference_mode()
    def finish(self, edits: Mapping[int, Edit] | None = None) -> Float[Tensor, "layers n d"]:
        """States [depth + 1, n, width] of the last tokens while `edits[l]` is added to those of layer l.

        A layer's states are those that its own edit sees: earlier edits are in them, its own
        is not. Blocks below the lowest edit are not run again. Raises `ValueError` for an edit at a layer that no
        block follows.
        """
        model, edits = self.model, edits or {}
        outside = [layer for layer in edits if not 0 <= layer < model.depth]
        if outside:
            raise ValueError(f"an edit at layer {outside[0]} has no block after it: use 0 to {model.depth - 1}")
        last_states = torch.empty(model.depth + 1, self.count, model.width, dtype=model.network.dtype)
        for batch, (states, returned) in zip(self.read, self._untouched, strict=True):
            if edits:
                first = min(edits)
                with ExitStack() as hooks:
                    hooks.enter_context(resuming(model, first, returned[first - 1]))
                    for layer, edit in edits.items():
                        hooks.enter_context(_edited(model, layer, edit, batch.rows))
                    states = [*states[: first + 1], *_run(model, batch)[first + 1 :]]
            for layer, read in enumerate(states):
                last_states[layer, batch.rows] = read[:, -1].cpu()
        return last_states

    @cached_property
    def _untouched(self) -> list[tuple[list[Tensor], list[Any]]]:
        """Of each batch the states of all layers without edits, and what each block returned."""
        passes = []
        for batch in self.read:
            returned: list[Any] = []
            with ExitStack() as hooks:
                for block in self.model.blocks:
                    note = block.register_forward_hook(lambda _, __, output, noted=returned: noted.append(output))
                    hooks.enter_context(note)
                passes.append((_run(self.model, batch), returned))
        return passes


def _run(model: LanguageModel, batch: _Batch) -> list[Shaped[Tensor, "n left d"]]:
    """The states of all layers under the hooks that are in place; the cache holds the prefixes alone again."""
    try:
        return layer_states(model, batch.unread, **batch.inputs)
    finally:  # also where an edit failed halfway through the blocks
        for layer in batch.cache.layers if batch.cache else ():
            layer.crop(min(0, batch.mask.shape[1] - 1 - layer.get_seq_length()))


@torch.inference_mode()
def _read(model: LanguageModel, ids: list[list[int]], rows: list[int]) -> _Batch:
    padded, mask = pad(ids, model.device, left=True)
    if not model.keeps_keys:
        return _Batch(rows, padded, mask, cache=None)
    cache = DynamicCache()
    if padded.shape[1] > 1:
        prefix = {"attention_mask": mask[:, :-1], "position_ids": _places(mask)[:, :-1]}
        model.body(padded[:, :-1], **prefix, past_key_values=cache)
    return _Batch(rows, padded[:, -1:], mask, cache)


def _places(mask: Int[Tensor, "n t"]) -> Int[Tensor, "n t"]:
    """The position of each token, from 0 at the first real one."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def response(prefixes: Prefixes, layer: int, seed: int = 0) -> Float64[Tensor, "d d"]:
    """J with (change of the last state) ~ (small change of layer `layer`) J, by regression on random edits.

    The edits have the covariance of the layer's states and a tenth of their size; each is run
    with both signs, so that second-order terms cancel. Two passes, shared by all experts.
    """
    h = prefixes.finish()[layer].double()
    covariance = h.T.cov()
    values, vectors = torch.linalg.eigh(covariance)
    noise = torch.randn(h.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    edits = PROBE * noise @ (vectors * values.clamp_min(0.0).sqrt()).T
    plus, minus = (prefixes.finish({layer: sign * edits})[-1].double() for sign in (1, -1))
    moments = Moments.of(edits, (plus - minus) / 2)
    return ridge(moments, 1e-3 * mean_eigenvalue(moments)).weight


def pull_back(
    edits: Float64[Tensor, "n d"], response: Float64[Tensor, "d d"], metric: Float64[Tensor, "d d"]
) -> tuple[Float64[Tensor, "n d"], Float64[Tensor, "d d"]]:
    """Edits of the last state as edits of an earlier layer, and the metric to regress on them with.

    With K = J Omega J^T + mu I the result is y = K^-1 J Omega edit: reduced-rank regression on y
    under K is regression of the last edit through the blocks, with the penalty mu on the size of
    what is added (mathematically the objective of `regression` with W J^T in place of W).
    """
    pulled = response @ metric @ response.T
    size = float(pulled.trace() / len(pulled))
    damped = pulled + DAMPING * size * torch.eye(len(pulled), dtype=torch.float64)
    return solve_symmetric(damped, response @ metric @ edits.T).T, damped


@contextmanager
def _edited(model: LanguageModel, layer: int, edit: Edit, rows: list[int]) -> Iterator[None]:
    def before(block: torch.nn.Module, inputs: tuple) -> tuple:
        h = inputs[0]
        change = (edit[rows] if isinstance(edit, Tensor) else edit(h[:, -1].cpu())).to(h)
        return (torch.cat([h[:, :-1], h[:, -1:] + change[:, None]], dim=1), *inputs[1:])

    with model.blocks[layer].register_forward_pre_hook(before):
        yield
