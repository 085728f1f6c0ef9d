"""Random data that several tests fit: correlated inputs with large means, noisy linear targets."""

import torch
from hypothesis import strategies as st
from torch import Tensor

seeds = st.integers(0, 2**32 - 1)


def regression_data(seed: int, n: int = 40, d_x: int = 5, d_y: int = 4) -> tuple[Tensor, Tensor]:
    """Inputs [n, d_x] and targets [n, d_y], float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(n, d_x) @ normal(d_x, d_x) + 10 * normal(d_x)
    return x, x @ normal(d_x, d_y) + normal(n, d_y) + 10 * normal(d_y)


def semidefinite(seed: int, d: int, rank: int) -> Tensor:
    """A random positive semidefinite metric [d, d] of the given rank, float64."""
    root = torch.randn(d, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T
