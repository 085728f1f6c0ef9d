"""A patch comes off without a trace, whatever the architecture, and is read back for its own model alone."""

import pytest
import torch
from conftest import VOCABULARY, Build
from torch import Tensor, nn
from transformers import GPTNeoXConfig, MambaConfig, OPTConfig

from chassis_utils.circulant.layer import BlockCirculantLinear
from chassis_utils.circulant.low_rank import LowRankLinear
from chassis_utils.circulant.patch import as_linear, mlp_projections, patch
from chassis_utils.lm.model import LanguageModel, load

NAMES = {
    "llama": ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"],
    "phi": ["model.layers.1.mlp.fc1", "model.layers.1.mlp.fc2"],
    "gpt2": ["transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"],
    "gpt_neox": ["gpt_neox.layers.1.mlp.dense_h_to_4h", "gpt_neox.layers.1.mlp.dense_4h_to_h"],
}


@pytest.fixture(scope="module")
def tiny_neox(build: Build) -> LanguageModel:
    """A random GPT-NeoX."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return load(str(build(GPTNeoXConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes))))


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    """One of each architecture."""
    fixtures = {"llama": "tiny_llama_model", "phi": "tiny_phi", "gpt2": "tiny_gpt2", "gpt_neox": "tiny_neox"}
    return request.getfixturevalue(fixtures[request.param])


@torch.inference_mode()
def logits(model: LanguageModel) -> Tensor:
    return model.network(torch.tensor(model.encode(["A sentence to look at."]))).logits


def averaged(model: LanguageModel, layer: int = 1, block: int = 4) -> dict[str, nn.Module]:
    """Every MLP projection of a layer by averaging."""
    found = mlp_projections(model.network, layer)
    return {path: BlockCirculantLinear.from_linear(as_linear(module), block) for path, module in found.items()}


def test_the_projections_of_an_mlp_are_found_by_path(model: LanguageModel) -> None:
    found = mlp_projections(model.network, 1)
    assert list(found) == NAMES[model.network.config.model_type]
    assert all(model.network.get_submodule(path) is module for path, module in found.items())


def test_a_linear_view_is_the_same_map(model: LanguageModel) -> None:
    for module in mlp_projections(model.network, 0).values():
        linear = as_linear(module)
        x = torch.randn(3, linear.in_features)
        torch.testing.assert_close(linear(x), module(x))
        assert linear.weight.data_ptr() == module.weight.data_ptr()


def test_blocks_of_one_number_change_nothing(model: LanguageModel) -> None:
    before = logits(model)
    with patch(model.network, averaged(model, block=1)):
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def test_a_patch_is_what_runs_and_comes_off_to_the_bit(model: LanguageModel) -> None:
    before, modules = logits(model), list(model.network.named_modules())
    state = model.network.state_dict()
    replacements = averaged(model)
    on = patch(model.network, replacements)
    assert all(model.network.get_submodule(path) is module for path, module in replacements.items())
    changed = logits(model)
    assert not torch.allclose(changed, before, rtol=1e-3)
    dense = {path: as_linear_of(module) for path, module in replacements.items()}
    on.remove()
    assert torch.equal(logits(model), before)
    assert all(a is b and name == other for (name, a), (other, b) in zip(modules, model.network.named_modules()))  # noqa: B905
    assert all(torch.equal(value, state[name]) for name, value in model.network.state_dict().items())
    with patch(model.network, dense):
        torch.testing.assert_close(logits(model), changed, rtol=1e-4, atol=1e-4)
    on.remove()  # a second time: nothing
    assert torch.equal(logits(model), before)


def as_linear_of(layer: nn.Module) -> nn.Linear:
    """The explicit matrix of a circulant layer as a dense one."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    linear.weight.data = layer.to_dense().detach()
    if layer.bias is not None:
        linear.bias.data = layer.bias.detach()
    return linear


