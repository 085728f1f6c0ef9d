"""Streaming second moments: all that ridge and reduced-rank regression need of the data.

For inputs x (d_x) and targets y (d_y): n, sum x, sum y, X^T X, X^T Y, Y^T Y, in float64
whatever the inputs' dtype (a float32 Gram matrix loses all digits at condition 3e4).
Moments add and subtract, so batches, processes and machines merge, and leaving a fold out
is one subtraction. Memory: d_x^2 + d_x d_y + d_y^2 numbers, whatever n; cost: n times that.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float64, Int64, Shaped
from torch import Tensor, distributed

ROWS = 256  # of which a float64 copy is held at a time
CACHED = 2**17  # numbers whose float64 copies stay in a processor's cache
COLUMNS = 192  # of a block, whose product with itself and those after it is one call


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
        """The moments of these rows, `yy` where it is known; `ValueError` where a row holds NaN or infinity."""
        for name, rows in (("inputs", x), ("targets", y)):
            bad = bad_rows(rows)
            if len(bad):
                raise ValueError(f"row {int(bad[0])} of the {name} is not finite: look at that prompt's states")
        n = torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)
        return cls(
            n, column_sums(x), column_sums(y), gram_matrix(x), _cross(x, y), gram_matrix(y) if yy is None else yy
        )

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(*(a + b for a, b in zip(self._parts(), other._parts(), strict=True)))

    def __sub__(self, other: "Moments") -> "Moments":
        return Moments(*(a - b for a, b in zip(self._parts(), other._parts(), strict=True)))

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
        return torch.addr(self.xx, self.x_sum, self.x_mean, alpha=-1)

    @property
    def xy_centred(self) -> Float64[Tensor, "d_x d_y"]:
        """Cross products of the centred inputs and targets."""
        return torch.addr(self.xy, self.x_sum, self.y_mean, alpha=-1)

    @property
    def yy_centred(self) -> Float64[Tensor, "d_y d_y"]:
        """Gram matrix of the centred targets."""
        return torch.addr(self.yy, self.y_sum, self.y_mean, alpha=-1)


def column_sums(x: Shaped[Tensor, "n d"]) -> Float64[Tensor, "d"]:
    """Sums over the rows in float64, upcast some at a time: torch's own sum with a dtype takes six times as long."""
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for rows in x.split(max(1, CACHED // x.shape[1])):
        total += rows.double().sum(0)
    return total


def gram_matrix(x: Shaped[Tensor, "n d"], weights: Float64[Tensor, "n"] | None = None) -> Float64[Tensor, "d d"]:
    """x^T x, symmetric to the last digit: of two blocks of columns one product is made, not two.

    With `weights` p, which are probabilities, it is (x - m)^T diag(p) (x - m) about the mean m = p x.
    """
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    blocks = [slice(first, first + COLUMNS) for first in range(0, len(total), COLUMNS)]
    for rows in _centred_blocks(x, weights):
        for block in blocks:
            total[block, block.start :].addmm_(rows[:, block].T, rows[:, block.start :])
    for block in blocks:  # mirrored in place: no other matrix of this size is made
        total[block, block].triu_().add_(total[block, block].triu(1).T)
        total[block.stop :, block] = total[block, block.stop :].T
    return total


def _centred_blocks(x: Shaped[Tensor, "n d"], weights: Float64[Tensor, "n"] | None) -> Iterator[Tensor]:
    """The rows in float64, some at a time, so that what is made of them stays in the processor's cache."""
    if weights is None:
        yield from (rows.double() for rows in x.split(ROWS))
        return
    parts = list(zip(x.split(ROWS), weights.split(ROWS), strict=True))
    mean = torch.stack([own @ rows.double() for rows, own in parts]).sum(0)
    yield from ((rows.double() - mean) * own.sqrt()[:, None] for rows, own in parts)


def _cross(x: Shaped[Tensor, "n d_x"], y: Shaped[Tensor, "n d_y"]) -> Float64[Tensor, "d_x d_y"]:
    total = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    for some_x, some_y in zip(x.split(ROWS), y.split(ROWS), strict=True):
        total.addmm_(some_x.double().T, some_y.double())
    return total


def processes() -> tuple[int, int]:
    """This process's number and how many there are: of `torch.distributed` where it runs, else 0 of 1."""
    running = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if running else (0, 1)


def over_processes(parts: Sequence[Moments]) -> list[Moments]:
    """The sums over the processes of `torch.distributed`, which take the place of the parts; the same in each.

    The parts have different inputs and the same targets, so that Y^T Y is sent once.
    """
    if processes()[1] == 1:
        return list(parts)
    small = torch.stack([torch.cat([part.n[None], part.x_sum, part.y_sum]) for part in parts])
    yy = parts[0].yy.clone()
    for sums in (small, yy, *(each for part in parts for each in (part.xx, part.xy))):
        distributed.all_reduce(sums)
    sizes = [1, len(parts[0].x_sum), len(parts[0].y_sum)]
    rows = [row.split(sizes) for row in small]
    return [Moments(n[0], x, y, part.xx, part.xy, yy) for (n, x, y), part in zip(rows, parts, strict=True)]


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
    yy: Sequence[Float64[Tensor, "d_y d_y"]] | None = None,
) -> list[Moments]:
    """One `Moments` per fold, in the order of their numbers; `folds` gives each row's fold.

    `yy`: Y^T Y of each fold, in that order, where these targets have been summed before.
    """
    labels = torch.as_tensor(folds, device=x.device)
    numbers = labels.unique().tolist()
    whole = [slice(None)]  # one fold needs no copy of its rows
    chosen = [(labels == number).nonzero().flatten() for number in numbers] if len(numbers) > 1 else whole
    known: list[Tensor | None] = [None] * len(chosen) if yy is None else list(yy)
    return [Moments.of(x[rows], y[rows], own) for rows, own in zip(chosen, known, strict=True)]
