"""The closed forms are the minimisers: against least squares over explicit matrices, from the raw data."""

from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import direct, padded, regression_data, seeds
from torch import Tensor, nn

from chassis_utils.circulant.closed_form import (
    CirculantMoments,
    activation_aware,
    choose_circulant_penalty,
    squared_error,
)
from chassis_utils.circulant.layer import BlockCirculantLinear, average
from chassis_utils.circulant.low_rank import LowRankLinear, equal_rank, low_rank, low_rank_aware
from chassis_utils.linalg.moments import Moments
from chassis_utils.linalg.regression import reduced_rank

# inputs, outputs, block size
SIZES = [(6, 4, 1), (6, 4, 2), (6, 9, 3), (8, 4, 4), (4, 8, 4), (5, 10, 5), (7, 6, 3), (10, 7, 4), (3, 5, 5), (8, 3, 4)]
shapes = st.sampled_from(SIZES)
penalties = st.sampled_from([1e-3, 1.0, 50.0])
LARGE = 128  # width of the data that the orderings are shown on


def linear_from(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """An `nn.Linear` with this weight, in its dtype."""
    linear = nn.Linear(*weight.shape[::-1], bias=bias is not None, dtype=weight.dtype)
    linear.weight.data = weight
    if bias is not None:
        linear.bias.data = bias
    return linear


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(n: int, d: int, seed: int = 0) -> Tensor:
    """Inputs whose covariance has eigenvalues k^-1.5 in directions that no block knows of."""
    rotation = torch.linalg.qr(normal(d, d, seed=99)).Q  # of all seeds alike
    return normal(n, d, seed=seed) * torch.arange(1, d + 1, dtype=torch.float64) ** -0.75 @ rotation


def case(sizes: tuple[int, int, int], seed: int, n: int = 40) -> tuple[nn.Linear, Tensor, Tensor]:
    """A dense layer, inputs with large means and outputs that are not exactly its own."""
    d_x, d_y, _ = sizes
    x, noise = regression_data(seed, n=n, d_x=d_x, d_y=d_y)
    linear = linear_from(normal(d_y, d_x, seed=seed))
    return linear, x, linear(x).detach() + noise / 10


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance * float(b.detach().abs().max()))


@given(seeds, shapes, penalties)
def test_activation_aware_is_least_squares_over_explicit_matrices(
    seed: int, sizes: tuple[int, int, int], penalty: float
) -> None:
    linear, x, y = case(sizes, seed)
    layer = activation_aware(linear, CirculantMoments.of(x, y, sizes[2]), penalty)
    c, bias = direct(linear, x, y, sizes[2], penalty)
    assert_close(layer.c, c)
    assert_close(layer.bias, bias)


@pytest.mark.parametrize("sizes", SIZES)
def test_without_a_ridge_no_parameter_can_be_moved_to_gain(sizes: tuple[int, int, int]) -> None:
    linear, x, y = case(sizes, 0)
    layer = activation_aware(linear, CirculantMoments.of(x, y, sizes[2]), 0.0)
    c, bias = direct(linear, x, y, sizes[2], 0.0)
    best = BlockCirculantLinear.of(linear, c, bias)
    assert_close(layer(x), best(x), 1e-8)


@pytest.mark.parametrize("block", [2, 3, 4])
def test_inputs_that_repeat_leave_no_choice_to_noise(block: int) -> None:
    linear, x, y = case((2 * block, 3 * block, block), 0)
    once = activation_aware(linear, CirculantMoments.of(x, y, block), 0.0)
    twice = linear_from(torch.cat([linear.weight, linear.weight], 1).detach() / 2)
    doubled = torch.cat([x, x], 1)  # singular at every frequency
    found = activation_aware(twice, CirculantMoments.of(doubled, y, block), 0.0)
    assert_close(found.c, torch.cat([once.c, once.c], 1) / 2, 1e-6)
    assert_close(found(doubled), once(x), 1e-8)


