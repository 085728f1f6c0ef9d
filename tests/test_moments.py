"""Moments add: in any batches, order and grouping, and a fold comes off by subtraction."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import regression_data, seeds

from chassis_utils.linalg.moments import Moments, by_fold, gram_matrix, merge
from chassis_utils.linalg.regression import ridge


def assert_same(a: Moments, b: Moments, rtol: float = 1e-12) -> None:
    for field in fields(Moments):
        one, other = getattr(a, field.name), getattr(b, field.name)
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * float(other.abs().max()))


@given(seeds, st.integers(1, 50))
def test_streaming_in_batches_gives_the_moments_of_all(seed: int, batch: int) -> None:
    x, y = regression_data(seed)
    whole = Moments.of(x, y)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chassis_utils.linalg.moments.ROWS", batch)
        assert_same(Moments.of(x, y), whole)


@given(seeds, st.integers(1, 5))
def test_a_gram_matrix_is_the_same_and_symmetric_whatever_its_blocks_of_columns(seed: int, width: int) -> None:
    x, _ = regression_data(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chassis_utils.linalg.moments.COLUMNS", width)
        found = gram_matrix(x)
    torch.testing.assert_close(found, x.T @ x)
    assert torch.equal(found, found.T)


@given(seeds, st.data())
def test_merging_any_grouping_in_any_order_gives_the_whole(seed: int, data: st.DataObject) -> None:
    x, y = regression_data(seed, n=12)
    order = data.draw(st.permutations(range(12)))
    cuts = sorted(data.draw(st.sets(st.integers(1, 11))))
    parts = torch.tensor_split(torch.tensor(order), cuts)
    assert_same(merge(Moments.of(x[part], y[part]) for part in parts), Moments.of(x, y))


@given(seeds, st.integers(2, 6))
def test_subtracting_a_fold_leaves_the_moments_of_the_rest(seed: int, count: int) -> None:
    x, y = regression_data(seed)
    labels = torch.arange(len(x)) % count
    folds = by_fold(x, y, labels.tolist())
    for k, fold in enumerate(folds):
        assert_same(merge(folds) - fold, Moments.of(x[labels != k], y[labels != k]))


@given(seeds)
def test_centred_products_are_covariances_times_degrees_of_freedom(seed: int) -> None:
    x, y = regression_data(seed)
    moments = Moments.of(x, y)
    cov = 39 * np.cov(x.numpy(), y.numpy(), rowvar=False)
    xy = moments.xy_centred.numpy()
    found = np.block([[moments.xx_centred.numpy(), xy], [xy.T, moments.yy_centred.numpy()]])
    np.testing.assert_allclose(found, cov, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_inputs_are_upcast_before_the_product(dtype: torch.dtype) -> None:
    x, y = (rows.to(dtype) for rows in regression_data(0))
    assert_same(Moments.of(x, y), Moments.of(x.double(), y.double()), rtol=0)


def test_float32_states_of_condition_3e4_give_the_float64_coefficients() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(500, 20, generator=generator, dtype=torch.float64)).Q
    q = q - q.mean(0)
    rotation = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64)).Q
    x = (q * torch.logspace(0, -4.5, 20, dtype=torch.float64) @ rotation).float()  # condition 3e4
    y = x @ torch.randn(20, 3, generator=generator) + 1e-3 * torch.randn(500, 3, generator=generator)
    centred = [rows.double() - rows.double().mean(0) for rows in (x, y)]
    exact = np.linalg.lstsq(*centred, rcond=None)[0]
    error = np.linalg.norm(ridge(Moments.of(x, y), 0.0).weight - exact) / np.linalg.norm(exact)
    assert error < 1e-4
    gram, cross = x.T @ x, x.T @ y
    trap = np.linalg.norm(torch.linalg.solve(gram, cross).double() - exact) / np.linalg.norm(exact)
    assert trap > 100 * error  # the same in float32 has lost its digits


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_named(bad: float) -> None:
    x, y = regression_data(0)
    y[7, 1] = bad
    with pytest.raises(ValueError, match="row 7 of the targets is not finite"):
        Moments.of(x, y)
