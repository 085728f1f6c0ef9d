"""Low-rank layers in place of a dense one: nearest to its weights, or to its outputs on its activations.

Plain SVD of the weight, and reduced-rank regression of the outputs on the inputs (`linalg.regression`). Cost: one
decomposition; rank (in + out) multiplications a token.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chassis_utils.circulant.layer import check_block_size
from chassis_utils.linalg.moments import Moments
from chassis_utils.linalg.regression import reduced_rank


class LowRankLinear(nn.Module):
    """y = up down x + bias; takes the place of an `nn.Linear`. Of rank 0 it is the bias alone, or zero."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        limit = min(in_features, out_features)
        if limit < 1:
            raise ValueError(f"a layer {in_features} -> {out_features} holds nothing: give sizes above zero")
        if not isinstance(rank, int) or not 0 <= rank <= limit:
            raise ValueError(f"rank {rank} does not fit a layer {in_features} -> {out_features}: use 0 to {limit}")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Parameter(torch.zeros(rank, in_features))
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def of(
        cls, linear: nn.Linear, down: Float[Tensor, "r d_x"], up: Float[Tensor, "d_y r"], bias: Tensor | None
    ) -> "LowRankLinear":
        """The layer with these parameters, in the sizes, dtype and device of `linear`."""
        layer = cls(linear.in_features, linear.out_features, len(down), bias is not None).to(linear.weight)
        layer.load_state_dict({"down": down, "up": up} | ({} if bias is None else {"bias": bias}))
        return layer

    def forward(self, x: Float[Tensor, "*batch d_x"]) -> Float[Tensor, "*batch d_y"]:
        """Two products: `rank` (in + out) multiplications a token."""
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up, self.bias)


def low_rank(linear: nn.Linear, rank: int) -> LowRankLinear:
    """The layer of `rank` nearest to `linear` in the Frobenius norm, with its bias."""
    u, s, vt = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
    bias = None if linear.bias is None else linear.bias.detach()
    return LowRankLinear.of(linear, vt[:rank], u[:, :rank] * s[:rank], bias)


def low_rank_aware(linear: nn.Linear, moments: Moments, penalty: float, rank: int) -> LowRankLinear:
    """The layer of `rank` nearest to `linear` on its activations (`regression.reduced_rank`), with a bias."""
    path = reduced_rank(moments, penalty)
    return LowRankLinear.of(linear, path.left[:, :rank].T, path.right[:, :rank], path.at(rank).bias)


def equal_rank(linear: nn.Linear, block_size: int) -> int:
    """The largest rank, at least 1, with no more weights than blocks of that size hold; `ValueError` as of them."""
    check_block_size(block_size, linear.in_features, linear.out_features)
    p, q = (-(-size // block_size) for size in linear.weight.shape)
    return max(1, p * q * block_size // sum(linear.weight.shape))
