"""Layers are fitted where they stand: to real tokens alone, each to what those before it left."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import Build, tiny_llama
from samples import direct
from torch import Tensor, nn
from transformers import PreTrainedModel

from chassis_utils.circulant import replace as replace_module
from chassis_utils.circulant.activations import PairedForward
from chassis_utils.circulant.closed_form import CirculantMoments
from chassis_utils.circulant.layer import BlockCirculantLinear, average, expand
from chassis_utils.circulant.low_rank import LowRankLinear, equal_rank, low_rank
from chassis_utils.circulant.patch import as_linear, mlp_projections, patch
from chassis_utils.circulant.replace import collect, replacements
from chassis_utils.linalg.moments import Moments
from chassis_utils.lm import forward
from chassis_utils.lm.model import LanguageModel, load
from chassis_utils.text.prompts import Prompt

BLOCK = 4
TEXTS = [
    "One day a cat sat on the mat and looked at the moon.",
    "Go",
    "What is 3 + 4? Show the steps.",
    "Returns a copy of the array.",
    "The sum of two numbers is",
    "def area(width, height): return width *",
]
PROMPTS = [Prompt(text, text) for text in TEXTS]


@pytest.fixture(scope="module")
def exact(build: Build) -> LanguageModel:
    """A random Llama in float64."""
    return load(str(build(tiny_llama())), dtype=torch.float64)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every test fits its own layers."""
    monkeypatch.setattr(replace_module, "CACHE", tmp_path)


@torch.no_grad()
def logits(model: LanguageModel, text: str = TEXTS[0]) -> Tensor:
    return model.network(torch.tensor(model.encode([text]))).logits


@pytest.mark.parametrize("how", ["average", "aware"])
def test_where_the_weights_are_block_circulant_nothing_changes(build: Build, how: str) -> None:
    def plant(network: PreTrainedModel) -> None:
        for layer in range(2):
            for module in mlp_projections(network, layer).values():
                module.weight.copy_(expand(average(module.weight, BLOCK)))

    model = load(str(build(tiny_llama(), plant)), dtype=torch.float64)
    before = logits(model)
    with patch(model.network, replacements(model, [0, 1], BLOCK, how, PROMPTS)):
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def second_block(model: LanguageModel, first: dict[str, nn.Module]) -> PairedForward:
    walk = PairedForward(model, TEXTS)
    walk.advance(first)
    return walk