def test_an_error_inside_takes_the_patch_off_too(model: LanguageModel) -> None:
    before = logits(model)
    with pytest.raises(ZeroDivisionError), patch(model.network, averaged(model)):
        1 / 0  # noqa: B018
    assert torch.equal(logits(model), before)


def test_patches_lie_on_each_other_and_come_off_in_reverse(tiny_llama_model: LanguageModel) -> None:
    network, before = tiny_llama_model.network, logits(tiny_llama_model)
    coarse = averaged(tiny_llama_model, block=8)
    lower = patch(network, averaged(tiny_llama_model, block=2))
    patched = logits(tiny_llama_model)
    upper = patch(network, coarse)
    assert mlp_projections(network, 1) == coarse
    with pytest.raises(RuntimeError, match=r"gate_proj' has been patched again since: take that patch off first"):
        lower.remove()
    upper.remove()
    assert torch.equal(logits(tiny_llama_model), patched)
    lower.remove()
    assert torch.equal(logits(tiny_llama_model), before)


def test_rank_zero_deletes_an_mlp(tiny_llama_model: LanguageModel) -> None:
    network = tiny_llama_model.network
    down = mlp_projections(network, 0)[path := "model.layers.0.mlp.down_proj"]
    with patch(network, {path: LowRankLinear(down.in_features, down.out_features, 0, bias=False)}):
        assert not network.model.layers[0].mlp(torch.randn(1, 3, 16)).any()


def test_training_a_patched_model_reaches_the_patch_alone(tiny_llama_model: LanguageModel) -> None:
    replacements = averaged(tiny_llama_model)
    with patch(tiny_llama_model.network, replacements):
        ids = torch.tensor(tiny_llama_model.encode(["A sentence."]))
        tiny_llama_model.network(ids).logits.square().mean().backward()
        trained = {name for name, value in tiny_llama_model.network.named_parameters() if value.grad is not None}
    assert trained == {f"{path}.c" for path in replacements}


def refusals(network: nn.Module) -> dict[str, tuple[dict[str, nn.Module], str]]:
    up = "model.layers.0.mlp.up_proj"
    return {
        "path": ({"model.layers.0.mlp.fc1": nn.Linear(16, 32)}, "a LlamaForCausalLM has no module 'model.layers.0.mlp"),
        "size": ({up: BlockCirculantLinear(32, 16, 4)}, f"'{up}' maps 16 -> 32, its replacement 32 -> 16"),
        "kind": ({"model.norm": nn.Linear(16, 16)}, "a LlamaRMSNorm is no linear layer"),
    }


@pytest.mark.parametrize("case", ["path", "size", "kind"])
def test_a_patch_that_does_not_fit_is_refused_with_nothing_changed(tiny_llama_model: LanguageModel, case: str) -> None:
    network, modules = tiny_llama_model.network, list(tiny_llama_model.network.modules())
    replacements, sentence = refusals(network)[case]
    good = {"model.layers.0.mlp.gate_proj": BlockCirculantLinear(16, 32, 4)}
    with pytest.raises(ValueError, match=sentence):
        patch(network, good | replacements)
    assert all(a is b for a, b in zip(network.modules(), modules, strict=True))


def test_layers_that_are_not_there_are_refused(tiny_llama_model: LanguageModel, build: Build) -> None:
    for layer in (-1, 2):
        with pytest.raises(ValueError, match=f"there is no layer {layer}: this network has layers 0 to 1"):
            mlp_projections(tiny_llama_model.network, layer)
    mamba = load(str(build(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4))))
    with pytest.raises(ValueError, match=r"'backbone.layers.1' of a MambaForCausalLM has no MLP of linear layers"):
        mlp_projections(mamba.network, 1)


def test_projections_that_a_block_holds_itself_are_found(build: Build) -> None:
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    opt = load(str(build(OPTConfig(vocab_size=VOCABULARY, word_embed_proj_dim=16, **sizes))))
    assert list(mlp_projections(opt.network, 1)) == ["model.decoder.layers.1.fc1", "model.decoder.layers.1.fc2"]
