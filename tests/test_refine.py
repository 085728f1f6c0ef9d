"""Refinement never ends above its start, and Gauss-Newton reaches the optimum that other minimisers find."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import seeds
from torch import Tensor

from chassis_utils.adapters.adapter import Adapter
from chassis_utils.adapters.fit import fit_moments
from chassis_utils.adapters.refine import DAMPING, Examples, Refined, _newton, by_adam, by_gauss_newton
from chassis_utils.experts.synthetic import SyntheticExpert
from chassis_utils.linalg.moments import Moments
from chassis_utils.linalg.regression import vocabulary_metric
from chassis_utils.lm.model import Head
from chassis_utils.metrics import kl_divergence

WIDTH, VOCABULARY, COUNT = 5, 30, 64


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_head(seed: int, width: int = WIDTH) -> Head:
    return Head(normal(seed, VOCABULARY, width) / width**0.5)


def problem(seed: int, noise: float = 1.0) -> tuple[Head, Examples, Examples]:
    """Prompts to train on and others: the expert's logits are no low-rank edit, nor any edit, of the base's."""
    head, h = a_head(seed), 2 * normal(seed + 1, 2 * COUNT, WIDTH) + normal(seed + 2, WIDTH)
    edit = h @ normal(seed + 3, WIDTH, WIDTH) / WIDTH**0.5
    logits = head(h + edit) + noise * normal(seed + 4, 2 * COUNT, VOCABULARY)
    return head, Examples(h[:COUNT], logits[:COUNT]), Examples(h[COUNT:], logits[COUNT:])


def mean_kl(adapter: Adapter, head: Head, examples: Examples) -> float:
    return float(kl_divergence(examples.logits, adapter.logits(examples.h, head)).mean())


def closed_form(head: Head, train: Examples, rank: int, penalty: float = 1e-3) -> Adapter:
    """The reduced-rank adapter to the best edit of each prompt's state."""
    metric = vocabulary_metric(head.weight, train.logits.softmax(-1).mean(0))
    edits = torch.linalg.lstsq(head.weight, (train.logits - head(train.h)).T).solution.T
    return fit_moments([Moments.of(train.h, edits)], head, metric, penalty).at(rank)


@settings(max_examples=8)
@given(seeds, st.integers(1, WIDTH), st.sampled_from([1e-3, 1e-1, 3.0]), st.sampled_from(["adam", "gauss-newton"]))
def test_what_is_kept_is_never_above_the_start_on_held_out_prompts(seed: int, rank: int, rate: float, how: str) -> None:
    head, train, held_out = problem(seed)
    start = closed_form(head, train, rank)
    if how == "adam":
        refined = by_adam(start, head, train, held_out, rate, passes=3)  # 3 destroys any adapter
        assert len(refined.train) == len(refined.held_out) == 4
    else:
        refined = by_gauss_newton(start, head, train, held_out, rate)
    assert refined.held_out[0] == pytest.approx(mean_kl(start, head, held_out))
    assert refined.train[0] == pytest.approx(mean_kl(start, head, train))
    reached = mean_kl(refined.adapter, head, held_out)
    assert reached <= refined.held_out[0]
    untouched = mean_kl(Adapter.untouched(head), head, held_out)
    assert reached <= untouched
    assert any(reached == pytest.approx(kl) for kl in (*refined.held_out, untouched))
    fitted = refined.adapter
    assert (fitted.rank, fitted.space, fitted.head_fingerprint) == (rank, "state", head.fingerprint)
    assert rate < 3 or how != "adam" or max(refined.held_out) > 1.1 * refined.held_out[0]


