"""Ridge and reduced-rank regression in closed form, from moments alone.

Ridge: M = (G + lambda I)^-1 C with G, C the centred moments. Reduced rank: minimise
||(X M - Y) K^(1/2)||^2 + lambda ||M K^(1/2)||^2 over rank(M) <= r. With G + lambda I = L L^T
and K = J J^T, one SVD  L^-1 C J = U S V^T  gives every rank at once,
M_r = L^-T U_r S_r V_r^T J^-1  (Mukherjee and Zhu 2011; the weighted form is generalised
low-rank approximation, Friedland and Torokhti 2007), and the objective falls by s_i^2 with
each rank. The ridge is chosen by K-fold validation, a fold left out by subtraction.

Everything is float64; systems are solved by Cholesky, by the symmetric eigendecomposition
where that fails, never by an inverse. Cost: a few d^3, whatever n.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Float64, Inexact, Shaped
from torch import Tensor

from chassis_utils.linalg.moments import Moments, gram_matrix, merge

ROUNDING = 1e-12  # of the targets' variance: errors closer than this are equal
INDIFFERENCE = 0.1  # of a standard error: choices whose errors are closer than that are equal
RELATIVE_RIDGES = tuple(10.0 ** (k / 2) for k in range(-18, 5))  # times the mean eigenvalue of the Gram matrix

Metric = Float64[Tensor, "d_y d_y"] | None  # K above; the identity where none is given
Candidate = TypeVar("Candidate", int, float)


@dataclass(frozen=True)
class LinearMap:
    """x -> x M + b, in float64."""

    weight: Float64[Tensor, "d_x d_y"]
    bias: Float64[Tensor, "d_y"]

    def __call__(self, x: Shaped[Tensor, "n d_x"]) -> Float64[Tensor, "n d_y"]:
        """Apply to each row, upcast to float64."""
        return x.double() @ self.weight + self.bias


@dataclass(frozen=True)
class RankPath:
    """The reduced-rank solutions of every rank: M_r = left[:, :r] right[:, :r]^T."""

    left: Float64[Tensor, "d_x k"]
    right: Float64[Tensor, "d_y k"]
    singular_values: Float64[Tensor, "k"]
    x_mean: Float64[Tensor, "d_x"]
    y_mean: Float64[Tensor, "d_y"]

    def at(self, rank: int) -> LinearMap:
        """The solution of one rank, 0 to k; `ValueError` beyond."""
        limit = len(self.singular_values)
        if not 0 <= rank <= limit:
            raise ValueError(f"rank {rank} is beyond the limit: these moments give ranks 0 to {limit}")
        weight = self.left[:, :rank] @ self.right[:, :rank].T
        return LinearMap(weight, self.y_mean - self.x_mean @ weight)


def cholesky(a: Inexact[Tensor, "d d"]) -> Inexact[Tensor, "d d"] | None:
    """The lower Cholesky factor; none where a pivot is negative, or no larger than rounding."""
    factor, failed = torch.linalg.cholesky_ex(a)
    pivots = factor.diagonal().real.square()
    sound = not failed and pivots.min() > len(a) * torch.finfo(pivots.dtype).eps * pivots.max()
    return factor if sound else None


def solve_symmetric(a: Inexact[Tensor, "d d"], b: Inexact[Tensor, "d m"]) -> Inexact[Tensor, "d m"]:
    """Solve a z = b for symmetric or Hermitian positive semidefinite a (least norm where a is singular)."""
    factor = cholesky(a)
    if factor is not None:
        return torch.cholesky_solve(b, factor)
    values, vectors = torch.linalg.eigh(a)
    keep = values > values[-1] * 100 * len(values) * torch.finfo(values.dtype).eps  # beyond what centring leaves
    return vectors[:, keep] @ ((vectors[:, keep].mH @ b) / values[keep, None])


def ridge(moments: Moments, penalty: float) -> LinearMap:
    """Centred ridge regression with an intercept; `penalty` is added to the Gram matrix's diagonal.

    Raises `ValueError` for fewer samples than unknowns without a penalty.
    """
    check_penalty(penalty, float(moments.n), len(moments.x_sum) + 1)
    gram = moments.xx_centred
    gram.diagonal().add_(penalty)
    weight = solve_symmetric(gram, moments.xy_centred)
    return LinearMap(weight, moments.y_mean - moments.x_mean @ weight)


def reduced_rank(moments: Moments, penalty: float, metric: Metric = None) -> RankPath:
    """The whole rank path under `metric` (K above; the identity where none is given), from one SVD.

    Raises `ValueError` for fewer samples than unknowns without a penalty.
    """
    check_penalty(penalty, float(moments.n), len(moments.x_sum) + 1)
    root = _Root.of(moments.xx_centred, penalty)
    cross = root.divide(moments.xy_centred)
    if metric is None:
        u, s, vt = torch.linalg.svd(cross, full_matrices=False)
        return RankPath(root.divide_back(u * s), vt.T, s, moments.x_mean, moments.y_mean)
    root_y = _Root.of(metric, 0.0)
    u, s, vt = torch.linalg.svd(cross @ root_y.matrix, full_matrices=False)
    return RankPath(root.divide_back(u * s), root_y.divide_back(vt.T), s, moments.x_mean, moments.y_mean)


def mean_eigenvalue(moments: Moments) -> float:
    """Mean eigenvalue of the centred Gram matrix: the unit of `RELATIVE_RIDGES`."""
    return float(moments.xx_centred.trace() / len(moments.x_sum))


def squared_error(moments: Moments, fitted: LinearMap, metric: Metric = None) -> Float64[Tensor, ""]:
    """Sum over samples of (x M + b - y) K (x M + b - y)^T, from the moments of those samples."""
    m, b = fitted.weight, fitted.bias
    xb = torch.outer(moments.x_sum @ m, b)
    fit = m.T @ moments.xx @ m + xb + xb.T + moments.n * torch.outer(b, b)
    cross = m.T @ moments.xy + torch.outer(b, moments.y_sum)
    residual = fit - cross - cross.T + moments.yy
    return _total(residual, metric)


def choose_penalty(
    folds: Sequence[Moments], metric: Metric = None, relative: Sequence[float] = RELATIVE_RIDGES
) -> tuple[float, dict[float, float]]:
    """The penalty with the least K-fold error, and the held-out error per sample of each candidate.

    Candidates are `relative` times the mean eigenvalue of all samples' Gram matrix. Of those as good as the
    best (`choose_simplest`) the largest penalty is taken, so that no noise decides where the error is flat.
    """
    whole = merge(folds)
    unit = mean_eigenvalue(whole) or 1.0  # constant inputs: any penalty gives the mean
    candidates = whole.xx.new_tensor([factor * unit for factor in relative])
    if whole.n < len(whole.x_sum):
        folds = _in_their_span(folds, whole)
        whole = merge(folds)
    held_out = torch.stack([_held_out_errors(whole - fold, fold, candidates, metric) for fold in folds])
    variance = max(0.0, float(_total(whole.yy_centred, metric) / whole.n))  # of constant targets it is noise
    return choose_simplest(max, candidates.tolist(), held_out, whole.n, variance)


def choose_rank(
    folds: Sequence[Moments], penalty: float, metric: Metric = None, ranks: Sequence[int] | None = None
) -> tuple[int, dict[int, float]]:
    """The rank with the least K-fold error under `metric`, and the held-out error per sample of each.

    Of those as good as the best (`choose_simplest`) the smallest rank is taken. All ranks unless given.
    """
    whole = merge(folds)
    paths = [reduced_rank(whole - fold, penalty, metric) for fold in folds]
    ranks = list(range(len(paths[0].singular_values) + 1) if ranks is None else ranks)
    pairs = zip(folds, paths, strict=True)
    errors = [torch.stack([squared_error(fold, path.at(rank), metric) for rank in ranks]) for fold, path in pairs]
    return choose_simplest(min, ranks, torch.stack(errors), whole.n, float(_total(whole.yy, metric) / whole.n))


def choose_simplest(
    simplest: Callable[[Iterable[Candidate]], Candidate],
    candidates: Sequence[Candidate],
    held_out: Float64[Tensor, "folds candidates"],
    n: Float64[Tensor, ""],
    variance: float,
) -> tuple[Candidate, dict[Candidate, float]]:
    """The `simplest` candidate as good as the best on kept-out folds, and the error per sample of each.

    As good are summed errors within `INDIFFERENCE` standard errors of the least. The standard error is that of the
    least one over folds; differences below `ROUNDING` of the targets' `variance` are none. So the choice does not flip
    with the last digits of a sum.
    """
    errors = held_out.sum(0)
    spread = held_out[:, errors.argmin()].std(unbiased=True) * len(held_out) ** 0.5 if len(held_out) > 1 else 0.0
    good = (errors <= errors.min() + INDIFFERENCE * spread + ROUNDING * variance * n).tolist()
    chosen = simplest(candidate for candidate, fits in zip(candidates, good, strict=True) if fits)
    return chosen, dict(zip(candidates, (errors / n).tolist(), strict=True))


def _in_their_span(folds: Sequence[Moments], whole: Moments) -> list[Moments]:
    """The same moments of as many inputs as there are samples in all, which are fewer: all else of a state is zero.

    The directions are eigenvectors of the inputs' Gram matrix. Ridge is indifferent to such a rotation.
    """
    basis = torch.linalg.eigh(whole.xx).eigenvectors[:, -int(whole.n) :]
    return [
        replace(fold, x_sum=fold.x_sum @ basis, xx=basis.T @ fold.xx @ basis, xy=basis.T @ fold.xy) for fold in folds
    ]


def _held_out_errors(
    rest: Moments, fold: Moments, penalties: Float64[Tensor, "k"], metric: Metric
) -> Float64[Tensor, "k"]:
    """Squared error on `fold` of ridge fitted to `rest`, for each penalty, from one eigendecomposition.

    About the means of `rest`, with its Gram matrix V diag(g) V^T and R = V^T C, the fit is V diag(w) R
    with w = 1 / (g + penalty), so the error is a quadratic form in w: d^2 for each penalty.
    """
    values, vectors = torch.linalg.eigh(rest.xx_centred)
    rotated = vectors.T @ rest.xy_centred
    x_off, y_off = fold.x_sum - fold.n * rest.x_mean, fold.y_sum - fold.n * rest.y_mean
    xx = fold.xx_centred + torch.outer(x_off, x_off) / fold.n
    xy = fold.xy_centred + torch.outer(x_off, y_off) / fold.n
    yy = fold.yy_centred + torch.outer(y_off, y_off) / fold.n
    weighed = rotated if metric is None else rotated @ metric
    linear = ((vectors.T @ xy) * weighed).sum(1)
    quadratic = (vectors.T @ xx @ vectors) * (weighed @ rotated.T)
    weights = 1 / (values.clamp_min(0.0) + penalties[:, None])
    return _total(yy, metric) - 2 * weights @ linear + ((weights @ quadratic) * weights).sum(1)


def _total(yy: Float64[Tensor, "d_y d_y"], metric: Metric) -> Float64[Tensor, ""]:
    """The sum of y K y^T from that of y^T y."""
    return yy.trace() if metric is None else (yy * metric).sum()


def vocabulary_metric(
    unembedding: Shaped[Tensor, "vocab d"], mean_probabilities: Float64[Tensor, "vocab"]
) -> Float64[Tensor, "d d"]:
    """W^T (diag p - p p^T) W: squared error in hidden coordinates as KL sees it to second order.

    `mean_probabilities` is the expert's mean next-token distribution, the shared
    approximation to the Fisher form of the softmax.
    """
    return gram_matrix(unembedding, mean_probabilities.double())


def check_penalty(penalty: float, samples: float, unknowns: int) -> None:
    """Raise `ValueError` for a ridge that is negative or infinite, and fewer samples than unknowns without one."""
    if not 0 <= penalty < math.inf:
        raise ValueError(f"ridge {penalty} is {'negative' if penalty < 0 else 'not finite'}: use zero or more")
    if penalty == 0 and samples < unknowns:
        raise ValueError(
            f"{int(samples)} samples do not determine {unknowns} unknowns without a ridge: "
            "collect more prompts or set a ridge above zero"
        )


@dataclass(frozen=True)
class _Root:
    """R with R R^T = a + penalty I: by Cholesky, or by eigenvectors where directions may be null and are left out."""

    matrix: Float64[Tensor, "d d"]
    pseudo_inverse: Float64[Tensor, "d d"] | None = None  # of the second kind

    @classmethod
    def of(cls, a: Float64[Tensor, "d d"], penalty: float) -> "_Root":
        factor = cholesky(a + penalty * torch.eye(len(a), dtype=a.dtype, device=a.device)) if penalty else None
        if factor is not None:
            return cls(factor)
        values, vectors = torch.linalg.eigh(a)
        values = values.clamp_min(0.0) + penalty
        keep = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        inverse = torch.where(keep, values, torch.inf).rsqrt()
        return cls(vectors * values.sqrt(), inverse[:, None] * vectors.T)

    def divide(self, b: Float64[Tensor, "d m"]) -> Float64[Tensor, "d m"]:
        """R^-1 b."""
        if self.pseudo_inverse is not None:
            return self.pseudo_inverse @ b
        return torch.linalg.solve_triangular(self.matrix, b, upper=False)

    def divide_back(self, b: Float64[Tensor, "d m"]) -> Float64[Tensor, "d m"]:
        """R^-T b."""
        if self.pseudo_inverse is not None:
            return self.pseudo_inverse.T @ b
        return torch.linalg.solve_triangular(self.matrix.T, b, upper=True)