@pytest.mark.parametrize("name", ["tiny_llama_model", "tiny_gpt2", "tiny_phi"])
def test_a_padded_batch_counts_as_its_prompts_alone(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = request.getfixturevalue(name)
    first = replacements(model, [0], BLOCK, "average")
    for path in mlp_projections(model.network, 1):
        together = collect([second_block(model, first)], path, first, Moments.of)[0]
        with monkeypatch.context() as patched:
            patched.setattr(forward, "BATCH_TOKENS", 1)
            alone = collect([second_block(model, first)], path, first, Moments.of)[0]
        assert float(together.n) == sum(map(len, model.encode(TEXTS)))
        for part in ("n", "x_sum", "y_sum", "xx", "xy", "yy"):
            scale = float(getattr(alone, part).abs().max())
            torch.testing.assert_close(getattr(together, part), getattr(alone, part), rtol=0, atol=1e-5 * scale)


def seen(network: PreTrainedModel, path: str, model: LanguageModel) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of a module, each prompt by itself."""
    inputs, outputs = [], []
    hook = network.get_submodule(path).register_forward_hook(
        lambda _, x, y: (inputs.append(x[0][0]), outputs.append(y[0]), None)[-1]
    )
    with torch.no_grad():
        for ids in model.encode(TEXTS):
            network(torch.tensor([ids]))
    hook.remove()
    return torch.cat(inputs), torch.cat(outputs)


@pytest.mark.parametrize("sequential", [True, False])
def test_each_layer_is_least_squares_on_what_those_before_it_left(
    exact: LanguageModel, sequential: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replace_module, "choose_circulant_penalty", lambda *_: (0.5, {}))
    found = replacements(exact, [1, 0], BLOCK, "aware", PROMPTS, sequential)
    student = copy.deepcopy(exact.network)
    assert list(found) == [path for layer in (0, 1) for path in mlp_projections(student, layer)]
    for path, layer in found.items():
        x = seen(student if sequential else exact.network, path, exact)[0]
        linear = as_linear(exact.network.get_submodule(path))
        c, bias = direct(linear, x, seen(exact.network, path, exact)[1], BLOCK, 0.5)
        torch.testing.assert_close(layer.c.detach(), c, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(layer.bias.detach(), bias, rtol=1e-7, atol=1e-8)
        dense = nn.Linear(linear.in_features, linear.out_features, dtype=torch.float64)
        dense.weight.data = BlockCirculantLinear.of(linear, c, bias).to_dense().detach()
        dense.bias.data = bias
        student.set_submodule(path, dense)


def test_the_penalty_is_chosen_over_prompts(exact: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def spy(linear: nn.Linear, folds: list[CirculantMoments]) -> tuple[float, dict[float, float]]:
        sizes.append([float(fold.n) for fold in folds])
        return 1.0, {}

    monkeypatch.setattr(replace_module, "choose_circulant_penalty", spy)
    replacements(exact, [0], BLOCK, "aware", PROMPTS)
    counts = sorted(map(len, exact.encode(TEXTS)))
    assert [sorted(fold) for fold in sizes] == [counts] * 3  # six prompts: a fold each


def test_baselines_have_no_more_weights_and_stand_in_the_same_places(exact: LanguageModel) -> None:
    circulant = replacements(exact, [0], BLOCK, "average")
    for how in ("low_rank", "low_rank_aware"):
        found = replacements(exact, [0], BLOCK, how, PROMPTS)
        assert list(found) == list(circulant)
        for path, layer in found.items():
            assert isinstance(layer, LowRankLinear) and layer.rank > 0
            assert layer.down.numel() + layer.up.numel() <= circulant[path].c.numel()
            linear = as_linear(exact.network.get_submodule(path))
            plain = low_rank(linear, equal_rank(linear, BLOCK))
            same = torch.allclose(layer.up @ layer.down, plain.up @ plain.down)
            assert same == (how == "low_rank")


def test_zero_deletes_the_mlp(tiny_phi: LanguageModel, tiny_llama_model: LanguageModel) -> None:
    for model in (tiny_phi, tiny_llama_model):
        found = replacements(model, [1], BLOCK, "zero")
        assert len(found) == 1
        with patch(model.network, found):
            assert not model.network.model.layers[1].mlp(torch.randn(2, 3, 16)).any()


def test_the_model_is_left_as_it_was(exact: LanguageModel) -> None:
    before, modules = logits(exact), list(exact.network.modules())
    hooks = [list(module._forward_hooks) for module in modules]  # transformers has its own
    replacements(exact, [0, 1], BLOCK, "aware", PROMPTS)
    assert all(a is b for a, b in zip(modules, exact.network.modules(), strict=True))
    assert [list(module._forward_hooks) for module in modules] == hooks
    assert torch.equal(logits(exact), before)


def test_what_cannot_be_done_says_why(exact: LanguageModel, build: Build) -> None:
    with pytest.raises(ValueError, match="replacement 'fft' is unknown: use one of zero, average, low_rank, aware"):
        replacements(exact, [0], BLOCK, "fft")
    with pytest.raises(ValueError, match="all 0 prompts belong to one group"):
        replacements(exact, [0], BLOCK, "aware")
    with pytest.raises(ValueError, match="there is no layer 2"):
        replacements(exact, [2], BLOCK, "average")
    with pytest.raises(ValueError, match="block size 64 does not fit"):
        replacements(exact, [0], 64, "average")

    def spoil(network: PreTrainedModel) -> None:
        token = exact.encode([TEXTS[1]])[0][-1]
        network.model.embed_tokens.weight[token] = float("inf")

    spoilt = build(tiny_llama(), spoil)
    model = LanguageModel(**{**vars(exact), "network": type(exact.network).from_pretrained(spoilt)})
    with pytest.raises(ValueError, match=r"activations of '.*gate_proj' are not finite for prompt 'Go'"):
        replacements(model, [0], BLOCK, "aware", PROMPTS)


@pytest.mark.parametrize("how", ["aware", "low_rank_aware"])
def test_the_same_layers_are_fitted_once_and_come_back_to_the_bit(
    how: str, exact: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = replacements(exact, [0, 1], BLOCK, how, PROMPTS)
    with monkeypatch.context() as patched:
        patched.setattr(replace_module, "_fitted_in_order", lambda *_: pytest.fail("fitted again"))
        again = replacements(exact, [0, 1], BLOCK, how, PROMPTS)
    other = replacements(exact, [0, 1], BLOCK, how, PROMPTS[:-1])
    assert list(first) == list(again) == list(other)
    for path, layer in first.items():
        assert type(layer) is type(again[path])
        for name, value in layer.state_dict().items():
            assert torch.equal(value, again[path].state_dict()[name])
    assert any(not torch.equal(a, b) for a, b in zip(first[path].parameters(), other[path].parameters(), strict=True))