@pytest.mark.parametrize("how", [by_adam, by_gauss_newton])
def test_only_what_is_clearly_better_on_held_out_prompts_is_kept(how: Callable[..., Refined]) -> None:
    head, train, held_out = problem(0)
    start = closed_form(head, train, 2)
    kept = how(start, head, train, held_out, 1e-2)
    assert kept.adapter is not start
    gain = torch.stack([kl_divergence(held_out.logits, a.logits(held_out.h, head)) for a in (start, kept.adapter)])
    assert float(gain[0].mean() - gain[1].mean()) > scipy.stats.sem(gain[0] - gain[1])
    one = Examples(held_out.h[:1], held_out.logits[:1])  # a single prompt has no standard error
    assert how(start, head, train, one, 1e-2).adapter is start
    grouped = replace(held_out, groups=["one template"] * COUNT)
    assert how(start, head, train, grouped, 1e-2).adapter is start


@settings(max_examples=8)
@given(seeds, st.integers(0, WIDTH))
def test_gauss_newton_lowers_the_training_kl_at_every_step(seed: int, rank: int) -> None:
    head, train, _ = problem(seed)
    start = closed_form(head, train, rank)
    refined = by_gauss_newton(start, head, train, train, 1e-9)
    assert len(refined.train) > 1 and refined.train == pytest.approx(refined.held_out)
    assert all(after < before for before, after in zip(refined.train, refined.train[1:], strict=False))
    assert refined.train[-1] < (1 - 1e-3) * refined.train[0]
    assert any(mean_kl(refined.adapter, head, train) == pytest.approx(kl) for kl in refined.train)


def optimum(head: Head, train: Examples, intercept: Tensor | None = None) -> float:
    """The least training KL of any affine edit of the state, by L-BFGS with gradients from autograd."""
    weight = torch.zeros(WIDTH, WIDTH, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True)
    log_p = train.logits.log_softmax(-1)
    precise = {"max_iter": 500, "tolerance_grad": 1e-9, "tolerance_change": 0.0, "line_search_fn": "strong_wolfe"}
    minimiser = torch.optim.LBFGS([weight, bias], **precise)

    def loss() -> Tensor:
        product = head.product(train.h + train.h @ weight + bias)
        log_q = head.finish(product if intercept is None else product + intercept).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    def closure() -> Tensor:
        minimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    minimiser.step(closure)
    assert weight.grad is not None and float(weight.grad.abs().max()) < 1e-6
    return loss().item()


def slope_of(adapter: Adapter, head: Head, train: Examples) -> float:
    """The largest entry of the gradient of the training KL in the full-rank edit."""
    weight, bias = (adapter.down @ adapter.up.T).requires_grad_(), adapter.shift.clone().requires_grad_()
    product = head.product(train.h + train.h @ weight + bias)
    log_q = head.finish(product if adapter.intercept is None else product + adapter.intercept).log_softmax(-1)
    loss = -(train.logits.softmax(-1) * log_q).sum(-1).mean()
    return max(float(part.abs().max()) for part in torch.autograd.grad(loss, [weight, bias]))


@pytest.mark.parametrize("seed", range(3))
def test_gauss_newton_at_full_rank_reaches_the_optimum_of_the_convex_problem(seed: int) -> None:
    head, train, _ = problem(seed)
    start = closed_form(head, train, WIDTH)
    refined = by_gauss_newton(start, head, train, train, 0.0, steps=100)
    least = optimum(head, train)
    assert refined.train[0] > least + 1e-3
    assert refined.train[-1] == pytest.approx(least, rel=1e-7)
    assert slope_of(refined.adapter, head, train) < 1e-4 * slope_of(start, head, train)
    few = by_gauss_newton(start, head, train, train, 0.0, steps=5)
    assert few.train[-1] - least < 0.1 * (few.train[0] - least)  # what the module says of five steps


@pytest.mark.parametrize("part", ["bias", "scale", "intercept"])
def test_gauss_newton_reaches_the_optimum_beside_any_part_of_the_head(part: str) -> None:
    head, train, _ = problem(0)
    changes = {"bias": {"bias": normal(9, VOCABULARY)}, "scale": {"scale": 0.3}, "intercept": {}}
    head = replace(head, **changes[part])
    intercept = normal(9, VOCABULARY) if part == "intercept" else None
    zeros = torch.zeros(2, WIDTH, WIDTH, dtype=torch.float64)
    start = Adapter("state", *zeros, zeros[0, 0], head.fingerprint, intercept)
    refined = by_gauss_newton(start, head, train, train, 0.0, steps=100)
    assert refined.adapter.intercept is intercept
    assert refined.train[-1] == pytest.approx(optimum(head, train, intercept), rel=1e-4)


