"""Every path is the explicit matrix, its gradient is that matrix's, and a kept spectrum is never a stale one."""

import copy
import io
from collections.abc import Callable

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from samples import block_circulant, seeds
from scipy.linalg import lstsq
from torch import Tensor, nn

from chassis_utils.circulant import layer as layer_module
from chassis_utils.circulant.layer import PATHS, BlockCirculantLinear, ProductPath, average, fastest_path

sizes = st.integers(1, 300)
paths = pytest.mark.parametrize("path", PATHS)


def drawn(sizes: tuple[int, int, int], seed: int = 0, dtype: torch.dtype = torch.float32) -> BlockCirculantLinear:
    """A layer (inputs, outputs, block size) with random parameters."""
    layer = BlockCirculantLinear(*sizes, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    return layer


def inputs(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(layer: BlockCirculantLinear, x: Tensor) -> Tensor:
    """What the layer must give, by its explicit matrix in float64."""
    return x.double() @ layer.to_dense().double().T + layer.bias.double()


def relative(found: Tensor, exact: Tensor) -> float:
    """Norm of the error over the norm of what is exact."""
    return float((found.double() - exact).detach().norm() / exact.detach().norm())


@given(seeds, st.integers(1, 5), st.integers(1, 5), st.integers(1, 32))
def test_a_planted_matrix_is_recovered(seed: int, p: int, q: int, block: int) -> None:
    c = inputs(p, q, block, seed=seed)
    linear = nn.Linear(q * block, p * block)
    linear.weight.data = torch.from_numpy(block_circulant(c))
    layer = BlockCirculantLinear.from_linear(linear, block)
    torch.testing.assert_close(layer.c.detach(), c, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.to_dense(), linear.weight, rtol=1e-6, atol=1e-6)
    x = inputs(3, q * block)
    assert relative(layer(x), linear(x).double()) < 1e-5


@pytest.mark.parametrize("block", [3, 16, 64])
def test_read_as_first_rows_the_parameters_give_another_matrix(block: int) -> None:
    c = inputs(3, 2, block)
    planted, transposed = (
        block_circulant(c),
        block_circulant(c.roll(-1, 2).flip(2)),
    )  # circulant(c).T = circulant of c reversed
    np.testing.assert_array_equal(transposed[:block, :block], planted[:block, :block].T)
    layer = BlockCirculantLinear.of(nn.Linear(2 * block, 3 * block), average(torch.from_numpy(transposed), block), None)
    assert np.linalg.norm(layer.to_dense().detach().numpy() - planted) > 0.5 * np.linalg.norm(planted)


def check_all_paths(layer: BlockCirculantLinear, x: Tensor, tolerance: float = 1e-5) -> None:
    exact = dense(layer, x)
    for path in (*PATHS, None):
        layer.path = path
        assert relative(layer(x), exact) < tolerance, path


@given(seeds, sizes, sizes, st.integers(1, 256), st.integers(1, 12))
def test_every_path_is_the_explicit_matrix(seed: int, d_x: int, d_y: int, block: int, tokens: int) -> None:
    assume(block <= max(d_x, d_y))
    layer = drawn((d_x, d_y, block), seed)
    check_all_paths(layer, inputs(tokens, d_x, seed=seed))
    np.testing.assert_array_equal(layer.to_dense().detach().numpy(), block_circulant(layer.c)[:d_y, :d_x])


@pytest.mark.parametrize("block", [*range(1, 10), 15, 16, 31, 32, 63, 64, 65, 100, 127, 128, 129, 255, 256])
def test_every_block_size_with_sizes_that_divide_and_that_do_not(block: int) -> None:
    check_all_paths(drawn((2 * block, 3 * block, block)), inputs(16, 2 * block))
    check_all_paths(drawn((block + 1, 2 * block + 1, block)), inputs(2, 3, block + 1))


@paths
def test_float64_is_exact_to_rounding(path: ProductPath) -> None:
    layer = drawn((512, 768, 256), dtype=torch.float64)
    layer.path = path
    x = inputs(2, 512, dtype=torch.float64)
    assert relative(layer(x), dense(layer, x)) < 1e-14


@paths
def test_no_token_gives_no_output(path: ProductPath) -> None:
    layer = drawn((6, 8, 2))
    layer.path = path if path.startswith("gemm") else None  # torch has no FFT of nothing
    assert layer(torch.empty(2, 0, 6)).shape == (2, 0, 8)


@paths
@pytest.mark.parametrize("sizes", [(6, 10, 1), (6, 9, 3), (8, 12, 4), (7, 10, 4), (13, 5, 7)])
def test_gradients_are_those_of_the_explicit_matrix(path: ProductPath, sizes: tuple[int, int, int]) -> None:
    layer = drawn(sizes, dtype=torch.float64)
    layer.path = path
    x = inputs(2, 5, sizes[0], dtype=torch.float64).requires_grad_()
    weights = inputs(2, 5, sizes[1], seed=2, dtype=torch.float64)
    wanted = [x, *layer.parameters()]
    found = torch.autograd.grad((layer(x).sin() * weights).sum(), wanted)
    exact = torch.autograd.grad((dense(layer, x).sin() * weights).sum(), wanted)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@given(seeds, st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
def test_averaging_is_the_nearest_by_least_squares(seed: int, d_x: int, d_y: int, block: int) -> None:
    assume(block <= max(d_x, d_y))
    weight = inputs(d_y, d_x, seed=seed, dtype=torch.float64)
    c = average(weight, block)
    basis = np.stack([block_circulant(one.view(c.shape))[:d_y].ravel() for one in torch.eye(c.numel())], 1)
    padded = nn.functional.pad(weight, (0, -d_x % block))
    np.testing.assert_allclose(c.flatten(), lstsq(basis, padded.flatten())[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", [4, 16, 64])
def test_averaging_keeps_one_part_in_b_of_an_unstructured_weight(block: int) -> None:
    weight = inputs(256, 256)
    linear = nn.Linear(256, 256)
    linear.weight.data = weight
    error = relative(BlockCirculantLinear.from_linear(linear, block).to_dense(), weight.double())
    assert error == pytest.approx((1 - 1 / block) ** 0.5, abs=0.01)


def step(layer: BlockCirculantLinear) -> None:
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(inputs(3, 8)).square().sum().backward()
    optimiser.step()


def assign(layer: BlockCirculantLinear) -> None:
    layer.c = nn.Parameter(layer.c.detach() + 1)


def swap_storage(layer: BlockCirculantLinear) -> None:
    layer.c.data = layer.c.detach() + 1


CHANGES: dict[str, Callable[[BlockCirculantLinear], object]] = {
    "optimiser": step,
    "load_state_dict": lambda layer: layer.load_state_dict(drawn((8, 12, 4), seed=9).state_dict()),
    "load and assign": lambda layer: layer.load_state_dict(drawn((8, 12, 4), seed=9).state_dict(), assign=True),
    "in place": lambda layer: torch.no_grad()(layer.c.add_)(1.0),
    "assignment": assign,
    "storage": swap_storage,
    "there and back": lambda layer: layer.to(torch.bfloat16).to(torch.float32),
    "float64": lambda layer: layer.double().requires_grad_(False).c.mul_(2.0),
    "frozen": lambda layer: layer.requires_grad_(False).c.mul_(2.0),
}


@paths
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_kept_spectrum_follows_the_parameters(change, mode, path: ProductPath) -> None:
    layer = drawn((8, 12, 4))
    layer.path = path
    with mode():
        before = layer(inputs(3, 8))
    change(layer)
    x = inputs(3, 8).to(layer.c.dtype)
    with mode():
        after = layer(x)
    assert relative(after, dense(layer, x)) < 1e-5
    assert relative(before, dense(layer, x)) > 1e-4


@paths
def test_the_spectrum_is_computed_once_in_use_and_anew_in_training(
    path: ProductPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0
    original = layer_module._spectrum

    def counted(*arguments: object) -> Tensor:
        nonlocal count
        count += 1
        return original(*arguments)

    monkeypatch.setattr(layer_module, "_spectrum", counted)
    layer = drawn((8, 12, 4))
    layer.path = path
    with torch.no_grad():
        for _ in range(3):
            layer(inputs(3, 8))
    assert count == 1
    for _ in range(3):
        layer(inputs(3, 8))
    assert count == 4


def stored(layer: BlockCirculantLinear) -> BlockCirculantLinear:
    """Written as a whole and read back."""
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, stored])
@pytest.mark.parametrize("versions", range(3))
def test_a_copy_of_a_changed_layer_does_not_inherit_the_spectrum_of_before(duplicate, versions: int) -> None:
    layer = drawn((8, 12, 4))
    with torch.no_grad():
        for _ in range(versions):
            layer.c.add_(1.0)
        layer(inputs(3, 8))
        layer.c.add_(1.0)
        other = duplicate(layer)  # whose parameters count their versions from the start
        assert relative(other(inputs(3, 8)), dense(layer, inputs(3, 8))) < 1e-5


@paths
def test_use_in_inference_mode_does_not_stand_in_the_way_of_training(path: ProductPath) -> None:
    layer_module._cached_transforms.cache_clear()
    layer = drawn((8, 12, 4))
    layer.path = path
    with torch.inference_mode():
        layer(inputs(3, 8))
    layer(inputs(3, 8)).sum().backward()
    assert layer.c.grad is not None
    layer.requires_grad_(False)
    x = inputs(3, 8).requires_grad_()
    layer(x).sum().backward()  # through the kept spectrum
    torch.testing.assert_close(x.grad, layer.to_dense().sum(0).expand(3, 8), rtol=1e-5, atol=1e-5)


def test_a_layer_made_in_inference_mode_keeps_nothing() -> None:
    with torch.inference_mode():
        layer = drawn((8, 12, 4))
        layer(inputs(3, 8))
        layer.c.add_(1.0)
        assert relative(layer(inputs(3, 8)), dense(layer, inputs(3, 8))) < 1e-5


@paths
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_errs_by_its_rounding(path: ProductPath, dtype: torch.dtype, tolerance: float) -> None:
    layer = drawn((512, 768, 128)).to(dtype)
    layer.path = path
    x = inputs(5, 512, dtype=dtype)
    with torch.no_grad():
        y = layer(x)
    assert y.dtype == dtype
    assert relative(y, dense(layer, x)) < tolerance


@paths
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_it_is_the_same_layer_in_training_and_in_use(
    path: ProductPath, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the shape checks of the tests do not compile
    torch._dynamo.reset()
    layer = drawn((8, 12, 4))
    layer.path = path
    x = inputs(3, 8)
    whole = torch.compile(layer, backend=backend, fullgraph=True)
    whole(x).sum().backward()
    grad, layer.c.grad = layer.c.grad, None
    layer(x).sum().backward()
    torch.testing.assert_close(grad, layer.c.grad)
    used = torch.compile(layer, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            assert relative(used(x), dense(layer, x)) < 1e-5
            layer.c.mul_(2.0)


@pytest.mark.parametrize("path", ["gemm3", "gemm4"])
def test_compiled_the_transforms_are_constants(path: ProductPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch._dynamo.reset()
    layer = drawn((8, 12, 4))
    layer.path = path
    code = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable:
        code.append(graph.code)
        return graph.forward

    torch.compile(layer, backend=backend, fullgraph=True)(inputs(3, 8))
    assert "bmm" in code[0] and "cos" not in code[0]


def test_a_state_dict_holds_the_parameters_alone() -> None:
    layer, other = drawn((7, 10, 4)), drawn((7, 10, 4), seed=5)
    with torch.no_grad():
        layer(inputs(1, 7))
        assert set(layer.state_dict()) == {"c", "bias"}
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(inputs(1, 7)), layer(inputs(1, 7)))
    assert repr(layer) == "BlockCirculantLinear(in_features=7, out_features=10, block_size=4, bias=True)"


def test_a_layer_keeps_bias_and_dtype_of_the_dense_one() -> None:
    linear = nn.Linear(8, 12, dtype=torch.bfloat16)
    layer = BlockCirculantLinear.from_linear(linear, 4)
    assert layer.c.dtype == torch.bfloat16 and torch.equal(layer.bias, linear.bias)
    layer.bias.data.zero_()
    assert linear.bias.any()  # a copy, not the same
    assert BlockCirculantLinear.from_linear(nn.Linear(8, 12, bias=False), 4).bias is None


@pytest.mark.parametrize("path", [*PATHS, None])
def test_another_dtype_is_refused_on_every_path(path: ProductPath | None) -> None:
    layer = drawn((128, 64, 64))
    layer.path = path
    for tokens in (1, 16):  # of which the fastest path is another
        with pytest.raises(ValueError, match=r"the input is torch\.bfloat16, this layer torch\.float32: convert one"):
            layer(inputs(tokens, 128, dtype=torch.bfloat16))


@pytest.mark.parametrize("block", [0, -4, 33])
def test_a_block_size_that_does_not_fit_is_refused(block: int) -> None:
    with pytest.raises(ValueError, match=f"block size {block} does not fit a layer 16 -> 32: use 1 to 32"):
        BlockCirculantLinear(16, 32, block)
    with pytest.raises(ValueError, match=f"block size {block} does not fit a layer 16 -> 32: use 1 to 32"):
        BlockCirculantLinear.from_linear(nn.Linear(16, 32), block)


def test_the_fft_is_for_many_float32_tokens_in_large_blocks() -> None:
    assert fastest_path(512, 128, torch.float32) == "fft"
    assert {fastest_path(1, block, torch.float32) for block in (4, 64)} == {"gemm3"}
    assert fastest_path(512, 256, torch.bfloat16) == "gemm4"


def test_a_few_tokens_in_large_blocks_take_the_plain_product() -> None:
    assert {fastest_path(tokens, 256, torch.float32) for tokens in (1, 4)} == {"pointwise"}
    assert fastest_path(0, 128, torch.float32) == "gemm4"  # torch has no FFT of nothing
