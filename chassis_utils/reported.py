"""The constructions of the earlier studies exactly as they were measured, flaws included.

Each docstring names the flaw and the function to use instead. Nothing else in the package
depends on this module.
"""

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor

from chassis_utils.regression import LinearMap, solve_symmetric

RIDGE = 1e-3  # added to the Gram matrix of every fit of the first study, never chosen


def layer_lens(h: Shaped[Tensor, "n d"], logits: Shaped[Tensor, "n vocab"]) -> LinearMap:
    """Centred ridge from the states of one layer to the expert's logits, lambda 1e-3.

    Flaw: the penalty is nothing against the Gram matrix, so directions that three templates
    leave almost empty get huge weights. Use `lenses.fit_lens`, whose penalty is chosen on
    held-out groups and whose systems are d x d.
    """
    x, y = h.double(), logits.double()
    return _ridge(x, y)


def projected_alignment(
    h: Shaped[Tensor, "n d"], expert: Shaped[Tensor, "n d"], basis: Float64[Tensor, "d k"]
) -> LinearMap:
    """Ridge between base and expert states inside an orthonormal basis, lifted back: h -> h_e.

    Flaw: the state itself passes through the k-dimensional basis, so everything outside is
    lost, edited or not. Use a fit of the edit h_e - h, added back to the untouched h.
    """
    inner = _ridge(h.double() @ basis, expert.double() @ basis)
    return LinearMap(basis @ inner.weight @ basis.T, inner.bias @ basis.T)


def random_basis(width: int, k: int, seed: int = 0) -> Float64[Tensor, "d k"]:
    """An orthonormal basis of a random k-dimensional subspace."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, k, generator=generator, dtype=torch.float64)).Q


def _ridge(x: Float64[Tensor, "n p"], y: Float64[Tensor, "n q"]) -> LinearMap:
    x_mean, y_mean = x.mean(0), y.mean(0)
    gram = (x - x_mean).T @ (x - x_mean) + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
    weight = solve_symmetric(gram, (x - x_mean).T @ (y - y_mean))
    return LinearMap(weight, y_mean - x_mean @ weight)
