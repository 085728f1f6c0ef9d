"""Any architecture's head is reproduced or refused, and a checkpoint that cannot be read says why."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from conftest import SIZES, VOCABULARY, Build, tiny_llama
from tokenizers import Tokenizer
from transformers import (
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
)

from chassis_utils.files import ROOT
from chassis_utils.lm.checkpoint import find_folder, fingerprint
from chassis_utils.lm.model import Head, LanguageModel, describe, load

GROUPED = SIZES | {"num_key_value_heads": 1}
HEADS = {
    "plain": tiny_llama(),
    "bias": PhiConfig(**GROUPED | {"num_key_value_heads": 2}),
    "softcap": Gemma2Config(**GROUPED, head_dim=8, final_logit_softcapping=0.5),
    "scale": CohereConfig(**GROUPED, logit_scale=0.25),
    "inverse scale": GraniteConfig(**GROUPED, logits_scaling=8.0),
}


def states_and_logits(model: LanguageModel, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every token, straight from the network."""
    with torch.inference_mode():
        output = model.network(torch.tensor(model.encode([text])), output_hidden_states=True)
    return output.hidden_states[-1][0], output.logits[0]


@pytest.mark.parametrize("config", HEADS.values(), ids=HEADS)
def test_the_head_gives_the_logits_of_the_network(config: PretrainedConfig, build: Build) -> None:
    model = load(str(build(config)))
    states, logits = states_and_logits(model, "A short sentence about heads.")
    torch.testing.assert_close(model.head(states), logits, rtol=1e-5, atol=1e-5)
    if config is not HEADS["plain"]:  # and would not without the part that this one has
        assert not torch.allclose(Head(model.head.weight)(states), logits, rtol=1e-2)


def test_the_head_of_a_real_checkpoint_gives_its_logits(stories: LanguageModel) -> None:
    states, logits = states_and_logits(stories, "Once upon a time, there was a little girl.")
    torch.testing.assert_close(stories.head(states), logits, rtol=1e-5, atol=1e-4)


def test_a_real_checkpoint_tells_a_story(stories: LanguageModel) -> None:
    assert stories.greedy("Once upon a time, there was a", 6).split()[:2] == ["little", "girl"]
    assert (stories.parameters, stories.depth, stories.width) == (260_032, 5, 64)
    assert describe(stories)["tokenizer"] == "SentencePiece BPE"


def test_a_head_with_a_part_that_is_not_known_is_refused(build: Build) -> None:
    folder = build(HyperCLOVAXConfig(**GROUPED, logits_scaling=4.0))  # multiplies where Granite divides
    with pytest.raises(ValueError, match=r"are not its head applied to its last state .* a part that .* does not know"):
        load(str(folder))


def test_a_head_narrower_than_the_blocks_is_refused(build: Build) -> None:
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = OPTConfig(vocab_size=VOCABULARY, word_embed_proj_dim=8, do_layer_norm_before=False, **sizes)
    with pytest.raises(ValueError, match=r"pass on states of 16 numbers, its head reads 8: use a model of one width"):
        load(str(build(config)))


def test_a_head_in_float64_is_the_exact_one() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, h, bias = (torch.randn(*shape, generator=generator) for shape in ((9, 4), (3, 4), (9,)))
    exact = 5 * torch.tanh(0.5 * (h.double() @ weight.double().T + bias.double()) / 5)
    head = Head(weight, bias, 0.5, 5.0)
    torch.testing.assert_close(head.to(torch.float64)(h), exact, rtol=1e-14, atol=1e-14)
    assert head(h.double()).dtype == torch.float32


def test_the_fingerprint_of_a_head_is_of_all_that_it_is() -> None:
    weight, bias = torch.randn(9, 4), torch.randn(9)
    heads = [
        Head(weight),
        Head(weight + 1e-6),
        Head(weight[:, [1, 0, 2, 3]]),
        Head(weight.view(4, 9)),
        Head(weight, bias),
        Head(weight, -bias),
        Head(weight, torch.zeros(9)),
        Head(weight, scale=0.5),
        Head(weight, softcap=30.0),
        Head(weight, softcap=50.0),
        Head(weight).to(torch.float64),
        Head(weight.bfloat16()),
    ]
    found = [head.fingerprint for head in heads]
    assert len(set(found)) == len(heads)
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in found)
    assert Head(weight.T.contiguous().T, bias.clone()).fingerprint == heads[4].fingerprint  # whatever the layout
    assert Head(weight.bfloat16().clone()).fingerprint == heads[-1].fingerprint


