"""Any architecture's head is reproduced or refused, and a checkpoint that cannot be read says why."""

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from conftest import VOCABULARY, Build, tiny_llama
from tokenizers import Tokenizer
from transformers import CohereConfig, Gemma2Config, GraniteConfig, HyperCLOVAXConfig, PhiConfig, PretrainedConfig

from chassis_utils.models import Head, LanguageModel, describe, find_folder, fingerprint, load
from chassis_utils.paths import ROOT

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
HEADS = {
    "plain": tiny_llama(),
    "bias": PhiConfig(**SIZES | {"num_key_value_heads": 2}),
    "softcap": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5),
    "scale": CohereConfig(**SIZES, logit_scale=0.25),
    "inverse scale": GraniteConfig(**SIZES, logits_scaling=8.0),
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
    folder = build(HyperCLOVAXConfig(**SIZES, logits_scaling=4.0))  # multiplies where Granite divides
    with pytest.raises(ValueError, match=r"are not its head applied to its last state .* a part that .* does not know"):
        load(str(folder))


def test_a_head_in_float64_is_the_exact_one() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, h, bias = (torch.randn(*shape, generator=generator) for shape in ((9, 4), (3, 4), (9,)))
    exact = 5 * torch.tanh(0.5 * (h.double() @ weight.double().T + bias.double()) / 5)
    head = Head(weight, bias, 0.5, 5.0)
    torch.testing.assert_close(head.to(torch.float64)(h), exact, rtol=1e-14, atol=1e-14)
    assert head(h.double()).dtype == torch.float32


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
