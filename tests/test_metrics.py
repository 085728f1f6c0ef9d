"""KL and the figures beside it, against scipy and numpy."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from chassis_utils.circulant.compare import patched_row
from chassis_utils.metrics import (
    Reference,
    clearly_lower,
    cosine,
    kl_divergence,
    l2,
    over_seeds,
    standard_error,
    top_overlap,
)

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
    least = expert.argmin(-1, keepdim=True)
    moved = expert.scatter(-1, least, 1 + expert.amax(-1, keepdim=True))  # now the most likely token
    assert (kl_divergence(expert, moved) > 0.01).all()


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


def test_the_interval_of_the_share_covers_the_truth_as_often_as_it_says() -> None:
    generator, covered, rounds = torch.Generator().manual_seed(0), 0, 200
    reference = Reference(torch.zeros(120, 8), torch.zeros(120, 8), [str(k // 3) for k in range(120)])
    for _ in range(rounds):  # 40 groups of three prompts that share most of their noise; half of the gap is closed
        of_groups = torch.randn(40, generator=generator).exp().repeat_interleave(3).double()
        base = of_groups * (1 + 0.1 * torch.rand(120, generator=generator))
        adapted = base * (0.25 + 0.5 * torch.rand(40, generator=generator).repeat_interleave(3))
        reference.__dict__["_base_kls"] = base
        ends = reference.gap_interval(adapted)
        covered += ends["gap_low"] <= 0.5 <= ends["gap_high"]
    assert 0.88 <= covered / rounds <= 0.99  # 95 percent, less what few groups cost a bootstrap


def test_an_adapter_that_halves_every_divergence_has_no_spread() -> None:
    expert, base = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(1))
    reference = Reference(expert, base, [str(k // 4) for k in range(20)])
    ends = reference.gap_interval(0.5 * reference.kl(base))  # a paired interval: the groups' own spread cancels
    assert ends == pytest.approx({"gap_low": 0.5, "gap_high": 0.5})


def test_no_gap_has_no_share() -> None:
    expert = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    assert math.isnan(float(Reference(expert, expert).row(expert + 1)["gap_closed"]))


def test_a_kl_that_is_known_is_taken_for_the_row() -> None:
    expert, base, adapted = torch.randn(3, 20, 9, generator=torch.Generator().manual_seed(0))
    reference = Reference(expert, base, [f"template {k % 4}" for k in range(20)])
    kl = reference.kl(adapted)
    assert reference.row(adapted, kl=kl, rank=2) == reference.row(adapted, rank=2)
    plain, twice = reference.row(adapted), reference.row(adapted, kl=2 * kl)
    assert (twice["kl"], twice["kl_se"]) == pytest.approx((2 * plain["kl"], 2 * plain["kl_se"]))
    assert 1 - twice["gap_closed"] == pytest.approx(2 * (1 - plain["gap_closed"]))
    assert [twice[key] for key in ("top1", "base_kl")] == [plain[key] for key in ("top1", "base_kl")]


def test_every_row_counts_a_group_as_one_observation() -> None:
    expert, base, adapted = torch.randn(3, 20, 9, generator=torch.Generator().manual_seed(0))
    groups = [f"document {k % 4}" for k in range(20)]
    kl = kl_divergence(expert, adapted)
    others = {"top1": 1.0, "top5_overlap": 1.0, "kl_every_token": kl, "agreeing": 1, "tokens": 1}
    compared = pd.DataFrame({"kl": kl} | others)
    rows = [Reference(expert, base, groups).row(adapted), patched_row(compared, 1.0, groups)]
    deviations = (kl - kl.mean()).reshape(5, 4).sum(0)
    expected = float((deviations.square().sum() * 4 / 3).sqrt() / 20)
    assert [row["kl_se"] for row in rows] == pytest.approx([expected, expected])


def test_rows_and_groups_of_other_prompts_do_not_go_together() -> None:
    expert, base, adapted = torch.randn(3, 20, 9, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="12 groups do not belong to 20 values"):
        Reference(expert, base, ["a", "b", "c"] * 4).row(adapted)


@given(arrays(np.float64, (2, 12), elements=st.floats(0, 10)))
def test_clearly_lower_is_what_a_paired_t_test_says_at_one_standard_error(kl: np.ndarray) -> None:
    values, others = torch.from_numpy(kl)
    p_value = scipy.stats.ttest_rel(kl[1], kl[0], alternative="greater").pvalue
    if abs(p_value - scipy.stats.norm.sf(1)) > 1e-9:
        assert clearly_lower(values, others) == (p_value < scipy.stats.norm.sf(1))
    assert not (clearly_lower(values, others) and clearly_lower(others, values))
    assert not clearly_lower(values, values)


def test_nothing_is_clear_from_one_prompt_or_one_group() -> None:
    low, high = torch.zeros(4), torch.tensor([1.0, 1.1, 1.2, 1.3])
    assert clearly_lower(low, high) and clearly_lower(low, high, ["a", "a", "b", "b"])
    assert not clearly_lower(low[:1], high[:1]) and not clearly_lower(low, high, ["a"] * 4)
    apart = torch.tensor([5.0, 5.0, -0.5, -0.5])  # four prompts say so, two templates do not
    assert clearly_lower(low, apart) and not clearly_lower(low, apart, ["a", "a", "b", "b"])


def evaluation_rows(seeds: int = 3) -> pd.DataFrame:
    """Two methods, one of them without a rank, on experts of several seeds."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for seed in range(seeds):
        expert, base, one, other = torch.randn(4, 20, 9, generator=generator)
        reference = Reference(expert, base)
        rows.append(reference.row(one, method="A", rank=4, seed=seed))
        rows.append(reference.row(other, method="base", rank=None, seed=seed))
    return pd.DataFrame(rows)