def test_gauss_newton_ends_where_there_is_no_slope_behind_a_softcap_too() -> None:
    head, train, _ = problem(0)
    head = replace(head, softcap=2.0)
    start = Adapter("state", *torch.zeros(2, WIDTH, WIDTH).double(), torch.zeros(WIDTH).double(), head.fingerprint)
    refined = by_gauss_newton(start, head, train, train, 0.0, steps=100)
    assert slope_of(refined.adapter, head, train) < 0.02 * slope_of(start, head, train)


@pytest.mark.parametrize("part", ["plain", "bias and scale", "softcap", "intercept"])
def test_slope_and_curvature_are_those_of_autograd(part: str) -> None:
    head, train, _ = problem(1)
    if part == "bias and scale":
        head = replace(head, bias=normal(9, VOCABULARY), scale=0.3)
    if part == "softcap":
        head = replace(head, softcap=2.0)
    adapter = Adapter("state", *normal(7, 2, WIDTH, 2), normal(8, WIDTH), head.fingerprint)
    if part == "intercept":
        adapter = replace(adapter, intercept=normal(9, VOCABULARY))
    change, curvature = _newton(adapter, head, train)

    def logits(state: Tensor) -> Tensor:
        product = head.product(state[None])
        return head.finish(product if adapter.intercept is None else product + adapter.intercept)[0]

    slopes, curvatures = [], []
    for h, target in zip(train.h + adapter.edit(train.h), train.logits, strict=True):
        p = target.softmax(-1)
        slopes.append(-torch.autograd.functional.jacobian(lambda s, p=p: -(p * logits(s).log_softmax(-1)).sum(), h))
        jacobian = torch.autograd.functional.jacobian(logits, h)
        q = logits(h).softmax(-1)
        curvatures.append(jacobian.T @ (torch.diag(q) - torch.outer(q, q)) @ jacobian)  # Gauss-Newton's, of one prompt
    mean = torch.stack(curvatures).mean(0)
    torch.testing.assert_close(curvature, mean, rtol=1e-6, atol=10 * DAMPING * float(mean.trace()))
    torch.testing.assert_close(change @ curvature, torch.stack(slopes), rtol=1e-6, atol=1e-9)


def test_gauss_newton_spends_its_rank_where_the_head_looks() -> None:
    weight, h, eye = normal(0, VOCABULARY, 2) * torch.tensor([0.01, 1.0]), normal(1, COUNT, 2), torch.eye(2).double()
    head, zeros = Head(weight), torch.zeros(2, 1, dtype=torch.float64)
    examples = Examples(h, head(h + h * torch.tensor([20.0, 0.5])))  # the first edit is large, and hardly seen
    start = Adapter("state", zeros, zeros, zeros[:, 0], head.fingerprint)
    refined = by_gauss_newton(start, head, examples, examples, 1e-9)
    seen = mean_kl(replace(start, down=0.5 * eye[:, 1:], up=eye[:, 1:]), head, examples)
    assert seen < 0.2 * refined.train[0]
    assert refined.train[-1] < 1.5 * seen


def test_gauss_newton_refuses_vocabulary_coordinates() -> None:
    head, train, held_out = problem(0)
    start = closed_form(head, train, 2)
    start = replace(start, space="vocabulary", up=head.weight @ start.up, shift=head.weight @ start.shift)
    with pytest.raises(ValueError, match="Gauss-Newton steps edit the state: give an adapter in state coordinates"):
        by_gauss_newton(start, head, train, held_out, 1.0)


