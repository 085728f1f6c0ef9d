"""Rows of tokens on their way through the network: read up to a layer, edited there, and read on.

The samples of a row are its last tokens. An edit changes their states alone, so that what stands before them is read
as ever. A stream keeps what the block below its layer returned, and every further pass begins there
(`lm.resume`): a sweep that edits layer after layer in order of depth costs one pass through the network altogether.
Memory: the width for each token. The passes are the network's own, in its dtype.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn

from chassis_utils.lm.forward import batches, pad
from chassis_utils.lm.model import LanguageModel
from chassis_utils.lm.resume import Reached, resuming, run_until

Edit = Callable[[Tensor], Tensor]  # states [n, d] -> what is added to them [n, d]


@dataclass(frozen=True)
class _Batch:
    """Rows padded on the right."""

    ids: Int[Tensor, "n t"]
    mask: Int[Tensor, "n t"]
    sampled: Bool[Tensor, "n t"]
    places: Int[Tensor, "k"]  # of its samples among those of all rows
    below: Any = None  # what the block below returned; after the last block the states behind the final norm


@dataclass(frozen=True)
class Stream:
    """Rows of tokens before block `layer`, or, at `depth`, behind the final norm."""

    model: LanguageModel
    layer: int
    batches: Sequence[_Batch]
    edit: Edit | None = None  # of the samples' states at this layer

    @classmethod
    def of(cls, model: LanguageModel, rows: Sequence[list[int]], lengths: Sequence[int]) -> "Stream":
        """Rows of token ids of which the last `lengths[k]` are samples, at the embeddings.

        Raises `ValueError` for a row without samples, or with more of them than tokens.
        """
        for row, length in zip(rows, lengths, strict=True):
            if not 1 <= length <= len(row):
                raise ValueError(f"{length} samples in a row of {len(row)} tokens: take one at least, and no more")
        starts = list(accumulate(lengths, initial=0))
        made = []
        for batch in batches(rows):
            ids, mask = pad([rows[k] for k in batch], model.device)
            ends, taken = mask.sum(1)[:, None], torch.tensor([lengths[k] for k in batch], device=model.device)[:, None]
            columns = torch.arange(ids.shape[1], device=model.device)
            places = torch.cat([torch.arange(starts[k], starts[k + 1]) for k in batch])
            made.append(_Batch(ids, mask, (columns >= ends - taken) & (columns < ends), places))
        return cls(model, 0, made)

    def edited(self, edit: Edit) -> "Stream":
        """The same with `edit` added to the samples' states here, in the place of an edit that there was."""
        return replace(self, edit=edit)

    def samples(self) -> Shaped[Tensor, "n d"]:
        """The samples' states here before the edit, row after row, on the CPU; `ValueError` at the embeddings."""
        if not self.layer:
            raise ValueError("nothing has been read at layer 0: go on to a layer of 1 or more")
        count = sum(len(batch.places) for batch in self.batches)
        states = torch.empty(count, self.model.width, dtype=self.model.network.dtype)
        for batch in self.batches:
            states[batch.places] = _state(batch.below)[batch.sampled].cpu()
        return states

    def finished(self) -> Shaped[Tensor, "n d"]:
        """The samples' states that the head reads, under the edit here."""
        if self.layer < self.model.depth:
            return self.on_to(self.model.depth).samples()
        h = self.samples()
        return h if self.edit is None else (h + self.edit(h)).to(h)

    @torch.no_grad()
    def on_to(self, layer: int) -> "Stream":
        """Read on to a later layer; `ValueError` for one that is not later, or that there is not."""
        if not self.layer < layer <= self.model.depth:
            raise ValueError(f"layer {layer} is not behind layer {self.layer} of {self.model.depth}: name a later one")
        return Stream(self.model, layer, [replace(batch, below=self._read(batch, layer)) for batch in self.batches])

    def _read(self, batch: _Batch, layer: int) -> Any:
        """What the block below `layer` returns for a batch under this stream's edit."""
        model, edit, seen = self.model, self.edit, []

        def change(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            states = inputs[0].clone()
            if edit is not None:
                states[batch.sampled] += edit(states[batch.sampled].cpu()).to(states)
            return (states, *inputs[1:])

        def catch(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            seen.append(output)
            raise Reached

        with ExitStack() as stack:
            if self.layer:
                stack.enter_context(resuming(model, self.layer, batch.below))
            stack.callback(model.blocks[self.layer].register_forward_pre_hook(change).remove)
            if layer == model.depth:
                return model.body(batch.ids, attention_mask=batch.mask, use_cache=False).last_hidden_state
            run_until(model, batch.ids, batch.mask, model.blocks[layer - 1].register_forward_hook(catch))
        return seen[0]


def _state(output: Any) -> Tensor:
    """The states in what a block returned: some give them alone, some before other things."""
    return output if isinstance(output, Tensor) else output[0]