def assert_anatomy(model: LanguageModel) -> None:
    """Block l reads the states of layer l, and the final norm makes the last state of the last block's output."""
    seen: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> None:
        seen.append(inputs[0])
        last.append(output[0] if isinstance(output, tuple) else output)

    last: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(keep) for block in model.blocks]
    with torch.inference_mode():
        ids = torch.tensor(model.encode(["A short sentence about norms."]))
        states = model.network.base_model(ids, output_hidden_states=True, use_cache=False).hidden_states
        normed = model.final_norm(last[-1])
    for hook in hooks:
        hook.remove()
    assert len(seen) == model.depth == len(states) - 1
    for layer, state in enumerate(seen):
        torch.testing.assert_close(state, states[layer])
    torch.testing.assert_close(normed, states[-1])
    assert not torch.allclose(normed, last[-1], rtol=1e-2)


@pytest.mark.parametrize("fixture", ["stories", "tiny_llama_model", "tiny_gpt2", "tiny_phi"])
def test_blocks_and_final_norm_are_found(fixture: str, request: pytest.FixtureRequest) -> None:
    assert_anatomy(request.getfixturevalue(fixture))


OTHERS = {name: HEADS[name] for name in ("softcap", "scale", "inverse scale")} | {
    "a norm of the embeddings": BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2)
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_blocks_and_final_norm_of_other_architectures_are_found(config: PretrainedConfig, build: Build) -> None:
    assert_anatomy(load(str(build(config))))


def test_weights_are_frozen_and_texts_neither_padded_nor_cut(tiny_llama_model: LanguageModel) -> None:
    assert not any(parameter.requires_grad for parameter in tiny_llama_model.network.parameters())
    short, long = tiny_llama_model.encode(["a", "a b c " * 500])
    assert len(short) < 5 and len(long) > 1000
    assert short == tiny_llama_model.encode(["a"])[0]


def test_the_fingerprint_follows_content_and_nothing_else(build: Build, tmp_path: Path) -> None:
    folder = build(tiny_llama())
    copy = shutil.copytree(folder, tmp_path / "renamed")
    (copy / "README.md").write_text("A card.")
    assert fingerprint(copy) == fingerprint(folder)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-2] + b" " + content[-1:])
        assert fingerprint(copy) != fingerprint(folder)
        (copy / name).write_bytes(content)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model", "a/b/c"])
def test_a_name_that_is_neither_a_folder_nor_reachable_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"model '{name}' is neither a folder nor a hub model that can be reached"):
        find_folder(name)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (["config.json", "tokenizer.json"], "holds no weights: convert it to safetensors"),
        (["config.json", "tokenizer.json", "pytorch_model.bin"], r"only a pickle \(pytorch_model.bin\), which can run"),
        (["model.safetensors", "config.json"], "has no tokenizer.json: save it beside the weights"),
        (["model.safetensors", "tokenizer.json"], "has no config.json: save it beside the weights"),
    ],
)
def test_a_checkpoint_with_something_missing_says_what(files: list[str], sentence: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=sentence):
        find_folder(str(tmp_path))


@pytest.mark.parametrize("name", ["tinyllama", "phi2", "gpt2"])
def test_real_tokenizers_return_every_space_and_newline(name: str) -> None:
    path = ROOT.parent / "shared" / "tokenizers" / name / "tokenizer.json"
    if not path.is_file():
        pytest.skip("the shared tokenizers are not beside this repository")
    tokenizer = Tokenizer.from_file(str(path))
    for text in ("plain", " leading", "two  spaces", "trailing ", "line\nbreak\n\n", "\ttab", "naïve 🙂"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text


def test_half_precision_reads_long_texts_with_fewer_instructions_than_the_processor_has() -> None:
    program = (
        "import torch; from chassis_utils import collect, load\n"
        "models = [load('models/port-llama', dtype) for dtype in (torch.float32, torch.bfloat16)]\n"
        "exact, half = (collect(model, ['A number and another one. ' * 30])[-1] for model in models)\n"
        "print(float((half.float() - exact).norm() / exact.norm()))"
    )
    allowed = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=allowed)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.05