def test_a_start_that_is_at_its_best_on_held_out_prompts_is_kept() -> None:
    head, train, _ = problem(0)
    start = closed_form(head, train, 2)
    contrary = Examples(train.h, start.logits(train.h, head))
    refined = by_gauss_newton(start, head, train, contrary, 1e-9)
    assert min(refined.held_out[1:]) > refined.held_out[0] and refined.adapter is start
    assert by_adam(start, head, train, contrary, 1e-2, passes=2).adapter is start
    assert by_adam(start, head, train, contrary, 1e-2, passes=2, stopped=False).adapter is not start


def exact(width: int) -> tuple[Head, Adapter, Examples]:
    """An expert of rank 2 and effect 0.5, and the adapter that is all but exact: gradients beyond rounding."""
    head, h = a_head(0, width), normal(1, 32, width)
    expert = SyntheticExpert.draw(width, 2).with_effect(0.5, head, h)
    start = Adapter("state", expert.strength * expert.u, expert.v, 1e-3 * normal(2, width), head.fingerprint)
    return head, start, Examples(h, head(expert.states(h)))


@pytest.mark.parametrize("relative", [True, False])
def test_a_step_of_adam_leaves_an_exact_start_by_the_square_of_its_rate(relative: bool) -> None:
    head, start, examples = exact(128)
    rates = (0.025, 0.05, 0.1) if relative else (0.0025, 0.005, 0.01)
    kl = [by_adam(start, head, examples, examples, rate, relative=relative, passes=1).held_out[1] for rate in rates]
    assert kl[1] / kl[0] == pytest.approx(4, rel=0.3) and kl[2] / kl[1] == pytest.approx(4, rel=0.3)
    assert kl[0] > 10 * mean_kl(start, head, examples)


def test_an_absolute_rate_destroys_wide_factors_and_a_relative_one_does_not() -> None:
    after = {}
    for width in (16, 64, 256):
        head, start, examples = exact(width)
        assert mean_kl(start, head, examples) < 1e-4
        for relative in (True, False):
            once = by_adam(start, head, examples, examples, 1e-2, relative=relative, stopped=False, passes=1)
            after[width, relative] = once.held_out[1]
    assert max(after[width, True] for width in (16, 64, 256)) < 2e-2  # of 0.5 nats
    assert after[256, False] > 5 * after[16, False] and after[256, False] > 30 * after[256, True]


@settings(max_examples=8)
@given(seeds, st.sampled_from(["state", "vocabulary"]), st.sampled_from([1e-3, 1e3]))
def test_a_relative_step_does_not_depend_on_the_units_of_the_states(seed: int, space: str, unit: float) -> None:
    head, train, _ = problem(seed)
    wide, large = Head(head.weight / unit), Examples(unit * train.h, train.logits)
    start = closed_form(head, train, 2)
    if space == "state":
        same = replace(start, shift=unit * start.shift, head_fingerprint=wide.fingerprint)
    else:
        start = replace(start, space=space, up=head.weight @ start.up, shift=head.weight @ start.shift)
        same = replace(start, down=start.down / unit, head_fingerprint=wide.fingerprint)
    one = by_adam(start, head, train, train, 1e-2, passes=1)
    other = by_adam(same, wide, large, large, 1e-2, passes=1)
    assert other.held_out[0] == pytest.approx(one.held_out[0], rel=1e-9)
    assert other.held_out[1] == pytest.approx(one.held_out[1], rel=1e-3)


def test_a_factor_that_carries_nothing_leaves_the_steps_of_the_others() -> None:
    head, start, examples = exact(16)
    empty = torch.linalg.qr(torch.cat([start.down, normal(3, 16, 1)], 1)).Q[:, 2:]
    wider = replace(start, down=torch.cat([start.down, 1e-14 * empty], 1), up=torch.cat([start.up, empty], 1))
    one, other = (by_adam(a, head, examples, examples, 1e-2, stopped=False, passes=3) for a in (start, wider))
    assert other.held_out[1:] == pytest.approx(one.held_out[1:], rel=0.1)


