"""Adapters are what reduced-rank regression says, on any head, and come back from their files or are refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import seeds
from torch import Tensor

from chassis_utils.adapters.adapter import Adapter
from chassis_utils.adapters.fit import fit_moments, state_edits
from chassis_utils.as_reported.adapters import RIDGE, truncated_ridge
from chassis_utils.experts.synthetic import SyntheticExpert
from chassis_utils.linalg.moments import Moments, by_fold, merge
from chassis_utils.linalg.regression import LinearMap, choose_penalty, reduced_rank, squared_error, vocabulary_metric
from chassis_utils.lm.model import Head
from chassis_utils.metrics import kl_divergence

WIDTH, VOCABULARY, COUNT = 6, 40, 60
FOLDS = [k % 4 for k in range(COUNT)]
KINDS = ("plain", "bias", "scale", "softcap", "all three")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_head(seed: int, kind: str = "plain") -> Head:
    """A random head with the named parts."""
    weight, bias = normal(seed, VOCABULARY, WIDTH), normal(seed + 1, VOCABULARY)
    every = kind == "all three"
    return Head(
        weight,
        bias if every or kind == "bias" else None,
        0.25 if every or kind == "scale" else 1.0,
        3.0 if every or kind == "softcap" else None,
    )


def states(seed: int) -> Tensor:
    """Correlated states with large means."""
    return normal(seed + 2, COUNT, WIDTH) @ normal(seed + 3, WIDTH, WIDTH) + 3 * normal(seed + 4, WIDTH)


def metric_of(head: Head, logits: Tensor) -> Tensor:
    return vocabulary_metric(head.weight, logits.double().softmax(-1).mean(0))


def random_adapter(seed: int, head: Head, rank: int, space: str = "state", intercept: bool = False) -> Adapter:
    out = WIDTH if space == "state" else VOCABULARY
    parts = (normal(seed + 5, WIDTH, rank), normal(seed + 6, out, rank), normal(seed + 7, out))
    return Adapter(space, *parts, head.fingerprint, normal(seed + 8, VOCABULARY) if intercept else None)


@given(seeds, st.integers(1, WIDTH), st.sampled_from(KINDS))
def test_a_planted_edit_is_recovered_exactly_at_its_rank_and_not_below(seed: int, rank: int, kind: str) -> None:
    head, h = a_head(seed, kind), states(seed)
    planted = normal(seed + 5, WIDTH, rank) @ normal(seed + 6, rank, WIDTH) / 5
    edit = h @ planted + normal(seed + 7, WIDTH)
    expert = head(h + edit)
    path = fit_moments(by_fold(h, edit, FOLDS), head, metric_of(head, expert), penalty=0.0)
    adapters = [path.at(r) for r in (rank - 1, rank)]
    torch.testing.assert_close(adapters[1].edit(h), edit, rtol=1e-6, atol=1e-6)
    below, reached = (float(kl_divergence(expert, adapter.logits(h, head)).mean()) for adapter in adapters)
    assert reached < 1e-10 and below > 100 * reached


def test_the_expert_of_the_study_is_recovered_below_a_millionth_with_the_penalty_that_folds_choose() -> None:
    head, h = a_head(0), states(0)
    head = head.to(torch.float32)  # as models have it: states and logits in float32
    expert = SyntheticExpert.draw(WIDTH, 2).with_effect(0.5, head, h.float())
    logits = head(expert.states(h.float()))
    path = fit_moments(by_fold(h.float(), expert.edit(h.float()), FOLDS), head, metric_of(head, logits))
    kl = [float(kl_divergence(logits, path.at(rank).logits(h.float(), head)).mean()) for rank in (1, 2)]
    assert kl[0] > 1e-3 and kl[1] < 1e-6


@given(seeds, st.integers(0, WIDTH), st.sampled_from(KINDS), st.booleans())
def test_equal_maps_give_equal_logits_in_both_coordinates(seed: int, rank: int, kind: str, intercept: bool) -> None:
    head, h = a_head(seed, kind), states(seed)
    state = random_adapter(seed, head, rank, intercept=intercept)
    vocabulary = replace(state, space="vocabulary", up=head.weight @ state.up, shift=head.weight @ state.shift)
    product = head.product(h + state.edit(h)) + (0 if state.intercept is None else state.intercept)
    torch.testing.assert_close(state.logits(h, head), head.finish(product), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(vocabulary.logits(h, head), state.logits(h, head), rtol=1e-9, atol=1e-9)


@given(seeds, st.sampled_from(KINDS), st.sampled_from(["state", "vocabulary"]), st.booleans())
def test_an_adapter_of_zeros_leaves_the_base_bit_for_bit(seed: int, kind: str, space: str, intercept: bool) -> None:
    head, h = a_head(seed, kind).to(torch.float32), states(seed).float()
    made = random_adapter(seed, head, 2, space, intercept)
    made = replace(
        made,
        up=torch.zeros_like(made.up),
        shift=torch.zeros_like(made.shift),
        intercept=None if made.intercept is None else torch.zeros_like(made.intercept),
    )
    assert torch.equal(made.logits(h, head), head(h))


def test_logits_keep_the_dtype_of_the_head() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        head = a_head(0, "all three").to(dtype)
        for space in ("state", "vocabulary"):
            adapter = random_adapter(0, head, 2, space, intercept=True)
            assert adapter.logits(states(0).to(dtype), head).dtype == dtype
            assert adapter.edit(states(0).to(dtype)).dtype == torch.float64


@given(seeds, st.floats(1e-6, 1e2))
def test_no_rank_is_worse_than_that_of_the_study_and_each_lowers_the_error(seed: int, noise: float) -> None:
    head, h = a_head(seed), states(seed)
    edit = h @ normal(seed + 5, WIDTH, WIDTH) / 5 + noise * normal(seed + 6, COUNT, WIDTH)
    moments, metric = Moments.of(h, edit), metric_of(head, head(h + edit))
    path, other = fit_moments([moments], head, metric, penalty=RIDGE).path, truncated_ridge(h, edit)

    def objective(fitted: LinearMap) -> float:
        shrinkage = (fitted.weight.T @ fitted.weight * metric).sum()
        return float(squared_error(moments, fitted, metric) + RIDGE * shrinkage)

    found = [objective(path.at(rank)) for rank in range(WIDTH + 1)]
    truncated = [objective(other.at(rank)) for rank in range(WIDTH + 1)]
    assert all(np.diff(found) <= 1e-9 * found[0])
    assert all(ours <= theirs + 1e-9 * found[0] for ours, theirs in zip(found, truncated, strict=True))
    assert found[-1] == pytest.approx(truncated[-1], rel=1e-5, abs=1e-8 * found[0])  # full rank: one and the same
    assert found[1] < 0.999 * truncated[1]


@given(seeds, st.integers(1, COUNT), st.integers(0, WIDTH))
def test_the_fit_from_a_stream_is_the_fit_from_all_at_once(seed: int, batch: int, rank: int) -> None:
    head, h = a_head(seed), states(seed)
    edit = normal(seed + 5, COUNT, WIDTH)
    metric = metric_of(head, head(h + edit))
    whole = [Moments.of(h[k::4], edit[k::4]) for k in range(4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chassis_utils.linalg.moments.ROWS", batch)
        parts = by_fold(h, edit, FOLDS)
    streamed, at_once = (fit_moments(folds, head, metric).at(rank).edit(h) for folds in (parts, whole))
    torch.testing.assert_close(streamed, at_once, rtol=1e-6, atol=1e-6)


def test_the_penalty_is_the_one_that_the_folds_choose_unless_it_is_given() -> None:
    head, h = a_head(0), states(0)
    sizes = torch.tensor([1.0, 1.0, 1.0, 0.05, 0.05, 0.05])
    edit = 0.05 * h @ normal(5, WIDTH, WIDTH) * sizes + normal(6, COUNT, WIDTH)
    metric, folds = metric_of(head, head(h + edit)), by_fold(h, edit, FOLDS)
    for given_penalty, penalty in ((None, choose_penalty(folds, metric)[0]), (0.5, 0.5)):
        expected = reduced_rank(merge(folds), penalty, metric)
        torch.testing.assert_close(
            fit_moments(folds, head, metric, given_penalty).path.left, expected.left, rtol=0, atol=0
        )
    assert choose_penalty(folds, metric)[0] not in (0.5, choose_penalty(folds)[0], choose_penalty(folds[:2], metric)[0])


@pytest.mark.parametrize("rank", [-1, WIDTH + 1])
def test_a_rank_beyond_the_limit_is_refused(rank: int) -> None:
    path = fit_moments(by_fold(states(0), normal(5, COUNT, WIDTH), FOLDS), a_head(0))
    with pytest.raises(ValueError, match=f"rank {rank} is beyond the limit: these moments give ranks 0 to {WIDTH}"):
        path.at(rank)


@given(seeds, st.integers(0, WIDTH), st.sets(st.integers(0, VOCABULARY - 1)))
def test_parameters_are_the_numbers_that_must_be_stored(seed: int, rank: int, tokens: set[int]) -> None:
    head = a_head(seed)
    assert random_adapter(seed, head, rank).parameters == 2 * WIDTH * rank + WIDTH
    assert random_adapter(seed, head, rank, intercept=True).parameters == 2 * WIDTH * rank + WIDTH + VOCABULARY
    whole = random_adapter(seed, head, rank, "vocabulary")
    assert whole.parameters == (WIDTH + VOCABULARY) * rank + VOCABULARY
    left_alone = [token for token in range(VOCABULARY) if token not in tokens]
    up, shift = whole.up.clone(), whole.shift.clone()
    up[left_alone], shift[left_alone] = 0.0, 0.0
    some = replace(whole, up=up, shift=shift)
    assert some.parameters == WIDTH * rank + len(tokens) * (rank + 1)


@given(seeds, st.sampled_from(["plain", "bias"]))
def test_a_constant_shift_of_the_logits_is_exact_at_rank_0_with_the_intercept_and_not_without(
    seed: int, kind: str
) -> None:
    head, h = a_head(seed, kind), states(seed)
    shift = torch.zeros(VOCABULARY, dtype=torch.float64)
    shift[normal(seed + 5, VOCABULARY).topk(8).indices] = 4.0  # as in the study's logit-bias expert
    expert = head(h) + shift
    edits, intercept = state_edits(expert - head(h), head, expert.softmax(-1).mean(0))
    moments, metric = by_fold(h, edits, FOLDS), metric_of(head, expert)
    exact, without = (fit_moments(moments, head, metric, 1.0, constant).at(0) for constant in (intercept, None))
    assert float(kl_divergence(expert, exact.logits(h, head)).max()) < 1e-10
    assert float(kl_divergence(expert, without.logits(h, head)).mean()) > 1e-8
    assert exact.parameters == WIDTH + VOCABULARY


@given(seeds, st.integers(1, WIDTH), st.sampled_from(KINDS))
def test_changes_of_the_product_are_split_into_edits_and_an_intercept(seed: int, rank: int, kind: str) -> None:
    head, h = a_head(seed, kind), states(seed)
    edit = h @ normal(seed + 5, WIDTH, rank) @ normal(seed + 6, rank, WIDTH) / 5
    constant, noise = normal(seed + 7, VOCABULARY), normal(seed + 8, COUNT, 1)
    delta = edit @ head.weight.T + constant + noise  # and the same number for all tokens, which softmax ignores
    p = normal(seed + 9, VOCABULARY).softmax(-1)
    edits, intercept = state_edits(delta, head, p)
    torch.testing.assert_close(edits - edits.mean(0), edit - edit.mean(0), rtol=1e-6, atol=1e-6)
    path = fit_moments(by_fold(h, edits, FOLDS), head, vocabulary_metric(head.weight, p), 0.0, intercept)
    adapted = path.at(rank).logits(h, head)
    expert = head.finish(head.product(h) + edit @ head.weight.T + constant)
    if kind in ("plain", "bias", "scale"):  # then what softmax ignores is ignored behind the head too
        assert float(kl_divergence(expert, adapted).max()) < 1e-9
    product = head.product(h + edits) + intercept + noise - noise.mean()
    torch.testing.assert_close(head.finish(product), head.finish(head.product(h) + delta), rtol=1e-6, atol=1e-6)


@given(seeds)
def test_state_edits_are_the_weighted_projection(seed: int) -> None:
    head, delta = a_head(seed), normal(seed + 5, COUNT, VOCABULARY)
    p = normal(seed + 6, VOCABULARY).softmax(-1)
    edits, intercept = state_edits(delta, head, p)
    omega = torch.diag(p) - torch.outer(p, p)
    values, vectors = torch.linalg.eigh(omega)
    root = vectors * values.clamp_min(0).sqrt()
    solved = torch.linalg.lstsq(root.T @ head.weight, root.T @ delta.T).solution.T
    torch.testing.assert_close(edits, solved, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close((edits @ head.weight.T + intercept).mean(0), delta.mean(0), rtol=1e-9, atol=1e-9)


@given(seeds, st.integers(1, WIDTH))
def test_regression_on_state_edits_is_regression_on_the_changes_themselves(seed: int, rank: int) -> None:
    head, h, delta = a_head(seed), states(seed), normal(seed + 5, COUNT, VOCABULARY)
    p = normal(seed + 6, VOCABULARY).softmax(-1)
    omega = torch.diag(p) - torch.outer(p, p)
    edits, _ = state_edits(delta, head, p)
    path = fit_moments(by_fold(h, edits, FOLDS), head, vocabulary_metric(head.weight, p), 1e-9).path

    def error(weight: Tensor) -> float:
        residual = (h - h.mean(0)) @ weight @ head.weight.T - (delta - delta.mean(0))
        return float((residual @ omega * residual).sum())

    best = error(path.at(rank).weight)
    left, right = path.left[:, :rank], path.right[:, :rank]
    for k in range(5):  # no other map of this rank is closer to the changes, near by or further off
        size = 10.0 ** -(k + 1)
        moved = (left + size * normal(seed + 7 + k, *left.shape)) @ (
            right + size * normal(seed + 20 + k, *right.shape)
        ).T
        assert error(moved) >= best * (1 - 1e-9)


@given(seeds, st.integers(0, WIDTH), st.sampled_from(["state", "vocabulary"]), st.booleans(), st.sampled_from(KINDS))
def test_an_adapter_comes_back_from_its_files(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rank: int, space: str, intercept: bool, kind: str
) -> None:
    head, h, folder = a_head(seed, kind), states(seed), tmp_path_factory.mktemp("adapter") / "deep" / "er"
    adapter = random_adapter(seed, head, rank, space, intercept)
    adapter.save_pretrained(folder)
    adapter.save_pretrained(folder)  # over what is there
    assert sorted(file.name for file in folder.iterdir()) == ["adapter.safetensors", "adapter_config.json"]
    back = Adapter.from_pretrained(str(folder), head)
    assert (back.space, back.rank, back.head_fingerprint, back.parameters) == (
        space,
        rank,
        head.fingerprint,
        adapter.parameters,
    )
    assert (back.intercept is None) == (not intercept)
    torch.testing.assert_close(back.logits(h, head), adapter.logits(h, head), rtol=1e-5, atol=1e-5)


def test_the_files_hold_float32_and_what_the_adapter_belongs_to(tmp_path: Path) -> None:
    adapter = random_adapter(0, a_head(0), 2, intercept=True)
    adapter.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config == {"format": 2, "space": "state", "rank": 2, "head": adapter.head_fingerprint}
    size = (tmp_path / "adapter.safetensors").stat().st_size
    assert 4 * adapter.parameters < size < 4 * adapter.parameters + 400


def test_another_head_is_refused_on_reading_and_on_use(tmp_path: Path) -> None:
    head, other = a_head(0), a_head(0, "bias")
    adapter = random_adapter(0, head, 2)
    adapter.save_pretrained(tmp_path)
    sentence = (
        f"this adapter was fitted to the head {head.fingerprint}, not to {other.fingerprint}: "
        "plug it into the base that it was made for, or fit it anew"
    )
    for use in (lambda: Adapter.from_pretrained(tmp_path, other), lambda: adapter.logits(states(0), other)):
        with pytest.raises(ValueError, match=sentence):
            use()


@pytest.mark.parametrize("missing", ["adapter.safetensors", "adapter_config.json"])
def test_a_folder_without_one_of_the_files_says_which(missing: str, tmp_path: Path) -> None:
    random_adapter(0, a_head(0), 2).save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / missing).unlink()
    with pytest.raises(
        ValueError, match=f"'mine' holds no adapter, {missing} is missing: name a folder that was saved"
    ):
        Adapter.from_pretrained(tmp_path / "mine", a_head(0))
    with pytest.raises(ValueError, match=r"'nowhere' holds no adapter, adapter_config\.json is missing"):
        Adapter.from_pretrained(tmp_path / "nowhere", a_head(0))


def test_a_format_that_is_not_known_is_refused(tmp_path: Path) -> None:
    random_adapter(0, a_head(0), 2).save_pretrained(tmp_path / "mine")
    config = tmp_path / "mine" / "adapter_config.json"
    config.write_text(config.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(ValueError, match="adapter 'mine' has format 3, 2 is read: save it anew"):
        Adapter.from_pretrained(tmp_path / "mine", a_head(0))


def test_a_disk_that_fills_up_leaves_the_last_good_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = a_head(0)
    first = random_adapter(0, head, 2)
    first.save_pretrained(tmp_path)

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        random_adapter(1, head, 2).save_pretrained(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    torch.testing.assert_close(Adapter.from_pretrained(tmp_path, head).down, first.down.float().double())


@given(seeds, st.integers(1, WIDTH))
def test_an_untouched_adapter_is_the_base(seed: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    head, h = Head(torch.randn(20, WIDTH, generator=generator)), torch.randn(5, WIDTH, generator=generator)
    adapter = Adapter.untouched(head, rank)
    assert adapter.rank == rank
    torch.testing.assert_close(adapter.logits(h, head), head(h), rtol=1e-6, atol=1e-6)