@given(seeds, shapes, st.integers(1, 50), st.integers(1, 39))
def test_moments_stream_merge_and_subtract(seed: int, sizes: tuple[int, int, int], batch: int, cut: int) -> None:
    _, x, y = case(sizes, seed)
    of = [CirculantMoments.of(x[a], y[a], sizes[2]) for a in torch.arange(40).split(batch)]
    whole = CirculantMoments.of(x, y, sizes[2])
    rest = whole - CirculantMoments.of(x[:cut], y[:cut], sizes[2])
    for found, exact in ((reduce(add, of), whole), (rest, CirculantMoments.of(x[cut:], y[cut:], sizes[2]))):
        for name in ("n", "y_square", "x_sum", "y_sum", "xx", "xy"):
            scale = float(getattr(whole, name).abs().sum())  # 0 without a whole block of outputs
            torch.testing.assert_close(getattr(found, name), getattr(exact, name), rtol=0, atol=1e-12 * scale)
        if exact.rest is not None:
            torch.testing.assert_close(found.rest.xy, exact.rest.xy, rtol=1e-9, atol=1e-9)


@given(seeds, shapes.filter(lambda sizes: sizes[0] % sizes[2] == sizes[1] % sizes[2] == 0))
def test_the_form_with_covariances(seed: int, sizes: tuple[int, int, int]) -> None:
    d_x, _, block = sizes
    linear, x, _ = case(sizes, seed)
    x = x - x.mean(0)  # so that no bias is wanted
    covariance = x.T @ x

    def projected(matrix: Tensor) -> Tensor:
        return BlockCirculantLinear.from_linear(linear_from(matrix), block).to_dense().detach()

    layer = activation_aware(linear, CirculantMoments.of(x, linear(x).detach(), block), 0.3)
    eye = torch.eye(d_x, dtype=torch.float64)
    weight = linear.weight.detach()
    cross = projected(weight @ covariance) + 0.3 * projected(weight)
    assert_close(layer.to_dense(), cross @ torch.linalg.inv(projected(covariance) + 0.3 * eye), 1e-8)


@pytest.mark.parametrize("sizes", SIZES)
def test_white_inputs_and_strong_pulls_lead_to_averaging(sizes: tuple[int, int, int]) -> None:
    linear, x, y = case(sizes, 0)
    averaged = average(linear.weight, sizes[2])
    white = torch.linalg.qr(x - x.mean(0)).Q
    if sizes[0] % sizes[2] == 0:  # padding is not white
        moments = CirculantMoments.of(white + 3, linear(white).detach(), sizes[2])
        assert_close(activation_aware(linear, moments, 0.0).c, averaged)
    assert_close(activation_aware(linear, CirculantMoments.of(x, y, sizes[2]), 1e16).c, averaged)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_planted_layer_is_found_from_its_activations(sizes: tuple[int, int, int]) -> None:
    planted = BlockCirculantLinear(*sizes, dtype=torch.float64)
    planted.load_state_dict({"c": normal(*planted.c.shape), "bias": normal(sizes[1])})
    dense, x, _ = case(sizes, 1)
    moments = CirculantMoments.of(x, planted(x).detach(), sizes[2])
    found = activation_aware(dense, moments, 0.0)
    assert_close(found(x), planted(x), 1e-8)
    assert squared_error(moments, found) < 1e-14 * float(moments.y_square)


def test_later_layers_make_up_for_earlier_ones() -> None:
    sizes = (32, 48, 4)
    linear, teacher, _ = case(sizes, 0, n=200)
    student = teacher + 0.5 * teacher @ normal(32, 32, seed=5) / 32**0.5 + 1  # what a patched layer before left
    y = linear(teacher).detach()
    seen = CirculantMoments.of(student, y, 4)
    layer = activation_aware(linear, seen, 0.1)
    c, bias = direct(linear, student, y, 4, 0.1)
    assert_close(layer.c, c, 1e-8)
    assert_close(layer.bias, bias, 1e-8)
    blind = activation_aware(linear, CirculantMoments.of(teacher, y, 4), 0.1)
    assert squared_error(seen, layer) < 0.9 * squared_error(seen, blind)


