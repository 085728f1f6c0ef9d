"""Streaming second moments: all that ridge and reduced-rank regression need of the data.

For inputs x (d_x) and targets y (d_y): n, sum x, sum y, X^T X, X^T Y, Y^T Y, in float64
whatever the inputs' dtype (a float32 Gram matrix loses all digits at condition 3e4).
Moments add and subtract, so batches, processes and machines merge, and leaving a fold out
is one subtraction. Memory: d_x^2 + d_x d_y + d_y^2 numbers, whatever n; cost: n times that.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float64, Int64, Shaped
from torch import Tensor, distributed


@dataclass(frozen=True)
class Moments:
    """Uncentred sums over n samples."""

    n: Float64[Tensor, ""]
    x_sum: Float64[Tensor, "d_x"]
    y_sum: Float64[Tensor, "d_y"]
    xx: Float64[Tensor, "d_x d_x"]
    xy: Float64[Tensor, "d_x d_y"]
    yy: Float64[Tensor, "d_y d_y"]

    @classmethod
    def of(
        cls, x: Shaped[Tensor, "n d_x"], y: Shaped[Tensor, "n d_y"], yy: Float64[Tensor, "d_y d_y"] | None = None
    ) -> "Moments":
        """The moments of one batch, `yy` where it is known; `ValueError` where a row holds NaN or infinity."""
        for name, rows in (("inputs", x), ("targets", y)):
            bad = bad_rows(rows)
            if len(bad):
                raise ValueError(f"row {int(bad[0])} of the {name} is not finite: look at that prompt's states")
        x, y = x.double(), y.double()
        n = torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)
        return cls(n, x.sum(0), y.sum(0), x.T @ x, x.T @ y, y.T @ y if yy is None else yy)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(*(a + b for a, b in zip(self._parts(), other._parts(), strict=True)))

    def __sub__(self, other: "Moments") -> "Moments":
        return Moments(*(a - b for a, b in zip(self._parts(), other._parts(), strict=True)))

    def over_processes(self) -> "Moments":
        """The sum over the processes of `torch.distributed`, the same in each; itself where there is but one."""
        for part in self._parts() if processes()[1] > 1 else ():
            distributed.all_reduce(part)
        return self

    def _parts(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def x_mean(self) -> Float64[Tensor, "d_x"]:
        """Mean input."""
        return self.x_sum / self.n

    @property
    def y_mean(self) -> Float64[Tensor, "d_y"]:
        """Mean target."""
        return self.y_sum / self.n

    @property
    def xx_centred(self) -> Float64[Tensor, "d_x d_x"]:
        """Gram matrix of the centred inputs."""
        return self.xx - torch.outer(self.x_sum, self.x_mean)

    @property
    def xy_centred(self) -> Float64[Tensor, "d_x d_y"]:
        """Cross products of the centred inputs and targets."""
        return self.xy - torch.outer(self.x_sum, self.y_mean)

    @property
    def yy_centred(self) -> Float64[Tensor, "d_y d_y"]:
        """Gram matrix of the centred targets."""
        return self.yy - torch.outer(self.y_sum, self.y_mean)


def processes() -> tuple[int, int]:
    """This process's number and how many there are: of `torch.distributed` where it runs, else 0 of 1."""
    running = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if running else (0, 1)


def bad_rows(rows: Shaped[Tensor, "n d"]) -> Int64[Tensor, "k"]:
    """Numbers of the rows that hold NaN or infinity; one pass where there are none, as a sum hides neither."""
    if torch.isfinite(rows.sum()):
        return torch.empty(0, dtype=torch.long)
    return (~torch.isfinite(rows).all(1)).nonzero().flatten()


def merge(parts: Iterable[Moments]) -> Moments:
    """The moments of all samples together."""
    first, *rest = parts
    for part in rest:
        first = first + part
    return first


def by_fold(
    x: Shaped[Tensor, "n d_x"],
    y: Shaped[Tensor, "n d_y"],
    folds: Sequence[int],
    like: Sequence["Moments"] | None = None,
    batch: int = 1024,
) -> list[Moments]:
    """One `Moments` per fold, in the order of their numbers, streamed in batches; `folds` gives each row's fold.

    `like`: what this has given for other inputs and the same targets, a third of which is then not computed again.
    """
    labels = torch.as_tensor(folds, device=x.device)
    parts = []
    for number, fold in enumerate(labels.unique().tolist()):
        rows = (labels == fold).nonzero().flatten()
        known = None if like is None else torch.zeros_like(like[number].yy)
        part = merge(Moments.of(x[some], y[some], known) for some in rows.split(batch))
        parts.append(part if like is None else replace(part, yy=like[number].yy))
    return parts
