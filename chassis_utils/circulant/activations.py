"""Prompts on their way through a network, block by block: as it is, and with layers replaced, side by side.

Both start at the same block with the same states. At each block the inputs that a linear layer gets in the
network as replaced so far and the outputs that it has in the untouched one can be read; then
both states move on. What lies before a block is never run again: a layer costs two runs of its block.
Memory: two states of the model's width for each token.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from chassis_utils.circulant.patch import patch
from chassis_utils.lm.forward import batches, encode, pad
from chassis_utils.lm.model import LanguageModel


class _Reached(Exception):
    """The module that was waited for has been called: nothing behind it is needed."""


@dataclass
class _Batch:
    """Prompts of similar length at the entry of a block."""

    prompts: list[str]
    real: Bool[Tensor, "n t"]
    untouched: Float[Tensor, "n t d"]
    replaced: Float[Tensor, "n t d"]
    others: tuple[Any, ...]  # positional arguments of the blocks after the states
    named: dict[str, Any]


class Walk:
    """`prompts` at the entry of block `layer`, in the untouched network and in the replaced one.

    Raises `ValueError` for prompts that the model cannot read and a layer that it does not have.
    """

    def __init__(self, model: LanguageModel, prompts: Sequence[str], layer: int = 0) -> None:
        if not 0 <= layer < model.depth:
            raise ValueError(f"there is no layer {layer}: this network has layers 0 to {model.depth - 1}")
        self.model, self.layer = model, layer
        ids = encode(model, prompts)
        self._batches = [self._enter([prompts[k] for k in batch], [ids[k] for k in batch]) for batch in batches(ids)]

    def activations(
        self, path: str, before: Mapping[str, nn.Module]
    ) -> Iterator[tuple[Float[Tensor, "tokens d_x"], Float[Tensor, "tokens d_y"]]]:
        """Inputs of the layer at `path` in this block with `before` in place, and its outputs without, by batch.

        Rows are the real tokens, in the model's dtype and on its device. Raises `ValueError` where one is not
        finite, with the prompt.
        """
        for batch in self._batches:
            y = self._caught(path, batch, batch.untouched)[1]
            with patch(self.model.network, before):
                x = self._caught(path, batch, batch.replaced)[0]
            bad = (batch.real & ~(torch.isfinite(x).all(-1) & torch.isfinite(y).all(-1))).nonzero()
            if len(bad):
                prompt = batch.prompts[int(bad[0, 0])][:60]
                raise ValueError(
                    f"activations of {path!r} are not finite for prompt {prompt!r}: use float32 or drop it"
                )
            yield x[batch.real], y[batch.real]

    def advance(self, before: Mapping[str, nn.Module]) -> None:
        """On to the next block, through this one as it is, and with `before` in place."""
        for batch in self._batches:
            batch.untouched = self._through(batch, batch.untouched)
            with patch(self.model.network, before):
                batch.replaced = self._through(batch, batch.replaced)
        self.layer += 1

    @torch.no_grad()
    def _enter(self, prompts: list[str], ids: list[list[int]]) -> _Batch:
        """Run the untouched network up to the block, and keep what it is called with."""
        padded, mask = pad(ids, self.model.device)
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def catch(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            calls.append((positional, named))
            raise _Reached

        hook = self.model.blocks[self.layer].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self.model.network(padded, attention_mask=mask, use_cache=False)
        except _Reached:
            pass
        finally:
            hook.remove()
        ((states, *others), named), *_ = calls
        return _Batch(prompts, mask.bool(), states, states, tuple(others), named)

    @torch.no_grad()
    def _through(self, batch: _Batch, states: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        output = self.model.blocks[self.layer](states, *batch.others, **batch.named)
        return output[0] if isinstance(output, tuple) else output

    def _caught(
        self, path: str, batch: _Batch, states: Float[Tensor, "n t d"]
    ) -> tuple[Float[Tensor, "n t d_x"], Float[Tensor, "n t d_y"]]:
        """Input and output of one layer of this block."""
        seen: list[Tensor] = []

        def catch(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.extend((inputs[0], output))
            raise _Reached

        hook = self.model.network.get_submodule(path).register_forward_hook(catch)
        try:
            self._through(batch, states)
        except _Reached:
            pass
        finally:
            hook.remove()
        if not seen:
            raise ValueError(f"{path!r} is no layer that block {self.layer} runs: name one of this block")
        x, y = seen
        return x, y
