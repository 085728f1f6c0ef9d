"""The FFT study's product with a block-circulant layer."""

import torch
from jaxtyping import Float
from torch import Tensor

from chassis_utils.circulant.layer import BlockCirculantLinear


def reported_forward(layer: BlockCirculantLinear, x: Float[Tensor, "*batch d_x"]) -> Float[Tensor, "*batch d_y"]:
    """The study's own product with a block-circulant layer, in float32: for each pair of blocks rfft(c) rfft(x).

    Flaw: the spectrum of c is computed again at every call, and the products of all pairs of
    blocks are written out before they are summed: n p q (B / 2 + 1) complex numbers. Use the layer itself.
    """
    _, q, block = layer.c.shape
    padded = torch.nn.functional.pad(x.float(), (0, q * block - layer.in_features))
    x_hat = torch.fft.rfft(padded.unflatten(-1, (q, block)))
    products = torch.fft.rfft(layer.c.float()) * x_hat.unsqueeze(-3)
    y = torch.fft.irfft(products.sum(-2), n=block).flatten(-2)[..., : layer.out_features]
    return (y if layer.bias is None else y + layer.bias).to(x.dtype)
