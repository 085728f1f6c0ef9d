"""Lenses recover what is linear, and their penalty pulls toward the right place."""

import pytest
import torch
from hypothesis import given
from samples import regression_data, seeds

from chassis_utils.adapters.lens import fit_lens, lens_moments
from chassis_utils.as_reported import adapters as as_reported
from chassis_utils.linalg.moments import merge
from chassis_utils.linalg.regression import choose_penalty
from chassis_utils.lm.model import Head

FOLDS = [k % 4 for k in range(40)]


def states(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States of a layer and an expert's last states, of equal width."""
    return regression_data(seed, d_x=5, d_y=5)


@given(seeds)
def test_a_planted_lens_is_recovered(seed: int) -> None:
    h, noise = states(seed)
    target = h @ noise[:5] / 10 + noise[5]
    for edit in (False, True):
        lens = fit_lens(lens_moments(h, target, FOLDS, edit), edit, penalty=0.0)
        torch.testing.assert_close(lens.states(h), target, rtol=1e-7, atol=1e-7)


@given(seeds)
def test_a_huge_penalty_pulls_an_edit_lens_to_the_base_and_a_plain_one_to_the_mean(seed: int) -> None:
    h, target = states(seed)
    edit = (target - h) - (target - h).mean(0)  # without a mean, which the intercept would keep
    lens = fit_lens(lens_moments(h, h + edit, FOLDS, edit=True), edit=True, penalty=1e15)
    torch.testing.assert_close(lens.states(h), h, rtol=1e-6, atol=1e-6)
    plain = fit_lens(lens_moments(h, target, FOLDS), penalty=1e15)
    torch.testing.assert_close(plain.states(h), target.mean(0).expand_as(h), rtol=1e-6, atol=1e-6)


@given(seeds)
def test_the_route_through_states_gives_the_lens_of_the_route_through_logits(seed: int) -> None:
    h, target = states(seed)
    head = Head(torch.randn(20, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    direct = as_reported.layer_lens(h, head(target))
    hidden = fit_lens(lens_moments(h, target, FOLDS), penalty=as_reported.RIDGE)
    torch.testing.assert_close(hidden.logits(h, head), direct(h), rtol=1e-7, atol=1e-7)


def test_the_penalty_is_the_one_that_folds_choose() -> None:
    folds = lens_moments(*states(0), FOLDS)
    assert fit_lens(folds).penalty == choose_penalty(folds)[0]


def test_float32_states_give_the_edit_in_float64() -> None:
    h = states(0)[0].float()
    tiny = 1e-9 * torch.ones_like(h, dtype=torch.float64)
    moments = merge(lens_moments(h, h.double() + tiny, FOLDS, edit=True))
    assert float(moments.y_mean.mean()) == pytest.approx(1e-9, rel=1e-5)
