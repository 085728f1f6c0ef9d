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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor

from chassis_utils.moments import Moments, merge

RELATIVE_RIDGES = tuple(10.0**k for k in range(-9, 3))  # times the mean eigenvalue of the Gram matrix


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


def solve_symmetric(a: Float64[Tensor, "d d"], b: Float64[Tensor, "d m"]) -> Float64[Tensor, "d m"]:
    """Solve a z = b for symmetric positive semidefinite a (least norm where a is singular)."""
    factor, failed = torch.linalg.cholesky_ex(a)
    if not failed:
        return torch.cholesky_solve(b, factor)
    values, vectors = torch.linalg.eigh(a)
    keep = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, keep] @ ((vectors[:, keep].T @ b) / values[keep, None])


def ridge(moments: Moments, penalty: float) -> LinearMap:
    """Centred ridge regression with an intercept; `penalty` is added to the Gram matrix's diagonal.

    Raises `ValueError` for fewer samples than unknowns without a penalty.
    """
    _check_penalty(moments, penalty)
    eye = torch.eye(len(moments.x_sum), dtype=torch.float64, device=moments.xx.device)
    weight = solve_symmetric(moments.xx_centred + penalty * eye, moments.xy_centred)
    return LinearMap(weight, moments.y_mean - moments.x_mean @ weight)


def reduced_rank(moments: Moments, penalty: float, metric: Float64[Tensor, "d_y d_y"] | None = None) -> RankPath:
    """The whole rank path under `metric` (K above; the identity where none is given), from one SVD.

    Raises `ValueError` for fewer samples than unknowns without a penalty.
    """
    _check_penalty(moments, penalty)
    _, unroot_x = _roots(moments.xx_centred, penalty)
    cross = unroot_x.T @ moments.xy_centred
    if metric is None:
        u, s, vt = torch.linalg.svd(cross, full_matrices=False)
        return RankPath(unroot_x @ (u * s), vt.T, s, moments.x_mean, moments.y_mean)
    root_y, unroot_y = _roots(metric, 0.0)
    u, s, vt = torch.linalg.svd(cross @ root_y, full_matrices=False)
    return RankPath(unroot_x @ (u * s), unroot_y @ vt.T, s, moments.x_mean, moments.y_mean)


def mean_eigenvalue(moments: Moments) -> float:
    """Mean eigenvalue of the centred Gram matrix: the unit of `RELATIVE_RIDGES`."""
    return float(moments.xx_centred.trace() / len(moments.x_sum))


def squared_error(
    moments: Moments, fitted: LinearMap, metric: Float64[Tensor, "d_y d_y"] | None = None
) -> Float64[Tensor, ""]:
    """Sum over samples of (x M + b - y) K (x M + b - y)^T, from the moments of those samples."""
    m, b = fitted.weight, fitted.bias
    xb = torch.outer(moments.x_sum @ m, b)
    fit = m.T @ moments.xx @ m + xb + xb.T + moments.n * torch.outer(b, b)
    cross = m.T @ moments.xy + torch.outer(b, moments.y_sum)
    residual = fit - cross - cross.T + moments.yy
    return residual.trace() if metric is None else (residual * metric).sum()


def choose_penalty(
    folds: Sequence[Moments],
    metric: Float64[Tensor, "d_y d_y"] | None = None,
    relative: Sequence[float] = RELATIVE_RIDGES,
) -> tuple[float, dict[float, float]]:
    """The penalty with the least K-fold error, and the held-out error per sample of each candidate.

    Candidates are `relative` times the mean eigenvalue of all samples' Gram matrix. Ridge is
    solved for all of them from one eigendecomposition a fold.
    """
    whole = merge(folds)
    candidates = [factor * mean_eigenvalue(whole) for factor in relative]
    errors = dict.fromkeys(candidates, 0.0)
    for fold in folds:
        rest = whole - fold
        values, vectors = torch.linalg.eigh(rest.xx_centred)
        rotated = vectors.T @ rest.xy_centred
        for penalty in candidates:
            weight = vectors @ (rotated / (values.clamp_min(0.0) + penalty)[:, None])
            fitted = LinearMap(weight, rest.y_mean - rest.x_mean @ weight)
            errors[penalty] += float(squared_error(fold, fitted, metric) / whole.n)
    return min(errors, key=errors.__getitem__), errors


def vocabulary_metric(
    unembedding: Shaped[Tensor, "vocab d"], mean_probabilities: Float64[Tensor, "vocab"]
) -> Float64[Tensor, "d d"]:
    """W^T (diag p - p p^T) W: squared error in hidden coordinates as KL sees it to second order.

    `mean_probabilities` is the expert's mean next-token distribution, the shared
    approximation to the Fisher form of the softmax.
    """
    w, p = unembedding.double(), mean_probabilities.double()
    centred = w - p @ w
    return centred.T @ (centred * p[:, None])


def _check_penalty(moments: Moments, penalty: float) -> None:
    unknowns = len(moments.x_sum) + 1
    if penalty < 0:
        raise ValueError(f"ridge {penalty} is negative: use zero or more")
    if penalty == 0 and moments.n < unknowns:
        raise ValueError(
            f"{int(moments.n)} samples do not determine {unknowns} unknowns without a ridge: "
            "collect more prompts or set a ridge above zero"
        )


def _roots(a: Float64[Tensor, "d d"], penalty: float) -> tuple[Tensor, Tensor]:
    """R with R R^T = a + penalty I, and the transpose of its (pseudo-)inverse; both [d, d]."""
    values, vectors = torch.linalg.eigh(a)
    values = values.clamp_min(0.0) + penalty
    keep = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    inverse = torch.where(keep, values, torch.inf).rsqrt()
    return vectors * values.sqrt(), vectors * inverse
