"""KL and the figures beside it, against scipy and numpy."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from chassis_utils.metrics import Reference, cosine, kl_divergence, l2, standard_error, top_overlap

rows = arrays(np.float64, (3, 6), elements=st.floats(-50, 50)).map(torch.from_numpy)
constants = arrays(np.float64, (3, 1), elements=st.floats(-1e3, 1e3)).map(torch.from_numpy)


@given(rows, rows)
def test_kl_is_never_negative_and_is_the_entropy_of_scipy(expert: torch.Tensor, other: torch.Tensor) -> None:
    found = kl_divergence(expert, other)
    direct = scipy.stats.entropy(expert.softmax(-1), other.softmax(-1), axis=-1)
    assert (found >= 0).all()
    np.testing.assert_allclose(found, direct, rtol=1e-9, atol=1e-12)


@given(rows, rows, constants)
def test_a_constant_added_to_a_row_changes_no_kl(expert: torch.Tensor, other: torch.Tensor, c: torch.Tensor) -> None:
    shifted = kl_divergence(expert + c, other - c)
    torch.testing.assert_close(shifted, kl_divergence(expert, other), rtol=1e-9, atol=1e-9)


@given(rows, constants)
def test_kl_is_zero_exactly_where_rows_differ_by_a_constant(expert: torch.Tensor, c: torch.Tensor) -> None:
    assert float(kl_divergence(expert, expert + c).max()) < 1e-12
    moved = expert.clone()
    moved[:, 0] += 1 + expert.amax(-1) - expert[:, 0]  # now the most likely token, and was not by this much
    assert (kl_divergence(expert, moved) > 0).all()


def test_logits_far_beyond_the_range_of_exp_do_not_overflow() -> None:
    expert, other = torch.tensor([[2e4, 0.0]]), torch.tensor([[0.0, 1e4]])
    assert float(kl_divergence(expert, other)) == pytest.approx(1e4)
    assert float(kl_divergence(expert.half(), other.half())) == pytest.approx(1e4, rel=1e-3)


@given(st.permutations(range(8)), st.permutations(range(8)), st.integers(1, 8))
def test_top_overlap_is_the_shared_part_of_two_sets(first: list[int], second: list[int], k: int) -> None:
    shared = set(np.argsort(first)[-k:]) & set(np.argsort(second)[-k:])
    assert float(top_overlap(torch.tensor([first]), torch.tensor([second]), k)) == len(shared) / k


@given(arrays(np.float64, st.integers(2, 20), elements=st.floats(-1e3, 1e3)))
def test_standard_error_is_that_of_scipy(values: np.ndarray) -> None:
    assert standard_error(torch.from_numpy(values)) == pytest.approx(scipy.stats.sem(values), abs=1e-12)


@given(arrays(np.float64, st.integers(2, 12), elements=st.floats(-1e3, 1e3)), st.integers(1, 5))
def test_repeating_each_observation_in_its_group_leaves_the_clustered_error(values: np.ndarray, copies: int) -> None:
    repeated = torch.from_numpy(np.repeat(values, copies))
    groups = [f"document {k}" for k in range(len(values)) for _ in range(copies)]
    assert standard_error(repeated, groups) == pytest.approx(scipy.stats.sem(values), abs=1e-9)


def test_values_of_one_group_are_one_observation_and_have_no_error() -> None:
    assert math.isnan(standard_error(torch.tensor([1.0, 2.0, 3.0]), ["a", "a", "a"]))


def test_a_single_value_has_no_standard_error() -> None:
    assert math.isnan(standard_error(torch.tensor([1.0])))


@given(rows, rows)
def test_cosine_and_distance_are_those_of_numpy(first: torch.Tensor, second: torch.Tensor) -> None:
    a, b = first.numpy(), second.numpy()
    np.testing.assert_allclose(l2(first, second), np.linalg.norm(a - b, axis=1))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    if (norms > 1e-6).all():
        np.testing.assert_allclose(cosine(first, second), (a * b).sum(1) / norms, atol=1e-9)


def test_a_row_holds_the_common_figures_beside_its_keys() -> None:
    expert, base, adapted = torch.randn(3, 20, 9, generator=torch.Generator().manual_seed(0))
    row = Reference(expert, base).row(adapted, layer=3)
    kl, base_kl = (scipy.stats.entropy(expert.softmax(-1), z.softmax(-1), axis=-1) for z in (adapted, base))
    assert row == pytest.approx(
        {
            "layer": 3,
            "kl": kl.mean(),
            "kl_se": scipy.stats.sem(kl),
            "base_kl": base_kl.mean(),
            "gap_closed": 1 - kl.mean() / base_kl.mean(),
            "top1": float((expert.argmax(-1) == adapted.argmax(-1)).double().mean()),
            "top5_overlap": float(top_overlap(expert, adapted, 5).mean()),
            "n_prompts": 20,
        },
        rel=1e-5,
    )


def test_the_expert_closes_the_gap_and_the_base_leaves_it() -> None:
    expert, base = torch.randn(2, 20, 9, generator=torch.Generator().manual_seed(0))
    reference = Reference(expert, base)
    assert reference.row(expert)["gap_closed"] == 1 and reference.row(base)["gap_closed"] == 0
    assert reference.row(expert)["top1"] == reference.row(expert)["top5_overlap"] == 1


def test_no_gap_has_no_share() -> None:
    expert = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    assert math.isnan(float(Reference(expert, expert).row(expert + 1)["gap_closed"]))