@settings(max_examples=8)
@given(seeds, st.sampled_from(["state", "vocabulary"]), st.booleans())
def test_a_rate_of_next_to_nothing_changes_next_to_nothing(seed: int, space: str, intercept: bool) -> None:
    head, train, held_out = problem(seed)
    start = closed_form(head, train, 2)
    if space == "vocabulary":
        start = replace(start, space="vocabulary", up=head.weight @ start.up, shift=head.weight @ start.shift)
    if intercept:
        start = replace(start, intercept=normal(seed, VOCABULARY))
    refined = by_adam(start, head, train, held_out, 1e-9, stopped=False, passes=1)
    torch.testing.assert_close(refined.adapter.edit(train.h), start.edit(train.h), rtol=1e-4, atol=1e-4)
    assert refined.train[1] == pytest.approx(refined.train[0], rel=1e-4)  # and what it descends is what is measured
    assert refined.held_out[1] == pytest.approx(refined.held_out[0], rel=1e-4)
    assert refined.adapter.space == space and (refined.adapter.intercept is not None) == intercept


def test_adam_lowers_the_training_kl_below_the_rank_of_the_expert() -> None:
    head, train, held_out = problem(0, noise=0.0)
    start = closed_form(head, train, 2)
    refined = by_adam(start, head, train, held_out, 1e-2, passes=10)
    assert refined.train[-1] < 0.95 * refined.train[0]
    assert mean_kl(refined.adapter, head, held_out) < mean_kl(start, head, held_out)
    again = by_adam(start, head, train, held_out, 1e-2, passes=10)
    assert torch.equal(again.adapter.down, refined.adapter.down)
    other = by_adam(start, head, train, held_out, 1e-2, passes=10, seed=1)
    assert not torch.equal(other.adapter.down, refined.adapter.down)


@pytest.mark.parametrize("relative", [True, False])
def test_adam_trains_a_shift_that_starts_at_zero(relative: bool) -> None:
    head, h = a_head(0), normal(1, COUNT, WIDTH)
    edit = SyntheticExpert.draw(WIDTH, 2).with_effect(0.1, head, h).edit(h)
    examples = Examples(h, head(h + edit + 0.5))  # all that is missing is a shift
    u, s, vt = torch.linalg.svd(torch.linalg.lstsq(h, edit).solution)
    vt[:2, 0] = 0.0  # and the first number of the state is not edited at all
    start = Adapter("state", u[:, :2] * s[:2], vt[:2].T, torch.zeros(WIDTH).double(), head.fingerprint)
    refined = by_adam(start, head, examples, examples, 1e-2, relative=relative, passes=20)
    assert float(refined.adapter.shift.abs().min()) > 0
    assert min(refined.held_out) < 0.8 * refined.held_out[0]


@pytest.mark.parametrize("relative", [True, False])
def test_adam_trains_singular_values_that_start_at_one(relative: bool) -> None:
    head, h = a_head(0), normal(1, COUNT, WIDTH)
    u, v = (torch.linalg.qr(normal(k, WIDTH, 2)).Q for k in (2, 3))
    start = Adapter("state", u, v, normal(4, WIDTH), head.fingerprint)
    examples = Examples(h, head(h + 1.5 * (h @ u) @ v.T + start.shift))  # all that is missing is their size
    refined = by_adam(start, head, examples, examples, 1e-2, relative=relative, passes=20)
    sizes = torch.linalg.svdvals(refined.adapter.down @ refined.adapter.up.T)[:2]
    assert float(sizes.min()) > 1.1
    assert min(refined.held_out) < 0.5 * refined.held_out[0]


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("rank", [0, 3])
def test_ranks_beyond_or_below_all_that_there_is_are_trained_too(rank: int, relative: bool) -> None:
    head, train, held_out = problem(0)
    start = closed_form(head, train, min(rank, 2))
    if rank:  # the third factor is exactly zero
        down, up = (torch.cat([part, torch.zeros(WIDTH, 1).double()], dim=1) for part in (start.down, start.up))
        start = replace(start, down=down, up=up)
    refined = by_adam(start, head, train, held_out, 1e-3, relative=relative, passes=3)
    assert all(kl < float("inf") for kl in [*refined.train, *refined.held_out])
    assert refined.train[-1] < refined.train[0]
    assert refined.adapter.rank == rank