@given(seeds, shapes, st.booleans())
def test_squared_error_from_moments_is_the_sum_over_samples(seed: int, sizes, with_bias: bool) -> None:
    _, x, y = case(sizes, seed)
    other, _, _ = case(sizes, seed + 1)
    bias = normal(sizes[1], seed=seed) if with_bias else None
    layer = BlockCirculantLinear.of(other, average(other.weight, sizes[2]), bias)
    exact = float((layer(x) - y).detach().square().sum())
    assert squared_error(CirculantMoments.of(x, y, sizes[2]), layer) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("block", [8, 16, 32])
def test_on_correlated_inputs_it_beats_averaging_on_held_out_ones(block: int) -> None:
    linear = linear_from(normal(2 * LARGE, LARGE))
    folds = [CirculantMoments.of(x, linear(x).detach(), block) for x in (correlated(300, LARGE, k) for k in range(3))]
    x = correlated(1000, LARGE, seed=50)
    held_out = CirculantMoments.of(x, linear(x).detach(), block)
    penalty, _ = choose_circulant_penalty(linear, folds)
    aware = squared_error(held_out, activation_aware(linear, reduce(add, folds), penalty))
    averaged = squared_error(held_out, BlockCirculantLinear.from_linear(linear, block))
    assert averaged > 0.7 * float(held_out.y_square)  # next to nothing is left of the layer
    assert aware < 0.6 * averaged


@pytest.mark.parametrize("sizes", [(8, 12, 4), (6, 9, 3), (10, 7, 4)])
def test_the_chosen_ridge_has_the_least_error_on_folds_left_out(sizes: tuple[int, int, int]) -> None:
    linear, x, y = case(sizes, 3, n=30)
    block, x_whole = sizes[2], padded(x, sizes[2])
    folds = [CirculantMoments.of(x[k::3], y[k::3], block) for k in range(3)]
    relative = (1e-6, 1e-3, 1e-1, 1.0, 100.0)
    chosen, errors = choose_circulant_penalty(linear, folds, relative)
    covariance = np.cov(x_whole.numpy(), rowvar=False) * (len(x) - 1)
    mean_eigenvalue = np.trace(covariance) / len(covariance)
    assert list(errors) == pytest.approx([factor * mean_eigenvalue for factor in relative])
    for penalty, error in errors.items():
        total = 0.0
        for k in range(3):
            rest = [j for j in range(30) if j % 3 != k]
            layer = BlockCirculantLinear.of(linear, *direct(linear, x[rest], y[rest], block, penalty))
            total += float((layer(x[k::3]) - y[k::3]).detach().square().sum())
        assert error == pytest.approx(total / 30, rel=1e-7)
    assert errors[chosen] == min(errors.values())


