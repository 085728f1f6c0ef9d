"""The block-circulant layer nearest to a dense one on its activations, in closed form.

Block-circulant: min over C, b of sum |y - C x - b|^2 + penalty ||C - W||_F^2 separates over the
frequencies of the blocks. With hats for the orthonormal DFT of each block, centred, rows as samples,
C_f = (X_f^H X_f + penalty I)^-1 (X_f^H Y_f + penalty P(W)_f), b = mean(y) - C mean(x),
one q x q Hermitian system (q input blocks) at each of B/2 + 1 frequencies; P is averaging, to which
white inputs or a large penalty lead. Inputs x may come from a network whose earlier layers
are already replaced and outputs y from the untouched one: then each layer makes up for those before.
Padded inputs are zeros. Padded outputs are no targets: the block row that they cut short does not
separate, and is one system of in_features unknowns, from the ordinary moments of its real rows.

Cost: n q (q + p) B multiplications for n samples and q^3 B for the systems, in complex128; memory
q (q + p) B numbers, whatever n; a block row that is cut short adds in_features^2 numbers and
in_features^3 multiplications.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from operator import add, sub
from typing import Any

import torch
from jaxtyping import Complex128, Float64, Shaped
from torch import Tensor, nn

from chassis_utils.circulant.layer import BlockCirculantLinear, average, check_block_size, expand
from chassis_utils.linalg.moments import Moments, bad_rows
from chassis_utils.linalg.regression import RELATIVE_RIDGES, LinearMap, check_penalty, choose_simplest, solve_symmetric
from chassis_utils.linalg.regression import squared_error as squared_error_of_map


@dataclass(frozen=True)
class CirculantMoments:
    """Uncentred sums over n samples, at each frequency of the blocks; a row is a sample.

    Batches, processes and folds add and subtract as `Moments` do. Outputs beyond the last whole
    block are targets of `rest`, whose inputs are those of all blocks, padded by zeros.
    """

    n: Float64[Tensor, ""]
    y_square: Float64[Tensor, ""]  # sum |y|^2
    x_sum: Complex128[Tensor, "f q"]
    y_sum: Complex128[Tensor, "f p"]
    xx: Complex128[Tensor, "f q q"]  # X^H X
    xy: Complex128[Tensor, "f q p"]  # X^H Y
    rest: Moments | None
    block_size: int

    @classmethod
    def of(cls, x: Shaped[Tensor, "n d_x"], y: Shaped[Tensor, "n d_y"], block_size: int) -> "CirculantMoments":
        """The moments of one batch.

        Raises `ValueError` where a row holds NaN or infinity, and for a block size that does not fit.
        """
        check_block_size(block_size, x.shape[1], y.shape[1])
        for rows in (x, y):
            bad = bad_rows(rows)
            if len(bad):
                raise ValueError(f"row {int(bad[0])} is not finite: look at the activations of that token")
        n = torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)
        square = y.double().square().sum()
        x = nn.functional.pad(x.double(), (0, -x.shape[1] % block_size))
        y, beyond = y.double().split([y.shape[1] - y.shape[1] % block_size, y.shape[1] % block_size], 1)
        xh, yh = _transform(x, block_size), _transform(y, block_size)
        rest = Moments.of(x, beyond) if beyond.shape[1] else None
        return cls(n, square, xh.sum(1), yh.sum(1), _products(xh.mH, xh), _products(xh.mH, yh), rest, block_size)

    def __add__(self, other: "CirculantMoments") -> "CirculantMoments":
        return self._with(other, add)

    def __sub__(self, other: "CirculantMoments") -> "CirculantMoments":
        return self._with(other, sub)

    def _with(self, other: "CirculantMoments", joined: Callable[[Any, Any], Any]) -> "CirculantMoments":
        if self.block_size != other.block_size:
            raise ValueError(f"moments of block sizes {self.block_size} and {other.block_size} do not add")
        names = [field.name for field in fields(self) if field.name not in ("rest", "block_size")]
        sums = {name: joined(getattr(self, name), getattr(other, name)) for name in names}
        rest = None if self.rest is None or other.rest is None else joined(self.rest, other.rest)
        return CirculantMoments(**sums, rest=rest, block_size=self.block_size)

    @property
    def xx_centred(self) -> Complex128[Tensor, "f q q"]:
        """X^H X of the centred inputs."""
        return self.xx - self.x_sum.conj()[:, :, None] * self.x_sum[:, None] / self.n

    @property
    def xy_centred(self) -> Complex128[Tensor, "f q p"]:
        """X^H Y of the centred inputs and outputs."""
        return self.xy - self.x_sum.conj()[:, :, None] * self.y_sum[:, None] / self.n

    @property
    def weights(self) -> Float64[Tensor, "f"]:
        """How often each frequency counts: twice where it stands for its conjugate too."""
        counts = torch.full((len(self.xx),), 2.0, dtype=torch.float64, device=self.xx.device)
        counts[0] = 1
        if self.block_size % 2 == 0:
            counts[-1] = 1
        return counts

    @property
    def mean_eigenvalue(self) -> float:
        """Mean eigenvalue of the centred Gram matrix of the (padded) inputs: the unit of `RELATIVE_RIDGES`."""
        traces = self.xx_centred.diagonal(dim1=1, dim2=2).real.sum(1)
        return float((self.weights * traces).sum() / (self.x_sum.shape[1] * self.block_size))


def activation_aware(linear: nn.Linear, moments: CirculantMoments, penalty: float) -> BlockCirculantLinear:
    """The block-circulant layer nearest to `linear` on its activations, with a bias; formula above.

    `penalty` pulls toward averaging. Raises `ValueError` where it is negative, or zero with
    fewer samples than a frequency has unknowns.
    """
    (fitted,) = _fits(moments, average(linear.weight, moments.block_size), [penalty])
    return BlockCirculantLinear.of(linear, *fitted)


def squared_error(moments: CirculantMoments, layer: BlockCirculantLinear) -> float:
    """Sum over samples of |y - C x - bias|^2, from the moments of those samples."""
    c = layer.c.detach().double()
    bias = c.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach().double()
    return _error(moments, c, bias)


def choose_circulant_penalty(
    linear: nn.Linear, folds: Sequence[CirculantMoments], relative: Sequence[float] = RELATIVE_RIDGES[::2]
) -> tuple[float, dict[float, float]]:
    """The penalty of `activation_aware` with the least K-fold error, and the error per sample of each candidate.

    Candidates are `relative` times the mean eigenvalue of all samples' Gram matrix; of those as good as the best
    (`regression.choose_simplest`) the largest is taken.
    """
    whole = reduce(add, folds)
    start = average(linear.weight, whole.block_size)
    unit = whole.mean_eigenvalue or 1.0  # constant inputs: any penalty gives the mean
    penalties = [factor * unit for factor in relative]
    held_out = torch.zeros(len(folds), len(penalties), dtype=torch.float64)
    for number, fold in enumerate(folds):
        for k, fitted in enumerate(_fits(whole - fold, start, penalties)):
            held_out[number, k] = _error(fold, *fitted)
    return choose_simplest(max, penalties, held_out, whole.n, float(whole.y_square / whole.n))


def _fits(
    moments: CirculantMoments, start: Float64[Tensor, "p q block"], penalties: Sequence[float]
) -> Iterator[tuple[Float64[Tensor, "p q block"], Float64[Tensor, "out"]]]:
    """First columns and bias of the ridge toward `start`, for each penalty."""
    q, whole = moments.xy.shape[1:]
    towards = _rfft(start[:whole]).permute(2, 1, 0)
    gram = moments.xx_centred
    cross = moments.xy_centred - _products(gram, towards)  # of the part that `start` leaves over
    eye = torch.eye(q, dtype=gram.dtype, device=gram.device)
    for penalty in penalties:
        check_penalty(penalty, float(moments.n), q + 1)
        change = [solve_symmetric(a + penalty * eye, b) for a, b in zip(gram, cross, strict=True)]
        spectrum = towards + torch.stack(change)
        bias = (moments.y_sum - _outputs(moments.x_sum, spectrum)) / moments.n
        c = _irfft(spectrum.permute(2, 1, 0), moments.block_size)
        bias = _irfft(bias.T, moments.block_size, norm="ortho").flatten()
        if moments.rest is not None:
            c_rest, bias_rest = _fit_rest(moments.rest, start[-1], penalty)
            c, bias = torch.cat([c, c_rest[None]]), torch.cat([bias, bias_rest])
        yield c, bias


def _fit_rest(
    rest: Moments, start: Float64[Tensor, "q block"], penalty: float
) -> tuple[Float64[Tensor, "q block"], Float64[Tensor, "rows"]]:
    """The same for the block row that the outputs cut short: every row is a shift of the same unknowns."""
    rows, unknowns = len(rest.y_sum), start.numel()
    check_penalty(penalty, rows * float(rest.n), rows + unknowns)
    numbers = torch.arange(unknowns, dtype=torch.float64, device=start.device).view(1, *start.shape)
    meets = expand(numbers)[:rows].long()  # [row, input] -> the unknown that meets this input in this row
    each, gram, cross = rest.xx_centred, torch.zeros_like(rest.xx), torch.zeros_like(rest.x_sum)
    for unknown, xy in zip(meets, rest.xy_centred.T, strict=True):
        inputs = unknown.argsort()
        gram += each[inputs[:, None], inputs]
        cross += xy[inputs]
    ridge = rows * penalty * torch.eye(unknowns, dtype=gram.dtype, device=gram.device)
    change = solve_symmetric(gram + ridge, (cross - gram @ start.flatten())[:, None])
    c = start + change.view_as(start)
    return c, rest.y_mean - rest.x_mean @ expand(c[None])[:rows].T


def _error(moments: CirculantMoments, c: Float64[Tensor, "p q block"], bias: Float64[Tensor, "out"]) -> float:
    whole = moments.xy.shape[2]
    spectrum = _rfft(c[:whole]).permute(2, 1, 0)
    offset = _transform(bias[None, : whole * moments.block_size], moments.block_size)[:, 0]
    quadratic = (spectrum.conj() * (_products(moments.xx, spectrum) - 2 * moments.xy)).real.sum((1, 2))
    off = 2 * (_outputs(moments.x_sum, spectrum) - moments.y_sum) + moments.n * offset
    each = quadratic + (offset.conj() * off).real.sum(1)
    error = moments.y_square + (moments.weights * each).sum()
    if moments.rest is not None:
        rows = len(moments.rest.y_sum)
        fitted = LinearMap(expand(c[-1:])[:rows].T, bias[-rows:])
        error = error + squared_error_of_map(moments.rest, fitted) - moments.rest.yy.trace()
    return float(error)


def _outputs(x: Complex128[Tensor, "f q"], spectrum: Complex128[Tensor, "f q p"]) -> Complex128[Tensor, "f p"]:
    return _products(x[:, None], spectrum)[:, 0]


def _transform(x: Float64[Tensor, "n d"], block_size: int) -> Complex128[Tensor, "f n q"]:
    return _rfft(x.reshape(len(x), x.shape[1] // block_size, block_size), norm="ortho").permute(2, 0, 1)


def _rfft(x: Float64[Tensor, "*shape block"], norm: str | None = None) -> Complex128[Tensor, "*shape f"]:
    if x.numel():
        return torch.fft.rfft(x, norm=norm)
    return x.new_zeros(*x.shape[:-1], x.shape[-1] // 2 + 1, dtype=torch.complex128)  # torch has no FFT of nothing


def _irfft(
    x: Complex128[Tensor, "*shape f"], block_size: int, norm: str | None = None
) -> Float64[Tensor, "*shape block"]:
    if x.numel():
        return torch.fft.irfft(x, n=block_size, norm=norm)
    return x.real.new_zeros(*x.shape[:-1], block_size)


def _products(a: Complex128[Tensor, "f m k"], b: Complex128[Tensor, "f k n"]) -> Complex128[Tensor, "f m n"]:
    """One BLAS product per frequency: torch's batched complex128 product on a CPU takes minutes for its seconds."""
    return torch.stack([left @ right for left, right in zip(a, b, strict=True)])
