"""The constructions of the earlier studies, against a second transcription in numpy, and the flaw of each."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import regression_data, seeds

from chassis_utils.adapters.fit import AdapterPath, fit_moments
from chassis_utils.adapters.refine import Examples, by_adam
from chassis_utils.as_reported.adapters import (
    RIDGE,
    as_state_edit,
    hidden_to_hidden,
    largest_columns,
    layer_lens,
    method_a,
    projected_alignment,
    random_basis,
    truncated_ridge,
)
from chassis_utils.as_reported.fft import reported_forward
from chassis_utils.circulant.layer import BlockCirculantLinear
from chassis_utils.experts.synthetic import SyntheticExpert
from chassis_utils.linalg.moments import Moments
from chassis_utils.linalg.regression import reduced_rank
from chassis_utils.lm.model import Head
from chassis_utils.metrics import kl_divergence

WIDTH, VOCABULARY = 6, 64  # 6.4 percent of them are 4
COLUMNS = {"none left out": torch.arange(VOCABULARY), "6.4 percent": None}

Factors = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # U, S, V, d


def ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ridge 1e-3 on centred data, with the intercept, as the CHASSIS study wrote it."""
    centred = x - x.mean(0)
    weight = np.linalg.inv(centred.T @ centred + 1e-3 * np.eye(x.shape[1])) @ centred.T @ (y - y.mean(0))
    return weight, y.mean(0) - x.mean(0) @ weight


def study_a(h: np.ndarray, expert: np.ndarray, w: np.ndarray, count: int) -> tuple[np.ndarray, Factors]:
    """The CHASSIS study's rank sweep: its columns, and U, S, V, d of full rank."""
    weight, bias = ridge(h, expert)
    kept = np.argsort(-np.sqrt((weight**2).sum(0)))[:count]
    delta = (h @ weight[:, kept] + bias[kept]) - (h @ w.T)[:, kept]
    b, d = ridge(h, delta)
    u, s, vt = np.linalg.svd(b, full_matrices=False)
    return kept, (u, s, vt.T, d)


def change(h: np.ndarray, factors: Factors, rank: int) -> np.ndarray:
    """((h U_r) S_r) V_r^T + d."""
    u, s, v, d = factors
    return ((h @ u[:, :rank]) * s[:rank]) @ v[:, :rank].T + d


def study_b(h: np.ndarray, expert_states: np.ndarray, rank: int) -> np.ndarray:
    """Hidden to hidden: h + h A_r + b."""
    a, b = ridge(h, expert_states)
    u, s, vt = np.linalg.svd(a)
    return h + h @ (u[:, :rank] @ np.diag(s[:rank]) @ vt[:rank]) + b


