"""Linear layers whose weight consists of circulant B x B blocks, and their fast products.

A block is C[i, j] = c[(i - j) mod B]: its first column c is all it holds. It is a cyclic
convolution, so with hats for the DFT of each block of inputs, of outputs and of c,
y_f = sum over input blocks of c_f x_f at each of the F = B/2 + 1 frequencies that real numbers
have. Parameters: in * out / B. Cost per token: in * out / 2B complex multiplications, and the
transforms of each block, B log B by FFT and B^2 as a product. Four ways (`PATHS`):

- `pointwise`: rfft, the products of all pairs of blocks as they lie in memory, their sums, irfft; for each token.
- `fft`: rfft, a complex matrix product at each frequency, irfft.
- `gemm4`: the DFT as a real matrix product x E; at each frequency one real product
  [re im] [[c, d], [-d, c]] that holds the four of a complex one; the inverse DFT as y Q.
- `gemm3`: the same with Gauss's three products in place of four,
  re = c (a + b) - b (c + d), im = c (a + b) + a (d - c), whose sums are folded into E and Q.

E and Q are made in float64: in float32 their angles would cost two digits at B = 256.
"""

import math
from functools import lru_cache
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor, nn

ProductPath = Literal["pointwise", "fft", "gemm3", "gemm4"]
PATHS: tuple[ProductPath, ...] = ("pointwise", "fft", "gemm3", "gemm4")
FEW_TOKENS = 4  # up to here `pointwise` is the fastest path of large blocks


def fastest_path(tokens: int, block_size: int, dtype: torch.dtype) -> ProductPath:
    """The path that was fastest for such a shape on one core of a CPU.

    A few tokens only read the spectrum, which large blocks do fastest as it lies in memory; the FFT
    wins for several tokens and large blocks in float32. Half precision it would have to leave, and
    float64 has no fast complex matrix products in torch. Gauss saves products and adds rows to E and Q, which
    cost more the larger the block.
    """
    if 0 < tokens <= FEW_TOKENS and block_size >= 256:
        return "pointwise"
    if tokens >= 8 and block_size >= 64 and dtype == torch.float32:
        return "fft"
    return "gemm3" if block_size < 128 else "gemm4"


def check_block_size(block_size: int, in_features: int, out_features: int) -> None:
    """Raise `ValueError` for sizes below 1, and a block size above both others: it would only pad."""
    limit = max(in_features, out_features)
    if min(in_features, out_features) < 1:
        raise ValueError(f"a layer {in_features} -> {out_features} holds nothing: give sizes above zero")
    if not isinstance(block_size, int) or not 1 <= block_size <= limit:
        raise ValueError(
            f"block size {block_size} does not fit a layer {in_features} -> {out_features}: use 1 to {limit}"
        )


