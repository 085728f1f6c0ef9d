"""A pass that begins inside the network gives what a full one gives, to the bit, and runs nothing below."""

import pytest
import torch
from torch import nn

from chassis_utils.circulant.compare import Teacher, compare
from chassis_utils.circulant.patch import patch
from chassis_utils.circulant.replace import replacements
from chassis_utils.lm.forward import token_logits
from chassis_utils.lm.model import LanguageModel
from chassis_utils.lm.resume import first_layer, giving, output_below, resuming

TEXTS = ["One day a cat sat on the mat.", "Go", "What is 3 + 4?"]
MODELS = ["tiny_llama_model", "tiny_gpt2", "tiny_phi"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("every_token", [True, False])
@torch.no_grad()
def test_a_resumed_pass_is_the_full_one(name: str, every_token: bool, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    rows = model.encode(TEXTS)
    changed = replacements(model, [1], 4, "average")
    below = output_below(model, rows, layer=1)
    with patch(model.network, changed):
        full = token_logits(model, rows, every_token)
        ran = []
        hook = model.blocks[0].mlp.register_forward_hook(lambda *_: ran.append(0))
        with resuming(model, 1, below):
            resumed = token_logits(model, rows, every_token)
        assert not ran
        assert torch.equal(full, token_logits(model, rows, every_token))
        hook.remove()
    assert ran and torch.equal(full, resumed)


def test_the_gradient_of_a_resumed_pass_is_that_of_the_full_one(tiny_llama_model: LanguageModel) -> None:
    teacher = Teacher(tiny_llama_model, TEXTS, every_token=True)
    layers = replacements(tiny_llama_model, [1], 4, "average")
    found = []
    with patch(tiny_llama_model.network, layers):
        for layer in (0, 1):
            for module in layers.values():
                module.zero_grad()
            teacher.loss(range(len(TEXTS)), layer).backward()
            found.append([p.grad.clone() for module in layers.values() for p in module.parameters()])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*found, strict=True))


def test_comparisons_begin_at_the_lowest_patched_block(
    tiny_llama_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = replacements(tiny_llama_model, [1], 4, "average")
    teacher = Teacher(tiny_llama_model, TEXTS, every_token=True)
    compare(teacher, layers)  # the entry of the block is kept
    ran: list[nn.Module] = []
    hook = tiny_llama_model.blocks[0].mlp.register_forward_hook(lambda module, *_: ran.append(module))
    resumed = compare(teacher, layers)
    assert not ran
    monkeypatch.setattr("chassis_utils.circulant.compare.first_layer", lambda *_: 0)
    assert resumed.equals(compare(teacher, layers)) and ran
    hook.remove()


def test_the_first_layer_is_the_lowest_and_paths_outside_the_blocks_count_as_the_beginning(
    tiny_llama_model: LanguageModel,
) -> None:
    paths = [f"model.layers.1.mlp.{name}" for name in ("up_proj", "down_proj")]
    assert first_layer(tiny_llama_model, paths) == 1
    assert first_layer(tiny_llama_model, [*paths, "model.layers.0.mlp.up_proj"]) == 0
    assert first_layer(tiny_llama_model, [*paths, "lm_head"]) == first_layer(tiny_llama_model, []) == 0


def test_giving_ends_with_its_block_also_after_an_error() -> None:
    module, x = nn.Linear(2, 2), torch.ones(1, 2)
    own = module(x)
    with pytest.raises(RuntimeError, match="stop"), giving(module, 3):
        assert module(x) == 3
        raise RuntimeError("stop")
    assert torch.equal(module(x), own) and "forward" not in vars(module)
    module.forward = wrapper = lambda x: x
    with giving(module, 3):
        assert module(x) == 3
    assert module.forward is wrapper
