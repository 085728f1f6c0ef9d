"""Rows of tokens on their way through the network: read up to a block, edited behind its attention, and read on.

The samples of a row are its last tokens. An edit changes their states alone, so that what stands before them is read
as ever. A stream keeps what the block below its own returned, and every further pass begins there (`lm.resume`): a
sweep that edits block after block costs one pass through the network, and the attention of each block once more.
Memory: the width for each token. The passes are the network's own, in its dtype.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from chassis_utils.lm.attention import behind_attention
from chassis_utils.lm.forward import batches, pad
from chassis_utils.lm.model import LanguageModel
from chassis_utils.lm.resume import Reached, output_of, resuming, run_until

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
    """Rows of tokens behind the attention of block `layer`, or, at `depth`, behind the final norm."""

    model: LanguageModel
    layer: int
    batches: Sequence[_Batch]
    edit: Edit | None = None  # of the samples' states here

    @classmethod
    def of(cls, model: LanguageModel, rows: Sequence[list[int]], lengths: Sequence[int]) -> "Stream":
        """Rows of token ids of which the last `lengths[k]` are samples, in the first block.

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
        """The samples' states here before the edit, row after row, on the CPU."""
        count = sum(len(batch.places) for batch in self.batches)
        states = torch.empty(count, self.model.width, dtype=self.model.network.dtype)
        for batch in self.batches:
            states[batch.places] = self._here(batch)[batch.sampled].cpu()
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

    @torch.no_grad()
    def _here(self, batch: _Batch) -> Shaped[Tensor, "n t d"]:
        """The states of a batch here."""
        if self.layer == self.model.depth:
            return batch.below
        seen: list[Tensor] = []

        def catch(x: Tensor) -> None:
            seen.append(x)
            raise Reached

        with resuming(self.model, self.layer, batch.below), behind_attention(self.model, self.layer, catch):
            run_until(self.model, batch.ids, batch.mask)
        return seen[0]

    def _read(self, batch: _Batch, layer: int) -> Any:
        """What the block below `layer` returns for a batch under this stream's edit."""
        model, edit = self.model, self.edit or torch.zeros_like

        def change(x: Tensor) -> Tensor:
            added = torch.zeros_like(x)
            added[batch.sampled] = edit(x[batch.sampled].cpu()).to(x)
            return added

        with resuming(model, self.layer, batch.below), behind_attention(model, self.layer, change):
            if layer == model.depth:
                return model.body(batch.ids, attention_mask=batch.mask, use_cache=False).last_hidden_state
            return output_of(model, batch.ids, batch.mask, layer - 1)