class BlockCirculantLinear(nn.Module):
    """y = C x + bias with C made of circulant blocks; takes the place of an `nn.Linear`.

    >>> import torch
    >>> from chassis_utils import BlockCirculantLinear
    >>> layer = BlockCirculantLinear.from_linear(torch.nn.Linear(64, 32), block_size=8)
    >>> layer(torch.ones(3, 64)).shape, layer.c.numel()
    (torch.Size([3, 32]), 256)

    Shape: [..., in_features] -> [..., out_features], in the dtype of the parameters (float64,
    float32, bfloat16 or float16; the FFT works in float32 at least). Sizes that the block size
    does not divide are padded: inputs by zeros, outputs cut off.

    The spectrum of c is computed once and kept while no gradient for c is asked for. Whatever
    changes c through torch (an optimiser, `load_state_dict`, `.to`, assignment) makes it
    stale and computed again; writing through `c.data` does so behind torch's back and is
    not noticed, and a layer made inside `torch.inference_mode` computes it at every call (make it outside).
    Under `torch.compile` looking up the kept spectrum is a graph break.

    Starts at zero; filled by `from_linear`, by `closed_form` or from a state dict. Raises
    `ValueError` for a block size below 1 or above both sizes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block_size: int,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_block_size(block_size, in_features, out_features)
        self.in_features, self.out_features, self.block_size = in_features, out_features, block_size
        self.path: ProductPath | None = None  # the fastest for the shape unless set
        shape = (-(-out_features // block_size), -(-in_features // block_size), block_size)
        self.c = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self._kept: tuple[Tensor, int, dict[ProductPath, Tensor]] | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, block_size: int) -> "BlockCirculantLinear":
        """The layer nearest to `linear` in the Frobenius norm (missing inputs count as zeros), with its bias."""
        return cls.of(linear, average(linear.weight, block_size), linear.bias)

    @classmethod
    def of(
        cls, linear: nn.Linear, c: Float[Tensor, "p q block"], bias: Float[Tensor, "out"] | None
    ) -> "BlockCirculantLinear":
        """The layer with these parameters, in the sizes, dtype and device of `linear`."""
        like = linear.weight
        sizes = (linear.in_features, linear.out_features, c.shape[-1])
        layer = cls(*sizes, bias is not None, like.device, like.dtype)
        layer.load_state_dict({"c": c} if bias is None else {"c": c, "bias": bias})
        return layer

    def forward(self, x: Float[Tensor, "*batch {self.in_features}"]) -> Float[Tensor, "*batch {self.out_features}"]:
        """C x + bias; `ValueError` for another dtype or width than that of the parameters, as of `nn.Linear`."""
        if x.dtype != self.c.dtype:
            raise ValueError(f"the input is {x.dtype}, this layer {self.c.dtype}: convert one of them")
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"the input has {x.shape[-1]} features, this layer reads {self.in_features}: check its place"
            )
        _, q, block = self.c.shape
        if self.in_features < q * block:
            x = nn.functional.pad(x, (0, q * block - self.in_features))
        blocks = x.reshape(x.shape[:-1].numel(), q, block)
        path = self.path or fastest_path(len(blocks), block, x.dtype)
        y = _product(blocks, self._spectrum(path), path)[:, : self.out_features]
        return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], self.out_features)

    def to_dense(self) -> Float[Tensor, "{self.out_features} {self.in_features}"]:
        """The weight as an explicit matrix; differentiable."""
        return expand(self.c)[: self.out_features, : self.in_features]

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, block_size={self.block_size}"
        return f"{sizes}, bias={self.bias is not None}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}  # a copy counts its versions anew

    def _spectrum(self, path: ProductPath) -> Shaped[Tensor, "groups q_ p_"]:
        if torch.is_grad_enabled() and self.c.requires_grad:
            return _spectrum(self.c, path)
        kept = torch.compiler.disable(self._kept_spectrum) if torch.compiler.is_compiling() else self._kept_spectrum
        return kept(path)  # the wrapper takes a quarter of a call of one token that finds the caches cold

    def _kept_spectrum(self, path: ProductPath) -> Shaped[Tensor, "groups q_ p_"]:
        c = self.c.detach()  # held, so that no other tensor can come to lie at its address
        if c.is_inference():
            return _spectrum(c, path)  # such tensors count no versions
        if self._kept is None or not c.is_set_to(self._kept[0]) or c._version != self._kept[1]:
            self._kept = (c, c._version, {})
        spectra = self._kept[2]
        if path not in spectra:
            with torch.inference_mode(False), torch.no_grad():  # of use outside inference mode too
                spectra[path] = _spectrum(c, path)
        return spectra[path]


def expand(c: Float[Tensor, "p q block"]) -> Float[Tensor, "out in"]:
    """The explicit matrix of whole blocks; differentiable."""
    p, q, block = c.shape
    place = torch.arange(block, device=c.device)
    return c[:, :, (place[:, None] - place) % block].transpose(1, 2).reshape(p * block, q * block)


def average(weight: Float[Tensor, "out in"], block_size: int) -> Float64[Tensor, "p q {block_size}"]:
    """First columns of the circulant blocks nearest to those of `weight`: c[t] = mean_i W[i, i - t].

    The wrapped diagonals are orthogonal, so each is replaced by its mean (T. Chan 1988, the optimal
    circulant preconditioner). It keeps 1 / B of the energy of an unstructured block. Missing inputs
    count as zeros; missing outputs do not count. Raises `ValueError` for a block size that does not fit.
    """
    check_block_size(block_size, *weight.shape[::-1])
    outputs = len(weight)
    padded = nn.functional.pad(weight.detach(), [n for size in weight.shape[::-1] for n in (0, -size % block_size)])
    blocks = padded.unflatten(0, (-1, block_size)).unflatten(2, (-1, block_size)).transpose(1, 2)
    row = torch.arange(block_size, device=weight.device)
    sums = blocks[:, :, row, (row - row[:, None]) % block_size].sum(-1, dtype=torch.float64)
    sums[:-1] /= block_size
    sums[-1] /= (outputs - 1) % block_size + 1  # rows that are there
    return sums


def _spectrum(c: Float[Tensor, "p q block"], path: ProductPath) -> Shaped[Tensor, "groups q_ p_"]:
    """What the inputs of each group are multiplied by: complex c_f for an FFT, else real combinations of its parts."""
    hat = torch.fft.rfft(c.to(_working(c.dtype))).permute(2, 1, 0)
    if path == "pointwise":
        return hat.permute(1, 2, 0).contiguous()
    if path == "fft":
        return hat.contiguous()
    re, im = hat.real, hat.imag
    if path == "gemm4":
        return torch.cat([torch.cat([re, im], 2), torch.cat([-im, re], 2)], 1).to(c.dtype)
    real, paired = _frequencies(c.shape[-1])
    return torch.cat([re[real], re[paired], (im - re)[paired], (re + im)[paired]]).to(c.dtype)


def _product(
    blocks: Float[Tensor, "n q block"], spectrum: Shaped[Tensor, "groups q_ p_"], path: ProductPath
) -> Float[Tensor, "n d_y"]:
    n, q, block = blocks.shape
    if path in ("pointwise", "fft"):
        hat = torch.fft.rfft(blocks.to(_working(blocks.dtype)))
        if path == "pointwise":
            y_hat = torch.stack([(spectrum * token[:, None]).sum(0) for token in hat])
        else:
            y_hat = torch.bmm(hat.permute(2, 0, 1), spectrum).permute(1, 2, 0)
        return torch.fft.irfft(y_hat, n=block).reshape(n, -1).to(blocks.dtype)
    parts = 2 if path == "gemm4" else 1  # real and imaginary part share a product, or have their own
    groups, _, columns = spectrum.shape
    p = columns // parts
    analysis, synthesis = _transforms(block, path, blocks.dtype, blocks.device)
    hat = (analysis @ blocks.reshape(n * q, block).T).view(groups, parts, n, q).transpose(1, 2)
    product = torch.bmm(hat.reshape(groups, n, parts * q), spectrum)
    rows = product.view(groups, n, parts, p).transpose(1, 2).reshape(groups * parts, n * p)
    return (rows.T @ synthesis).view(n, p * block)


@torch.compiler.assume_constant_result
def _transforms(
    block_size: int, path: ProductPath, dtype: torch.dtype, device: torch.device
) -> tuple[Float[Tensor, "rows {block_size}"], Float[Tensor, "rows {block_size}"]]:
    """E and Q: rows that take a block to its (combined) frequencies, and back."""
    return _cached_transforms(block_size, path, dtype, device)  # torch.compile looks through a bare lru_cache


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # whoever asks first: inference tensors could never be trained through
def _cached_transforms(
    block_size: int, path: ProductPath, dtype: torch.dtype, device: torch.device
) -> tuple[Float[Tensor, "rows {block_size}"], Float[Tensor, "rows {block_size}"]]:
    frequency = torch.arange(block_size // 2 + 1, dtype=torch.float64)
    angle = torch.outer(frequency, torch.arange(block_size, dtype=torch.float64)) % block_size
    angle *= 2 * math.pi / block_size
    re, im = torch.cos(angle), -torch.sin(angle)
    real, paired = _frequencies(block_size)
    twice = torch.full((len(frequency), 1), 2 / block_size, dtype=torch.float64)  # a frequency and its conjugate
    twice[real] /= 2
    back_re, back_im = twice * re, twice * im
    if path == "gemm4":
        analysis, synthesis = (torch.stack(pair, 1).flatten(0, 1) for pair in ((re, im), (back_re, back_im)))
    else:
        analysis = torch.cat([re[real], (re + im)[paired], re[paired], im[paired]])
        synthesis = torch.cat([back_re[real], (back_re + back_im)[paired], back_im[paired], -back_re[paired]])
    return analysis.to(device, dtype), synthesis.to(device, dtype)


def _frequencies(block_size: int) -> tuple[list[int], list[int]]:
    """Those at which every transform is real (the mean, and the alternating one of even sizes), and the others."""
    real = [0, block_size // 2] if block_size % 2 == 0 else [0]
    return real, list(range(1, (block_size + 1) // 2))


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
