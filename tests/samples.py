"""What several tests fit or compare with: random data, and matrices made by other hands."""

import numpy as np
import torch
from hypothesis import strategies as st
from scipy.linalg import circulant, lstsq
from torch import Tensor, nn

seeds = st.integers(0, 2**32 - 1)


def regression_data(seed: int, n: int = 40, d_x: int = 5, d_y: int = 4) -> tuple[Tensor, Tensor]:
    """Correlated inputs [n, d_x] with large means and noisy linear targets [n, d_y], float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(n, d_x) @ normal(d_x, d_x) + 10 * normal(d_x)
    return x, x @ normal(d_x, d_y) + normal(n, d_y) + 10 * normal(d_y)


def semidefinite(seed: int, d: int, rank: int) -> Tensor:
    """A random positive semidefinite metric [d, d] of the given rank, float64."""
    root = torch.randn(d, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T


def block_circulant(c: Tensor) -> np.ndarray:
    """The matrix with circulant blocks of first columns c [p, q, block]."""
    return np.block([[circulant(block) for block in row] for row in c.detach().numpy()])


def padded(x: Tensor, block: int) -> Tensor:
    """Columns of zeros up to a multiple of the block size."""
    return nn.functional.pad(x, (0, -x.shape[1] % block))


def basis(p: int, q: int, block: int) -> Tensor:
    """The explicit matrix of each parameter alone."""
    alone = torch.eye(p * q * block, dtype=torch.float64).view(-1, p, q, block)
    return torch.stack([torch.from_numpy(block_circulant(c)) for c in alone])


def direct(linear: nn.Linear, x: Tensor, y: Tensor, block: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Parameters by least squares: a column for each parameter, a row for each output and for each pull."""
    weight, x = padded(linear.weight.detach(), block), padded(x, block)
    matrices = basis(-(-len(weight) // block), x.shape[1] // block, block)[:, : len(weight)]
    outputs = torch.stack([(x @ matrix.T).flatten() for matrix in matrices], 1)
    constants = torch.eye(y.shape[1], dtype=torch.float64).repeat(len(x), 1)
    pulls = penalty**0.5 * matrices.flatten(1).T
    left = torch.cat([torch.cat([outputs, constants], 1), nn.functional.pad(pulls, (0, y.shape[1]))])
    right = torch.cat([y.flatten(), penalty**0.5 * weight.flatten()])
    found = torch.from_numpy(lstsq(left.numpy(), right.numpy())[0])
    c, bias = found.split([len(matrices), y.shape[1]])
    return c.view(-1, x.shape[1] // block, block), bias
