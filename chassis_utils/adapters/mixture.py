"""What a port's hooks compute: the edits, and the devices, of each row of a batch at once.

Edits of several adapters stand side by side, and each row keeps the columns of its own. A batch of k n rows is that of
n prompts as beams and several returned sequences expand it: k rows in succession for each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformers import LogitsProcessor

from chassis_utils.experts.alongside import Alongside


@dataclass(frozen=True)
class Edit:
    """(x A) B^T + b as the network computes it."""

    down: Shaped[Tensor, "d rank"]
    up: Shaped[Tensor, "rank out"]
    shift: Shaped[Tensor, "out"]

    @property
    def bytes(self) -> int:
        """What it holds."""
        return self.down.nbytes + self.up.nbytes + self.shift.nbytes


@dataclass(frozen=True)
class Mixture:
    """One edit, or none, for each of n rows."""

    down: Shaped[Tensor, "d ranks"]
    up: Shaped[Tensor, "ranks out"]
    foreign: Bool[Tensor, "n 1 1 ranks"]  # columns that belong to the edits of other rows
    shifts: Shaped[Tensor, "n 1 1 out"]

    @classmethod
    def of(cls, edits: Sequence[Edit | None]) -> "Mixture | None":
        """The mixture of the edits of each row; nothing where no row has one."""
        distinct = list({id(edit): edit for edit in edits if edit is not None}.values())
        if not distinct:
            return None
        owners = [edit for edit in distinct for _ in range(edit.down.shape[1])]
        first = distinct[0].shift
        foreign = torch.tensor([[owner is not edit for owner in owners] for edit in edits], device=first.device)
        shifts = torch.stack([torch.zeros_like(first) if edit is None else edit.shift for edit in edits])
        return cls(
            torch.cat([edit.down for edit in distinct], dim=1),
            torch.cat([edit.up for edit in distinct]),
            foreign.bool()[:, None, None],  # without any column it would be a float
            shifts[:, None, None],
        )

    def __call__(self, h: Shaped[Tensor, "rows t d"]) -> Shaped[Tensor, "rows t out"]:
        """What is added; row i of n stands for its whole share of the batch, as beams expand it."""
        shares = h.unflatten(0, (len(self.shifts), share_of(len(h), len(self.shifts))))
        code = (shares @ self.down).masked_fill(self.foreign, 0.0)
        return (code @ self.up + self.shifts).flatten(0, 1)


@dataclass(frozen=True)
class Devices(LogitsProcessor):
    """One device, or none, for each of n rows; as beams expand them, row i of n stands for its whole share."""

    rows: Sequence[Alongside | None]

    def __call__(self, input_ids: Int[Tensor, "n t"], scores: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
        """The scores, with those of the rows that have a device mixed with its own."""
        share, mixed = share_of(len(scores), len(self.rows)), scores.clone()
        for device in dict.fromkeys(device for device in self.rows if device is not None):
            here = [row for row in range(len(scores)) if self.rows[row // share] is device]
            mixed[here] = device(input_ids[here], scores[here])
        return mixed


def share_of(batch: int, chosen: int) -> int:
    """Rows of a batch that belong to each of the chosen ones."""
    if batch % chosen:
        raise ValueError(
            f"{chosen} rows have been chosen for a batch of {batch}: give one name for all, or one for each prompt"
        )
    return batch // chosen