def test_seeds_are_averaged_and_their_spread_joins_that_of_the_prompts() -> None:
    rows = evaluation_rows()
    found = over_seeds(rows)
    assert list(found.columns) == [*(column for column in rows.columns if column != "seed"), "n_seeds"]
    assert found["method"].tolist() == ["A", "base"]  # in the order in which they came
    for k, method in enumerate(("A", "base")):
        of_it = rows[rows["method"] == method]
        for column in ("kl", "base_kl", "gap_closed", "top1", "top5_overlap"):
            assert found[column][k] == pytest.approx(of_it[column].mean())
        seeds_error = scipy.stats.sem(of_it["kl"])
        assert found["kl_se"][k] == pytest.approx((seeds_error**2 + of_it["kl_se"].mean() ** 2) ** 0.5)
        assert (found["n_prompts"][k], found["n_seeds"][k]) == (20, 3)
    assert found["rank"][0] == 4 and pd.isna(found["rank"][1])


def test_a_single_seed_keeps_its_row() -> None:
    rows = evaluation_rows(1)
    pd.testing.assert_frame_equal(over_seeds(rows).drop(columns="n_seeds"), rows.drop(columns="seed"))
    alone = over_seeds(rows.drop(columns="rank"))  # one setting is enough to tell rows apart
    assert alone["method"].tolist() == ["A", "base"]


@given(arrays(np.float64, st.integers(2, 8), elements=st.floats(0, 10)), st.floats(0, 1))
def test_more_prompts_do_not_hide_the_spread_of_the_seeds(kl: np.ndarray, se: float) -> None:
    rows = pd.DataFrame({"method": "A", "seed": range(len(kl)), "kl": kl, "kl_se": se, "n_prompts": 9})
    (error,) = over_seeds(rows)["kl_se"]
    assert error >= max(scipy.stats.sem(kl), se) - 1e-12
    assert error == pytest.approx(math.hypot(scipy.stats.sem(kl), se), abs=1e-12)