def test_a_target_that_any_ridge_meets_takes_the_strongest() -> None:
    layer = BlockCirculantLinear(8, 12, 4, dtype=torch.float64)
    layer.c.data = normal(*layer.c.shape)
    linear = linear_from(layer.to_dense().detach())
    folds = [CirculantMoments.of(x, linear(x).detach(), 4) for x in (normal(20, 8, seed=k) for k in range(2))]
    chosen, errors = choose_circulant_penalty(linear, folds)
    assert chosen == max(errors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_activations_are_upcast_first(dtype: torch.dtype) -> None:
    _, x, y = case((8, 12, 4), 0)
    x, y = x.to(dtype), y.to(dtype)
    found, exact = CirculantMoments.of(x, y, 4), CirculantMoments.of(x.double(), y.double(), 4)
    assert torch.equal(found.xy, exact.xy) and torch.equal(found.y_square, exact.y_square)


def test_a_layer_comes_in_the_dtype_of_the_dense_one() -> None:
    linear, x, y = case((8, 12, 4), 0)
    layer = activation_aware(linear.to(torch.bfloat16), CirculantMoments.of(x, y, 4), 1.0)
    assert layer.c.dtype == layer.bias.dtype == torch.bfloat16
    assert low_rank(linear, 2).up.dtype == torch.bfloat16


def test_what_cannot_be_fitted_says_why() -> None:
    linear, x, y = case((8, 12, 4), 0)
    with pytest.raises(ValueError, match="2 samples do not determine 3 unknowns without a ridge"):
        activation_aware(linear, CirculantMoments.of(x[:2], y[:2], 4), 0.0)
    with pytest.raises(ValueError, match=r"ridge -1\.0 is negative"):
        activation_aware(linear, CirculantMoments.of(x, y, 4), -1.0)
    with pytest.raises(ValueError, match="moments of block sizes 4 and 2 do not add"):
        CirculantMoments.of(x, y, 4) + CirculantMoments.of(x, y, 2)
    with pytest.raises(ValueError, match="block size 13 does not fit a layer 8 -> 12: use 1 to 12"):
        CirculantMoments.of(x, y, 13)
    y[7, 1] = float("nan")
    with pytest.raises(ValueError, match="row 7 is not finite: look at the activations of that token"):
        CirculantMoments.of(x, y, 4)


@given(seeds, st.integers(0, 4))
def test_low_rank_is_the_nearest_of_its_rank(seed: int, rank: int) -> None:
    linear = linear_from(normal(4, 6, seed=seed), normal(4, seed=seed))
    layer = low_rank(linear, rank)
    singular = torch.linalg.svdvals(linear.weight.detach())
    left_over = (layer.up @ layer.down - linear.weight).detach().square().sum()
    assert float(left_over) == pytest.approx(float(singular[rank:].square().sum()), abs=1e-9)
    assert torch.equal(layer.bias, linear.bias)
    x = normal(2, 3, 6)
    torch.testing.assert_close(layer(x), x @ (layer.up @ layer.down).T + layer.bias)


@pytest.mark.parametrize("rank", [0, 1, 4, 16])
def test_activation_aware_low_rank_is_reduced_rank_regression(rank: int) -> None:
    linear = linear_from(normal(48, 32))
    x = correlated(300, 32) + 2
    y = linear(x).detach()
    moments = Moments.of(x, y)
    layer = low_rank_aware(linear, moments, 1e-3, rank)
    assert_close(layer(x), reduced_rank(moments, 1e-3).at(rank)(x))
    plain, aware = (float((one(x) - y).detach().square().sum()) for one in (low_rank(linear, rank), layer))
    assert aware < plain


def test_equal_rank_has_at_most_as_many_weights() -> None:
    for sizes in ((4096, 11008, 256), (256, 688, 8), (688, 256, 16), (100, 70, 7)):
        linear = nn.Linear(*sizes[:2], device="meta")
        count = BlockCirculantLinear(*sizes).c.numel()
        rank = equal_rank(linear, sizes[2])
        assert rank * sum(sizes[:2]) <= count < (rank + 1) * sum(sizes[:2])
    assert equal_rank(nn.Linear(8, 8), 8) == 1


def test_rank_zero_is_the_bias_alone() -> None:
    x = normal(3, 6)
    assert not LowRankLinear(6, 4, 0, bias=False).to(x)(x).any()
    linear = linear_from(normal(4, 6), normal(4))
    assert torch.equal(low_rank(linear, 0)(x), linear.bias.expand(3, 4))


@pytest.mark.parametrize("rank", [-1, 5])
def test_a_rank_that_does_not_fit_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} does not fit a layer 6 -> 4: use 0 to 4"):
        LowRankLinear(6, 4, rank)