def study_stack(
    states: list[np.ndarray], expert: np.ndarray, w: np.ndarray, layers: list[int], ranks: list[int], count: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """States edited in a copied list, by logit deltas times the rows of the head; then the logits."""
    edited = [h.copy() for h in states]
    for layer, rank in zip(layers, ranks, strict=True):
        kept, factors = study_a(states[layer], expert, w, count)
        edited[layer] = edited[layer] + change(edited[layer], factors, rank) @ w[kept]
    return edited, edited[-1] @ w.T


def study_c(
    h: np.ndarray, expert: np.ndarray, w: np.ndarray, kept: np.ndarray, start: Factors, batches: list[np.ndarray]
) -> list[np.ndarray]:
    """Adam (1e-2) on U, log S, V, d under KL(expert || adapted): the four after all batches."""
    p = np.exp(expert - expert.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    u, s, v, d = start
    factors = [u.copy(), np.log(s), v.copy(), d.copy()]
    first, second = ([np.zeros_like(part) for part in factors] for _ in range(2))
    for step, rows in enumerate(batches, 1):
        u, log_s, v, d = factors
        inner, s = h[rows] @ u, np.exp(log_s)
        z = h[rows] @ w.T
        z[:, kept] += (inner * s) @ v.T + d
        q = np.exp(z - z.max(1, keepdims=True))
        g = ((q / q.sum(1, keepdims=True) - p[rows]) / len(rows))[:, kept]  # d KL / d logit
        gradients = [h[rows].T @ (g @ v * s), (g @ v * inner * s).sum(0), g.T @ (inner * s), g.sum(0)]
        for k, gradient in enumerate(gradients):
            first[k] = 0.9 * first[k] + 0.1 * gradient
            second[k] = 0.999 * second[k] + 0.001 * gradient**2
            size = np.sqrt(second[k] / (1 - 0.999**step)) + 1e-8
            factors[k] = factors[k] - 1e-2 * first[k] / (1 - 0.9**step) / size
    return factors


def problem(
    seed: int, layers: int = 1, effect: float = 0.5
) -> tuple[Head, list[torch.Tensor], torch.Tensor, SyntheticExpert]:
    """A head, states of some layers, the expert's logits and the expert, whose edit has rank 2."""
    generator = torch.Generator().manual_seed(seed)
    head = Head(torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64))
    states = list(torch.randn(layers, 96, WIDTH, generator=generator, dtype=torch.float64))
    expert = SyntheticExpert.draw(WIDTH, 2, seed % 1000).with_effect(effect, head, states[-1])
    return head, states, head(expert.states(states[-1])), expert


@given(seeds)
def test_layer_lens_is_the_ridge_of_the_study(seed: int) -> None:
    h, logits = regression_data(seed, d_y=7)
    weight, bias = ridge(h.numpy(), logits.numpy())
    np.testing.assert_allclose(layer_lens(h, logits)(h), h.numpy() @ weight + bias, rtol=1e-6, atol=1e-6)


@given(seeds, st.integers(1, 5))
def test_projected_alignment_is_the_squeeze_of_the_study(seed: int, k: int) -> None:
    h, expert = regression_data(seed, d_y=5)
    basis = random_basis(5, k, seed % 1000)
    weight, bias = ridge((h @ basis).numpy(), (expert @ basis).numpy())
    lifted = ((h @ basis).numpy() @ weight + bias) @ basis.numpy().T
    found = projected_alignment(h, expert, basis)(h)
    np.testing.assert_allclose(found, lifted, rtol=1e-6, atol=1e-6)
    outside = torch.eye(5, dtype=torch.float64) - basis @ basis.T
    assert float((found @ outside).abs().max()) < 1e-9 * float(found.abs().max())  # the flaw: nothing else survives


@given(st.integers(1, 30), st.data(), st.integers(0, 1000))
def test_a_random_basis_is_orthonormal_and_decided_by_its_seed(width: int, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(1, width))
    basis = random_basis(width, k, seed)
    torch.testing.assert_close(basis.T @ basis, torch.eye(k, dtype=torch.float64))
    assert torch.equal(basis, random_basis(width, k, seed))


@given(seeds, st.integers(0, 4), st.sampled_from([0, -1]))
def test_method_a_is_the_rank_sweep_of_the_study(seed: int, rank: int, layer: int) -> None:
    head, states, expert, _ = problem(seed, layers=2)
    h = states[layer]  # 0 is a middle layer, that the head reads without the final norm
    kept, factors = study_a(h.numpy(), expert.numpy(), head.weight.numpy(), 4)
    adapted = h.numpy() @ head.weight.numpy().T
    adapted[:, kept] += change(h.numpy(), factors, rank)
    found = method_a(h, expert, head)
    assert set(found.columns.tolist()) == set(kept.tolist())
    np.testing.assert_allclose(found.at(rank).logits(h, head), adapted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("bias", "scale"), [(True, 1.0), (False, 0.25)], ids=["bias", "scale"])
def test_method_a_changes_the_logits_of_any_head_as_it_says(bias: bool, scale: float) -> None:
    head, (h,), _, _ = problem(0)
    head = Head(head.weight, head.weight[:, 0] if bias else None, scale)
    expert = head(SyntheticExpert.draw(WIDTH, 2).with_effect(0.5, head, h).states(h))
    lens, found = layer_lens(h, expert), method_a(h, expert, head)
    adapted = found.at(4).logits(h, head)[:, found.columns]
    torch.testing.assert_close(adapted, lens(h)[:, found.columns], rtol=1e-3, atol=1e-3)


def test_the_columns_are_the_share_of_the_study() -> None:
    generator = torch.Generator().manual_seed(0)
    h, logits = (torch.randn(50, n, generator=generator, dtype=torch.float64) for n in (3, 500))
    lens = layer_lens(h, logits)
    columns, norms = largest_columns(lens), lens.weight.norm(dim=0)
    assert len(columns) == 32  # 2048 of 32000
    assert norms[columns].min() > norms[~torch.isin(torch.arange(500), columns)].max()
    assert len(largest_columns(layer_lens(h, logits[:, :5]))) == 1


@given(seeds)
def test_method_a_leaves_all_but_its_columns_as_they_were(seed: int) -> None:
    head, (h,), expert, _ = problem(seed)
    found = method_a(h, expert, head)
    rest = ~torch.isin(torch.arange(VOCABULARY), found.columns)
    adapted = found.at(4).logits(h, head)
    assert torch.equal(adapted[:, rest], head(h)[:, rest])  # the flaw, where the expert does change them
    assert float((expert - head(h))[:, rest].abs().mean()) > 0.05
    assert found.at(4).parameters == WIDTH * 4 + 4 * 5


@given(seeds, st.integers(0, 4))
def test_truncation_moves_the_mean_and_a_reduced_rank_keeps_it(seed: int, rank: int) -> None:
    x, y = regression_data(seed)
    lost = (y - truncated_ridge(x, y).at(rank)(x)).mean(0)
    kept = (y - reduced_rank(Moments.of(x, y), 1e-3).at(rank)(x)).mean(0)
    assert float(kept.abs().max()) < 1e-6
    assert float(lost.norm()) < 1e-6 if rank == 4 else float(lost.norm()) > 1e-3


def test_truncation_spends_its_rank_on_large_weights_in_place_of_large_effects() -> None:
    inputs = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, y = inputs * torch.tensor([100.0, 1.0]), inputs * torch.tensor([10.0, 1.0])  # weights 0.1 and 1
    found, best = truncated_ridge(x, y).at(1)(x), reduced_rank(Moments.of(x, y), 1e-3).at(1)(x)
    lost, least = ((y - z - (y - z).mean(0)).square().mean(0) for z in (found, best))
    torch.testing.assert_close(lost, y.new_tensor([100.0, 0.0]), rtol=0.2, atol=1e-2)
    torch.testing.assert_close(least, y.new_tensor([0.0, 1.0]), rtol=0.2, atol=1e-2)


@given(seeds, st.integers(0, WIDTH))
def test_method_b_is_hidden_to_hidden_of_the_study(seed: int, rank: int) -> None:
    head, (h,), _, expert = problem(seed)
    adapter = AdapterPath(hidden_to_hidden(h, expert.states(h)), head, RIDGE, [], None).at(rank)
    found = h + adapter.edit(h)
    np.testing.assert_allclose(found, study_b(h.numpy(), expert.states(h).numpy(), rank), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(adapter.logits(h, head), head(found))


@given(seeds)
def test_method_b_counts_the_state_twice(seed: int) -> None:
    head, (h,), logits, expert = problem(seed, effect=0.01)
    path = hidden_to_hidden(h, expert.states(h))
    whole = h + path.at(WIDTH)(h)
    torch.testing.assert_close(whole - expert.states(h), h, rtol=1e-3, atol=1e-3)
    adapters = map(AdapterPath(path, head, RIDGE, [], None).at, range(7))
    kl = [float(kl_divergence(logits, adapter.logits(h, head)).mean()) for adapter in adapters]
    assert 0.005 < kl[0] < 0.02 and 5 * kl[0] < kl[1] < min(kl[2:])  # the more rank, the worse
    edit = fit_moments([Moments.of(h, expert.edit(h))], head, penalty=1e-9).at(2)
    assert float(kl_divergence(logits, edit.logits(h, head)).mean()) < 1e-9


@given(seeds)
def test_the_stack_is_that_of_the_study_and_only_its_last_edit_counts(seed: int) -> None:
    head, states, expert, _ = problem(seed, layers=4)
    layers, ranks = [1, 2, 3], [1, 2, 4]
    arrays = [h.numpy() for h in states]
    edited, logits = study_stack(arrays, expert.numpy(), head.weight.numpy(), layers, ranks, 4)
    adapters = [
        as_state_edit(method_a(states[layer], expert, head).at(rank), head)
        for layer, rank in zip(layers, ranks, strict=True)
    ]
    for layer, adapter in zip(layers, adapters, strict=True):
        found = states[layer] + adapter.edit(states[layer])
        np.testing.assert_allclose(found, edited[layer], rtol=1e-6, atol=1e-6 * np.abs(edited[layer]).max())
    found = adapters[-1].logits(states[-1], head)
    np.testing.assert_allclose(found, logits, rtol=1e-6, atol=1e-6 * np.abs(logits).max())
    alone = study_stack(arrays, expert.numpy(), head.weight.numpy(), [3], [4], 4)[1]
    assert np.array_equal(alone, logits)  # the flaw: the edits at layers 1 and 2 reach nothing


@given(seeds, st.integers(1, 20), st.integers(0, 3))
def test_the_transpose_scales_a_change_and_the_inverse_projects_it(seed: int, count: int, rank: int) -> None:
    head, (h,), expert, _ = problem(seed)
    found = method_a(h, expert, head, torch.arange(VOCABULARY).roll(seed % VOCABULARY)[:count])
    adapter = found.at(min(rank, count))
    wanted, w = adapter.edit(h)[:, found.columns], head.weight[found.columns]
    _, s, vt = torch.linalg.svd(w.T, full_matrices=False)  # rows of `vt`: what the state can do to these logits
    transposed, inverse = ((as_state_edit(adapter, head, how).edit(h)) @ w.T for how in (False, True))
    torch.testing.assert_close(transposed, wanted @ vt.T * s**2 @ vt, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(inverse, wanted @ vt.T @ vt, rtol=1e-7, atol=1e-7)
    residual = wanted - inverse  # of least squares: at right angles to all that the state can do
    assert float((residual @ w).abs().max()) < 1e-7 * (1 + float(wanted.abs().max()))
    assert count > WIDTH or float(residual.abs().max()) < 1e-7 * (1 + float(wanted.abs().max()))


@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
def test_method_c_is_adam_on_the_factors_as_the_study_ran_it(columns: torch.Tensor | None) -> None:
    head, (h,), expert, _ = problem(5)
    rank, passes = 1, 3  # below the expert's, so that there are gradients
    start = method_a(h, expert, head, columns)
    u, s, vt = np.linalg.svd((start.path.left[:, :rank] @ start.path.right[:, :rank].T).numpy(), full_matrices=False)
    shift = start.at(rank).shift[start.columns]
    generator = torch.Generator().manual_seed(7)
    orders = [torch.randperm(len(h), generator=generator).split(32) for _ in range(passes)]
    batches = [rows.numpy() for rows in itertools.chain(*orders)]
    kept, w = start.columns.numpy(), head.weight.numpy()
    factors = (u[:, :rank], s[:rank], vt[:rank].T, shift.numpy())
    u, log_s, v, d = study_c(h.numpy(), expert.numpy(), w, kept, factors, batches)
    adapted = h.numpy() @ w.T
    adapted[:, kept] += ((h.numpy() @ u) * np.exp(log_s)) @ v.T + d

    refined = by_adam(
        start.at(rank),
        head,
        examples := Examples(h, expert),
        examples,
        1e-2,
        relative=False,
        stopped=False,
        passes=passes,
        seed=7,
    )
    moved = np.abs(adapted - start.at(rank).logits(h, head).numpy()).max()
    found = refined.adapter.logits(h, head)
    np.testing.assert_allclose(found, adapted, rtol=0, atol=1e-3 * moved)
    rest = ~torch.isin(torch.arange(VOCABULARY), start.columns)
    assert torch.equal(found[:, rest], head(h)[:, rest])


@pytest.mark.parametrize("sizes", [(8, 12, 4), (7, 10, 4), (6, 9, 3)])
def test_the_forward_of_the_study_is_the_explicit_matrix(sizes: tuple[int, int, int]) -> None:
    layer = BlockCirculantLinear(*sizes)
    for parameter in layer.parameters():
        parameter.data.normal_()
    x = torch.randn(2, 3, sizes[0])
    torch.testing.assert_close(reported_forward(layer, x), x @ layer.to_dense().T + layer.bias)
