"""Editing at the last token through kept keys and values is the full pass with the same hooks."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, Build
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import regression_data, seeds, semidefinite
from torch import Tensor
from transformers import Gemma2Config, PhiConfig, PreTrainedModel

from chassis_utils.limits import psutil
from chassis_utils.linalg.moments import Moments
from chassis_utils.linalg.regression import reduced_rank
from chassis_utils.lm import forward, states
from chassis_utils.lm.last_token import DAMPING, PROBE, Prefixes, pull_back, response
from chassis_utils.lm.model import LanguageModel, load
from chassis_utils.lm.states import collect

TEXTS = ["One day", "", "A cat sat on the mat and looked at the moon for a long time.", "Go", "What is 3 + 4? Show it."]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache for each test."""
    monkeypatch.setattr(states, "CACHE", tmp_path)


@pytest.fixture(params=["stories", "tiny_llama_model", "tiny_gpt2", "tiny_phi"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    """A real checkpoint, and three architectures."""
    return request.getfixturevalue(request.param)


def full_pass(model: LanguageModel, text: str, edits: Mapping[int, Callable[[Tensor], Tensor]]) -> Tensor:
    """States [depth + 1, width] at the last token of one text, hooks adding to the inputs of the blocks."""
    seen: dict[int, Tensor] = {}

    def hook(layer: int) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def before(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            h = inputs[0].clone()
            seen[layer] = h[0, -1].clone()
            if layer in edits:
                h[:, -1] += edits[layer](h[:, -1]).to(h.dtype)
            return (h, *inputs[1:])

        return before

    hooks = [block.register_forward_pre_hook(hook(layer)) for layer, block in enumerate(model.blocks)]
    with torch.inference_mode():
        last = model.network.base_model(torch.tensor(model.encode([text])), use_cache=False).last_hidden_state
    for handle in hooks:
        handle.remove()
    return torch.stack([*(seen[layer] for layer in range(model.depth)), last[0, -1]])


def tenth(h: Tensor) -> Tensor:
    """An edit that depends on the state, not linearly."""
    return 0.1 * h.flip(-1) + 0.05 * h.abs()


def test_finishing_without_edits_gives_the_states_of_ragged_prompts(model: LanguageModel) -> None:
    assert {len(ids) for ids in model.encode(TEXTS)} >= {1}  # among them one without a prefix
    torch.testing.assert_close(Prefixes.of(model, TEXTS).finish(), collect(model, TEXTS), rtol=1e-5, atol=1e-5)


def test_prompts_of_one_token_alone_have_an_empty_prefix(model: LanguageModel) -> None:
    prefixes = Prefixes.of(model, ["", ""])
    for _ in range(2):
        torch.testing.assert_close(prefixes.finish(), collect(model, ["", ""]), rtol=1e-5, atol=1e-5)


def test_prompts_keep_their_order_over_several_batches(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = collect(model, TEXTS)
    edits = torch.randn(len(TEXTS), model.width, generator=torch.Generator().manual_seed(0))
    moved = Prefixes.of(model, TEXTS).finish({1: edits})
    monkeypatch.setattr(forward, "BATCH_TOKENS", 12)
    prefixes = Prefixes.of(model, TEXTS)
    assert len(prefixes.read) > 1
    torch.testing.assert_close(prefixes.finish(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prefixes.finish({1: edits}), moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [[0], [1], [0, 1]], ids=str)
def test_edits_are_those_of_a_full_pass_with_hooks(model: LanguageModel, layers: list[int]) -> None:
    edits = dict.fromkeys(layers, tenth)
    found = Prefixes.of(model, TEXTS).finish(edits)
    for k, text in enumerate(TEXTS):
        torch.testing.assert_close(found[:, k], full_pass(model, text, edits), rtol=1e-4, atol=1e-4)
    untouched = collect(model, TEXTS)
    first = layers[0]  # its own edit is not in a layer's states
    torch.testing.assert_close(found[: first + 1], untouched[: first + 1], rtol=1e-5, atol=1e-5)
    assert float((found[first + 1 :] - untouched[first + 1 :]).abs().amin(0).max()) > 1e-2


def test_calls_leave_no_trace(model: LanguageModel) -> None:
    prefixes = Prefixes.of(model, TEXTS)
    first = prefixes.finish()
    once, again = prefixes.finish({1: tenth}), prefixes.finish({1: tenth})
    assert torch.equal(once, again)
    assert torch.equal(prefixes.finish(), first)


def test_after_an_edit_that_failed_the_prefixes_still_hold(model: LanguageModel) -> None:
    prefixes = Prefixes.of(model, TEXTS)
    first = prefixes.finish()

    def broken(_: Tensor) -> Tensor:
        raise RuntimeError("an edit that fails")

    with pytest.raises(RuntimeError, match="an edit that fails"):
        prefixes.finish({1: broken})
    assert not any(block._forward_pre_hooks for block in model.blocks)
    assert torch.equal(prefixes.finish(), first)


def test_a_tensor_edits_as_the_function_that_gives_it(model: LanguageModel) -> None:
    prefixes = Prefixes.of(model, TEXTS)
    rows = tenth(prefixes.finish()[1])
    torch.testing.assert_close(prefixes.finish({1: rows}), prefixes.finish({1: tenth}), rtol=1e-6, atol=1e-6)
    wide = prefixes.finish({1: rows.double()})
    torch.testing.assert_close(wide, prefixes.finish({1: rows}), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", [-1, 2, 3])
def test_an_edit_that_no_block_follows_is_refused(layer: int, tiny_llama_model: LanguageModel) -> None:
    prefixes = Prefixes.of(tiny_llama_model, TEXTS)
    with pytest.raises(ValueError, match=f"an edit at layer {layer} has no block after it: use 0 to 1"):
        prefixes.finish({layer: tenth})


@pytest.mark.parametrize("texts", [TEXTS[2:3], TEXTS], ids=["equal lengths", "ragged"])
def test_windows_that_slide_are_read_as_a_full_pass_reads_them(texts: list[str], build: Build) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=VOCABULARY, num_key_value_heads=1, head_dim=8, sliding_window=8, **sizes)
    model = load(str(build(config)))
    prefixes = Prefixes.of(model, texts)
    for _ in range(2):
        torch.testing.assert_close(prefixes.finish(), collect(model, texts), rtol=1e-5, atol=1e-5)


def test_too_little_memory_says_so_before_the_pass(
    tiny_llama_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"available": 0}))
    with pytest.raises(MemoryError, match=r"for the keys and values of 5 prompts are needed, 0 MiB are free"):
        Prefixes.of(tiny_llama_model, TEXTS)


def linear(network: PreTrainedModel) -> None:
    """Make the blocks linear: nothing attends, and norms whose epsilon dwarfs all variances divide by a constant."""
    for block in network.model.layers:
        block.self_attn.dense.weight.zero_()
        block.input_layernorm.weight.copy_(1e3 * (1 + block.input_layernorm.weight))
        block.mlp.fc1.weight.mul_(3)
    network.model.final_layernorm.weight.mul_(1e3)


WORDS = [f"{a} {b}" for a in ("A cat", "One day", "The moon", "She", "3 + 4") for b in "abcdefghijklmnopqrst"]


def test_the_response_of_linear_blocks_is_their_product(build: Build) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = PhiConfig(vocab_size=VOCABULARY, layer_norm_eps=1e6, hidden_act="linear", **sizes)
    model = load(str(build(config, linear)))
    eye = torch.eye(16, dtype=torch.float64)

    def norm(module: torch.nn.Module) -> Tensor:
        return (eye - 1 / 16) * module.weight.double() / 1e3

    exact = eye
    for block in model.blocks[1:]:
        inner = norm(block.input_layernorm) @ block.mlp.fc1.weight.double().T
        exact = exact @ (eye + inner @ block.mlp.fc2.weight.double().T)
    exact = exact @ norm(model.final_norm)
    prefixes = Prefixes.of(model, WORDS)
    h = prefixes.finish()[1].double()
    wanted, found = (h - h.mean(0)) @ exact, (h - h.mean(0)) @ response(prefixes, 1)
    assert float((found - wanted).norm() / wanted.norm()) < 0.01
    without = (h - h.mean(0)) @ norm(model.final_norm)
    assert float((without - wanted).norm() / wanted.norm()) > 0.2  # the blocks do something


def test_the_response_is_the_mean_derivative_of_blocks_that_are_not_linear(tiny_llama_model: LanguageModel) -> None:
    prefixes = Prefixes.of(tiny_llama_model, [f"{word}{mark}" for word in WORDS for mark in ("", " is", ".", " 7")])
    h = prefixes.finish()[1].double()
    mean = []
    for direction in torch.eye(16):
        plus, minus = (prefixes.finish({1: sign * 1e-2 * direction.expand(len(h), -1)})[-1] for sign in (1, -1))
        mean.append(((plus - minus).double() / 2e-2).mean(0))
    wanted = (h - h.mean(0)) @ torch.stack(mean)
    found = [(h - h.mean(0)) @ response(prefixes, 1, seed) for seed in range(4)]
    errors = [float((one - wanted).norm() / wanted.norm()) for one in [*found, torch.stack(found).mean(0)]]
    assert max(errors) < 0.3 and errors[-1] < 0.15
    assert errors[-1] < 0.7 * min(errors[:-1])  # what remains is the noise of the draw
    assert not torch.equal(found[0], found[1]) and torch.equal(response(prefixes, 1, 3), response(prefixes, 1, 3))


def test_the_response_is_measured_with_small_edits_that_look_like_states(
    tiny_llama_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefixes = Prefixes.of(tiny_llama_model, WORDS * 4)
    h, tried, finish = prefixes.finish()[1].double(), [], Prefixes.finish

    def noting(self: Prefixes, edits: Mapping[int, Tensor] | None = None) -> Tensor:
        if edits:
            tried.append(edits[1].clone())
        return finish(self, edits)

    monkeypatch.setattr(Prefixes, "finish", noting)
    response(prefixes, 1)
    plus, minus = tried
    assert torch.equal(plus, -minus)
    covariance, expected = plus.T.cov(), PROBE**2 * h.T.cov()
    assert float((covariance - expected).norm() / expected.norm()) < 0.3
    assert float(covariance.trace() / expected.trace()) == pytest.approx(1, abs=0.1)


def propagated(
    x: Tensor, m: Tensor, b: Tensor, j: Tensor, metric: Tensor, mu: float, penalty: float, e: Tensor
) -> float:
    """What editing an earlier layer by x M + b costs behind the linear response, size and shrinkage included."""
    added = x @ m + b
    residual = added @ j - e
    damped = j @ metric @ j.T + mu * torch.eye(len(j), dtype=torch.float64)
    shrinkage = penalty * (m.T @ m * damped).sum()
    return float((residual @ metric * residual).sum() + mu * added.square().sum() + shrinkage)


def pulled(seed: int) -> tuple[Tensor, ...]:
    """Inputs, last edits, a response, a metric; and what `pull_back` makes of them."""
    x, edits = regression_data(seed, d_x=4, d_y=4)
    j, metric = regression_data(seed + 1, n=4, d_x=4)[1] / 10, semidefinite(seed, 4, 3)
    return x, edits, j, metric, *pull_back(edits, j, metric)


@given(seeds)
def test_the_pulled_back_edit_of_each_prompt_is_a_damped_least_squares(seed: int) -> None:
    _, edits, j, metric, y, damped = pulled(seed)
    plain = j @ metric @ j.T
    mu = DAMPING * float(torch.linalg.eigvalsh(plain).mean())
    torch.testing.assert_close(damped, plain + mu * torch.eye(4, dtype=torch.float64))
    values, vectors = np.linalg.eigh(metric.numpy())
    root = vectors * np.maximum(values, 0) ** 0.5
    rows = np.vstack([root.T @ j.numpy().T, mu**0.5 * np.eye(4)])
    targets = np.vstack([root.T @ edits.numpy().T, np.zeros((4, len(edits)))])
    np.testing.assert_allclose(y.T, np.linalg.lstsq(rows, targets)[0], rtol=1e-6, atol=1e-6)


@settings(max_examples=12)
@given(seeds, st.integers(1, 4), st.floats(1e-3, 1e2))
def test_regression_on_pulled_back_edits_is_regression_through_the_blocks(seed: int, rank: int, penalty: float) -> None:
    x, edits, j, metric, y, damped = pulled(seed)
    mu = float((damped - j @ metric @ j.T).trace()) / 4
    path = reduced_rank(Moments.of(x, y), penalty, damped)
    found = path.at(rank)
    best = propagated(x, found.weight, found.bias, j, metric, mu, penalty, edits)
    generator = torch.Generator().manual_seed(seed)
    tried = [path.left[:, :rank], torch.randn(4, rank, generator=generator, dtype=torch.float64)]
    for left in tried:  # alternating least squares, in the raw unknowns, from our factors and from elsewhere
        for _ in range(8):
            right, b = half_step(x, left, None, j, metric, mu, penalty, edits)
            left, b = half_step(x, None, right, j, metric, mu, penalty, edits)
        reached = propagated(x, left @ right, b, j, metric, mu, penalty, edits)
        assert best <= reached * (1 + 1e-9)
    assert rank < 4 or best == pytest.approx(reached, rel=1e-9)  # which full rank reaches at once


def half_step(
    x: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    j: Tensor,
    metric: Tensor,
    mu: float,
    penalty: float,
    e: Tensor,
) -> tuple[Tensor, Tensor]:
    """The best other factor of M = left right, and bias: Kronecker least squares on the objective's own rows."""
    eye, n = np.eye(4), len(x)
    values, vectors = np.linalg.eigh(metric.numpy())
    root = vectors * np.maximum(values, 0) ** 0.5
    damped = np.linalg.cholesky((j @ metric @ j.T).numpy() + mu * eye)
    inner = (x if left is None else x @ left).numpy()
    shrunk = penalty**0.5 * (eye if left is None else left.numpy())
    behind = eye if right is None else right.numpy()
    parts = [  # rows on the unknown factor, rows on b, targets
        (
            np.kron(inner, (behind @ j.numpy() @ root).T),
            np.kron(np.ones((n, 1)), (j.numpy() @ root).T),
            e.numpy() @ root,
        ),
        (mu**0.5 * np.kron(inner, behind.T), mu**0.5 * np.kron(np.ones((n, 1)), eye), np.zeros((n, 4))),
        (np.kron(shrunk, (behind @ damped).T), np.zeros((16, 4)), np.zeros((4, 4))),
    ]
    rows = np.vstack([np.hstack(part[:2]) for part in parts])
    solved = torch.from_numpy(np.linalg.lstsq(rows, np.vstack([part[2] for part in parts]).ravel())[0])
    return solved[:-4].view(inner.shape[1], behind.shape[0]), solved[-4:]
