"""The closed forms are the minimisers: against direct solves from the raw data, in numpy."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from samples import regression_data, seeds, semidefinite
from scipy.linalg import lstsq
from torch import Tensor

from chassis_utils.linalg.moments import Moments, by_fold, merge
from chassis_utils.linalg.regression import (
    LinearMap,
    choose_penalty,
    choose_rank,
    mean_eigenvalue,
    reduced_rank,
    ridge,
    solve_symmetric,
    squared_error,
    vocabulary_metric,
)
from chassis_utils.metrics import kl_divergence

penalties = st.floats(1e-6, 1e4)


def augmented(x: Tensor, y: Tensor, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """The least-squares problem whose plain solution is the centred ridge."""
    x, y = x - x.mean(0), y - y.mean(0)
    d = x.shape[1]
    return np.vstack([x, penalty**0.5 * np.eye(d)]), np.vstack([y, np.zeros((d, y.shape[1]))])


def direct_ridge(x: Tensor, y: Tensor, penalty: float) -> LinearMap:
    """Ridge by least squares on the augmented problem, never through a Gram matrix."""
    weight = torch.from_numpy(lstsq(*augmented(x, y, penalty))[0])
    return LinearMap(weight, y.mean(0) - x.mean(0) @ weight)


def objective(moments: Moments, fitted: LinearMap, penalty: float, metric: Tensor) -> float:
    """What reduced-rank regression minimises."""
    shrinkage = (fitted.weight.T @ fitted.weight * metric).sum()
    return float(squared_error(moments, fitted, metric) + penalty * shrinkage)


@given(seeds, penalties)
def test_ridge_is_least_squares_on_augmented_rows(seed: int, penalty: float) -> None:
    x, y = regression_data(seed)
    found, direct = ridge(Moments.of(x, y), penalty), direct_ridge(x, y, penalty)
    torch.testing.assert_close(found(x), direct(x), rtol=1e-7, atol=1e-7)


@given(seeds, penalties)
def test_the_gradient_of_the_ridge_objective_is_zero(seed: int, penalty: float) -> None:
    x, y = regression_data(seed)
    found = ridge(Moments.of(x, y), penalty)
    weight, bias = (part.clone().requires_grad_() for part in (found.weight, found.bias))
    ((x @ weight + bias - y).square().sum() + penalty * weight.square().sum()).backward()
    scale = float((x.T @ y).abs().max())
    assert max(float(part.grad.abs().max()) for part in (weight, bias)) < 1e-9 * scale


@given(seeds, st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_large_means_move_the_intercept_alone(seed: int, shift_x: float, shift_y: float) -> None:
    x, y = regression_data(seed)
    here, there = ridge(Moments.of(x, y), 1.0), ridge(Moments.of(x + shift_x, y + shift_y), 1.0)
    torch.testing.assert_close(there.weight, here.weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(there(x + shift_x), here(x) + shift_y, rtol=1e-5, atol=1e-5)


@given(seeds)
@example(3304)  # centring leaves rounding beyond what the solver takes for zero
def test_without_a_ridge_equal_inputs_share_their_weight(seed: int) -> None:
    x, y = regression_data(seed)
    doubled = torch.cat([x, x], dim=1)  # a singular Gram matrix
    least_norm = direct_ridge(x, y, 0.0).weight / 2
    found = ridge(Moments.of(doubled, y), 0.0).weight
    torch.testing.assert_close(found, torch.cat([least_norm, least_norm]), rtol=1e-5, atol=1e-5)


def test_a_negative_ridge_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ridge -0\.5 is negative: use zero or more"):
        ridge(Moments.of(*regression_data(0)), -0.5)


@pytest.mark.parametrize("fit", [ridge, reduced_rank])
def test_fewer_samples_than_unknowns_need_a_ridge(fit) -> None:
    moments = Moments.of(*regression_data(0, n=5))
    sentence = (
        r"^5 samples do not determine 6 unknowns without a ridge: collect more prompts or set a ridge above zero$"
    )
    with pytest.raises(ValueError, match=sentence):
        fit(moments, 0.0)
    fit(moments, 1.0)


@given(seeds, penalties)
def test_every_rank_is_the_solution_of_a_separate_problem(seed: int, penalty: float) -> None:
    x, y = regression_data(seed)
    metric = semidefinite(seed, 4, 4)
    path = reduced_rank(Moments.of(x, y), penalty, metric)
    values, vectors = np.linalg.eigh(metric.numpy())
    root, unroot = vectors * values**0.5 @ vectors.T, vectors * values**-0.5 @ vectors.T
    inputs, targets = augmented(x, y, penalty)
    full = lstsq(inputs, targets @ root)[0]
    for rank in range(5):  # Eckart-Young on the fitted values of the raw data
        *_, v = np.linalg.svd(inputs @ full, full_matrices=False)
        weight = torch.from_numpy(full @ v[:rank].T @ v[:rank] @ unroot)
        torch.testing.assert_close(x @ path.at(rank).weight, x @ weight, rtol=1e-6, atol=1e-6)


@given(seeds, penalties)
def test_each_rank_lowers_the_objective_by_its_squared_singular_value(seed: int, penalty: float) -> None:
    moments = Moments.of(*regression_data(seed))
    metric = semidefinite(seed, 4, 4)
    path = reduced_rank(moments, penalty, metric)
    found = [objective(moments, path.at(rank), penalty, metric) for rank in range(5)]
    assert found[0] == pytest.approx(float((moments.yy_centred * metric).sum()))
    np.testing.assert_allclose(-np.diff(found), path.singular_values.square(), rtol=1e-6, atol=1e-9 * found[0])


@given(seeds, penalties, st.integers(0, 4))
def test_no_rank_is_worse_than_truncating_the_ridge_by_its_own_svd(seed: int, penalty: float, rank: int) -> None:
    moments = Moments.of(*regression_data(seed))
    metric = semidefinite(seed, 4, 4)
    u, s, vt = torch.linalg.svd(ridge(moments, penalty).weight, full_matrices=False)
    weight = u[:, :rank] * s[:rank] @ vt[:rank]
    truncated = LinearMap(weight, moments.y_mean - moments.x_mean @ weight)
    best = objective(moments, reduced_rank(moments, penalty, metric).at(rank), penalty, metric)
    assert best <= objective(moments, truncated, penalty, metric) * (1 + 1e-9)


@given(seeds, st.integers(0, 4))
def test_a_planted_low_rank_map_is_recovered_at_its_rank(seed: int, rank: int) -> None:
    x, left = regression_data(seed, d_y=max(rank, 1))
    planted = left[:5, :rank] @ left[5:9, :rank].T / 100
    bias = left[9, 0] * torch.ones(4, dtype=torch.float64)
    path = reduced_rank(Moments.of(x, x @ planted + bias), 0.0, semidefinite(seed, 4, 4))
    torch.testing.assert_close(path.at(rank)(x), x @ planted + bias, rtol=1e-8, atol=1e-8)


@given(seeds, penalties)
def test_full_rank_is_ridge(seed: int, penalty: float) -> None:
    x, y = regression_data(seed)
    moments = Moments.of(x, y)
    whole = ridge(moments, penalty)(x)
    torch.testing.assert_close(reduced_rank(moments, penalty).at(4)(x), whole, rtol=1e-7, atol=1e-7)
    weighted = reduced_rank(moments, penalty, semidefinite(seed, 4, 4)).at(4)(x)
    torch.testing.assert_close(weighted, whole, rtol=1e-6, atol=1e-6)


@given(seeds, st.integers(1, 3))
def test_a_metric_with_null_directions_is_fitted_where_it_sees(seed: int, seen: int) -> None:
    moments = Moments.of(*regression_data(seed))
    metric = semidefinite(seed, 4, seen)
    path = reduced_rank(moments, 1.0, metric)
    best = objective(moments, ridge(moments, 1.0), 1.0, metric)
    assert objective(moments, path.at(seen), 1.0, metric) == pytest.approx(best, rel=1e-6)
    torch.testing.assert_close(path.at(4).weight, path.at(seen).weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [-1, 5])
def test_a_rank_beyond_the_limit_is_refused(rank: int) -> None:
    path = reduced_rank(Moments.of(*regression_data(0)), 1.0)
    with pytest.raises(ValueError, match=f"rank {rank} is beyond the limit: these moments give ranks 0 to 4"):
        path.at(rank)


@given(seeds)
def test_squared_error_from_moments_is_the_sum_over_samples(seed: int) -> None:
    x, y = regression_data(seed)
    other_x, other_y = regression_data(seed + 1)
    metric = semidefinite(seed, 4, 2)
    fitted = ridge(Moments.of(other_x, other_y), 1.0)
    residual = fitted(x) - y
    error = float(squared_error(Moments.of(x, y), fitted))
    assert error == pytest.approx(float(residual.square().sum()), rel=1e-9)
    weighted = float(squared_error(Moments.of(x, y), fitted, metric))
    assert weighted == pytest.approx(float((residual @ metric * residual).sum()), rel=1e-9)


def test_a_pivot_of_rounding_alone_is_no_direction() -> None:
    almost_singular = torch.diag(torch.tensor([1.0, 1e-17], dtype=torch.float64))  # which Cholesky accepts
    found = solve_symmetric(almost_singular, torch.ones(2, 1, dtype=torch.float64))
    assert found.flatten().tolist() == pytest.approx([1.0, 0.0])


@given(seeds, st.integers(2, 5), st.booleans())
def test_k_fold_by_subtraction_is_refitting_without_each_fold(seed: int, count: int, wide: bool) -> None:
    x, y = regression_data(seed)
    if wide:  # more inputs than samples, which the choice is made in the span of
        generator = torch.Generator().manual_seed(seed)
        x = x @ torch.randn(x.shape[1], len(x) + 7, generator=generator, dtype=x.dtype)
        x = x + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    metric = semidefinite(seed, 4, 3)
    labels = torch.arange(len(x)) % count
    folds = by_fold(x, y, labels.tolist())
    relative = (1e-6, 1e-2, 1.0, 100.0)
    chosen, errors = choose_penalty(folds, metric, relative)
    refitted = {}
    for penalty in (factor * mean_eigenvalue(merge(folds)) for factor in relative):
        each = []
        for k in range(count):
            out = labels == k
            residual = direct_ridge(x[~out], y[~out], penalty)(x[out]) - y[out]
            each.append(float((residual @ metric * residual).sum()))
        refitted[penalty] = each
    assert errors == pytest.approx({penalty: sum(each) / len(x) for penalty, each in refitted.items()}, rel=1e-6)
    assert chosen == max(indifferent(refitted))


def indifferent(refitted: dict[float, list[float]]) -> list[float]:
    """Candidates whose summed fold errors are within a tenth of the standard error of the least sum."""
    least = min(refitted.values(), key=sum)
    limit = sum(least) + 0.1 * len(least) * float(scipy.stats.sem(least))
    return [candidate for candidate, each in refitted.items() if sum(each) <= limit * (1 + 1e-9)]


def test_a_choice_between_near_ties_does_not_flip_with_the_last_digits() -> None:
    x, y = regression_data(3, n=400)  # so many samples that small ridges do not matter
    chosen = {choose_penalty(by_fold(x + 1e-9 * k, y, [j % 5 for j in range(400)]))[0] for k in range(20)}
    assert max(chosen) / min(chosen) < 1 + 1e-6


def planted(seed: int, rank: int, noise: float) -> tuple[Tensor, Tensor]:
    """Inputs [60, 5] and targets [60, 4] of a map whose singular values are all one."""
    x, _ = regression_data(seed, n=60)
    left, right = (torch.linalg.qr(torch.randn(d, rank, generator=torch.Generator().manual_seed(seed + d)).double()).Q
                   for d in (5, 4))  # fmt: skip
    x = torch.linalg.qr(x - x.mean(0)).Q * 60**0.5 + x.mean(0)  # white, with large means
    error = torch.randn(60, 4, generator=torch.Generator().manual_seed(seed + 9), dtype=torch.float64)
    return x, x @ left @ right.T + 3 + noise * error


@given(seeds, st.integers(0, 4))
def test_the_rank_of_a_planted_map_is_found(seed: int, rank: int) -> None:
    x, y = planted(seed, rank, 0.0)
    chosen, errors = choose_rank(by_fold(x, y, [k % 3 for k in range(60)]), 0.0, semidefinite(seed, 4, 4))
    assert chosen == rank and list(errors) == [0, 1, 2, 3, 4]
    assert all(errors[r] > 1e6 * abs(errors[rank]) for r in range(rank))


def test_the_rank_of_a_planted_map_is_found_under_noise() -> None:
    chosen = [
        (rank, choose_rank(by_fold(*planted(seed, rank, 0.3), [k % 6 for k in range(60)]), 1e-6)[0])
        for seed in range(10)
        for rank in (1, 2, 3)
    ]
    assert all(found >= rank for rank, found in chosen)  # a direction of size 1 is not missed
    assert sum(found == rank for rank, found in chosen) >= 24  # and one of noise is seldom taken for it


@given(seeds, st.floats(1e-6, 1e3), st.integers(2, 5))
def test_errors_of_ranks_are_those_of_refitting_without_each_fold(seed: int, penalty: float, count: int) -> None:
    x, y = regression_data(seed)
    metric, labels = semidefinite(seed, 4, 3), torch.arange(len(x)) % count
    refitted = {}
    for rank in (0, 1, 3):
        each = []
        for k in range(count):
            out = labels == k
            residual = reduced_rank(Moments.of(x[~out], y[~out]), penalty, metric).at(rank)(x[out]) - y[out]
            each.append(float((residual @ metric * residual).sum()))
        refitted[rank] = each
    chosen, errors = choose_rank(by_fold(x, y, labels.tolist()), penalty, metric, ranks=(0, 1, 3))
    assert errors == pytest.approx({rank: sum(each) / len(x) for rank, each in refitted.items()}, rel=1e-6)
    assert chosen == min(indifferent(refitted))


def test_an_exactly_linear_target_takes_the_largest_penalty_that_costs_nothing_but_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    x, m = torch.randn(60, 4, generator=generator), torch.randn(4, 3, generator=generator)
    chosen, errors = choose_penalty(by_fold(x, x @ m, [k % 3 for k in range(60)]))
    least = min(errors.values())
    assert chosen > min(errors)
    assert errors[chosen] - least < 1e-9
    assert all(error - least > errors[chosen] - least for penalty, error in errors.items() if penalty > chosen)


def test_constant_inputs_predict_the_mean() -> None:
    x, y = torch.ones(8, 2), torch.arange(16.0).view(8, 2)
    chosen, _ = choose_penalty(by_fold(x, y, [0, 1] * 4))
    fitted = ridge(merge(by_fold(x, y, [0, 1] * 4)), chosen)
    torch.testing.assert_close(fitted(x), y.double().mean(0).expand(8, 2))


def test_the_vocabulary_metric_is_its_definition() -> None:
    unembedding = torch.from_numpy(np.random.default_rng(0).normal(size=(30, 6)))
    p = torch.from_numpy(np.random.default_rng(1).dirichlet(np.ones(30)))
    omega = torch.diag(p) - torch.outer(p, p)
    torch.testing.assert_close(vocabulary_metric(unembedding, p), unembedding.T @ omega @ unembedding)


def test_the_vocabulary_metric_is_kl_to_second_order() -> None:
    generator = torch.Generator().manual_seed(0)
    unembedding, h, edit = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (30, 1, 1))
    expert = h @ unembedding.T
    metric = vocabulary_metric(unembedding, expert[0].softmax(-1))
    predicted = float((edit @ metric * edit).sum()) / 2
    ratios = [
        float(kl_divergence(expert, (h + size * edit) @ unembedding.T)) / (size**2 * predicted)
        for size in (1e-1, 1e-2, 1e-3)
    ]
    gaps = [abs(ratio - 1) for ratio in ratios]
    assert gaps[2] < 1e-2 and gaps[0] > gaps[1] > gaps[2]


@pytest.mark.parametrize("seed", range(20))
def test_constant_targets_leave_a_penalty_to_choose(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, constant = torch.randn(40, 3, generator=generator), 146 * torch.rand(4, generator=generator, dtype=torch.float64)
    folds = by_fold(x, constant.expand(40, 4), [k % 4 for k in range(40)])
    penalty, errors = choose_penalty(folds)
    assert penalty in errors
