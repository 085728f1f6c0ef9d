"""The synthetic expert is the edit of the study, with the strength that has the asked effect."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import seeds

from chassis_utils.experts import SyntheticExpert, scaled_rank
from chassis_utils.metrics import kl_divergence
from chassis_utils.models import Head

WIDTH = 12


def head_and_states(seed: int) -> tuple[Head, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return Head(torch.randn(30, WIDTH, generator=generator)), torch.randn(25, WIDTH, generator=generator)


@given(seeds, st.sampled_from([0.1, 0.5, 2.0]), st.integers(1, WIDTH))
def test_the_asked_effect_is_reached_within_a_percent(seed: int, kl: float, rank: int) -> None:
    head, h = head_and_states(seed)
    expert = SyntheticExpert.draw(WIDTH, rank, seed).with_effect(kl, head, h)
    assert float(kl_divergence(head(expert.states(h)), head(h)).mean()) == pytest.approx(kl, rel=0.01)


@given(seeds, st.integers(1, WIDTH))
def test_the_edit_is_the_low_rank_product_of_the_study(seed: int, rank: int) -> None:
    _, h = head_and_states(seed)
    expert = SyntheticExpert.draw(WIDTH, rank, seed)
    product = torch.einsum("nd,dr,er->ne", h.double(), expert.u, expert.v)
    torch.testing.assert_close(expert.states(h) - h.double(), product, rtol=1e-9, atol=1e-12)
    assert torch.linalg.matrix_rank(expert.u @ expert.v.T) == rank


def test_factors_have_the_spread_of_the_study() -> None:
    expert = SyntheticExpert.draw(2048, 64)
    assert torch.cat([expert.u, expert.v]).std() == pytest.approx(0.01, rel=0.01)
    assert abs(float((expert.u * expert.v).mean())) < 1e-6  # drawn apart


def test_the_seed_alone_decides_the_expert() -> None:
    first = SyntheticExpert.draw(WIDTH, 3, seed=1)
    torch.manual_seed(99)
    assert torch.equal(first.u, SyntheticExpert.draw(WIDTH, 3, seed=1).u)
    assert not torch.equal(first.u, SyntheticExpert.draw(WIDTH, 3, seed=2).u)


def test_an_effect_beyond_all_strengths_is_refused() -> None:
    head, h = head_and_states(0)
    with pytest.raises(ValueError, match=r"no strength of this expert reaches 50.0 nats: ask for less"):
        SyntheticExpert.draw(WIDTH, 1).with_effect(50.0, Head(head.weight, softcap=1.0), h)


@pytest.mark.parametrize("rank", [0, WIDTH + 1])
def test_a_rank_that_does_not_fit_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"expert rank {rank} does not fit states of width 12: use 1 to 12"):
        SyntheticExpert.draw(WIDTH, rank)


def test_ranks_keep_their_share_of_the_width() -> None:
    assert [scaled_rank(width) for width in (2048, 256, 64, 16)] == [64, 8, 2, 1]
    assert [scaled_rank(256, rank) for rank in (4, 32, 128)] == [1, 4, 16]
