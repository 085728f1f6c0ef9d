"""A padded batch is what each prompt alone gives, computed once, and bad states are named."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import VOCABULARY, Build
from transformers import PhiConfig, PreTrainedModel

from chassis_utils.limits import psutil, shutil
from chassis_utils.lm import forward, states
from chassis_utils.lm.model import LanguageModel, load
from chassis_utils.lm.states import collect

TEXTS = ["One day", "A cat sat on the mat and looked at the moon for a long time.", "Go", "What is 3 + 4? Show it."]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for each test."""
    monkeypatch.setattr(states, "CACHE", tmp_path)
    return tmp_path


@pytest.fixture(params=["stories", "tiny_llama_model", "tiny_gpt2", "tiny_phi"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    """A real checkpoint, and three architectures."""
    return request.getfixturevalue(request.param)


def test_a_padded_batch_gives_what_each_prompt_alone_gives(model: LanguageModel) -> None:
    together = collect(model, TEXTS)
    alone = torch.cat([collect(model, [text]) for text in TEXTS], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_states_follow_their_prompts_in_any_order(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    order = [2, 0, 3, 1]
    first = collect(model, TEXTS)
    monkeypatch.setattr(forward, "BATCH_TOKENS", 12)  # other batches too
    shuffled = collect(model, [TEXTS[k] for k in order])
    torch.testing.assert_close(shuffled, first[:, order], rtol=1e-5, atol=1e-5)


def test_batches_hold_every_prompt_once_and_little_padding() -> None:
    ids = [[0] * (5 + (37 * k) % 80) for k in range(200)]
    planned = list(forward.batches(ids))
    assert sorted(k for batch in planned for k in batch) == list(range(len(ids)))
    padded = sum(len(batch) * max(len(ids[k]) for k in batch) for batch in planned)
    assert padded < 1.25 * sum(map(len, ids))
    assert len(list(forward.batches(ids, stretch=float("inf")))) < len(planned)


def test_the_last_state_is_the_input_of_the_head(model: LanguageModel) -> None:
    logits = model.head(collect(model, TEXTS)[-1])
    for text, row in zip(TEXTS, logits, strict=True):
        with torch.inference_mode():
            expected = model.network(torch.tensor(model.encode([text]))).logits[0, -1]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


def test_layer_zero_is_the_embedding_of_the_last_token(tiny_llama_model: LanguageModel) -> None:
    last = torch.tensor([ids[-1] for ids in tiny_llama_model.encode(TEXTS)])
    assert torch.equal(collect(tiny_llama_model, TEXTS)[0], tiny_llama_model.network.get_input_embeddings()(last))


def test_a_chosen_position_is_where_a_shorter_prompt_would_end(model: LanguageModel) -> None:
    ids = model.encode(TEXTS)
    positions = [len(row) // 2 for row in ids]
    found = collect(model, TEXTS, [[end] for end in positions])
    for k, (row, end) in enumerate(zip(ids, positions, strict=True)):
        with torch.inference_mode():
            output = model.network(torch.tensor([row[: end + 1]]), output_hidden_states=True)
        expected = torch.stack([layer[0, -1] for layer in output.hidden_states])
        torch.testing.assert_close(found[:, k], expected, rtol=1e-5, atol=1e-5)


def test_equal_content_is_computed_once(tiny_gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first = collect(tiny_gpt2, TEXTS)
    again = load(tiny_gpt2.network.name_or_path)  # the same content, loaded anew

    def forbidden(*_: object) -> None:
        raise AssertionError("the network ran again")

    monkeypatch.setattr(states, "_read", forbidden)
    assert torch.equal(collect(again, TEXTS), first)
    for other in (TEXTS[::-1], TEXTS[:3], [*TEXTS, "more"]):
        with pytest.raises(AssertionError, match="the network ran again"):
            collect(tiny_gpt2, other)
    with pytest.raises(AssertionError, match="the network ran again"):
        collect(tiny_gpt2, TEXTS, [[0]] * len(TEXTS))


def test_the_first_texts_of_others_are_not_read_again(
    tiny_gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"Text number {number}" for number in range(2 * states.PART + 1)]
    whole, own, parts = collect(tiny_gpt2, texts), states._read, []
    monkeypatch.setattr(
        states, "_read", lambda model, texts, *rest: parts.append(list(texts)) or own(model, texts, *rest)
    )
    assert torch.equal(collect(tiny_gpt2, texts[: states.PART]), whole[:, : states.PART])
    assert parts == []
    torch.testing.assert_close(collect(tiny_gpt2, texts[: states.PART + 2]), whole[:, : states.PART + 2])
    assert parts == [texts[states.PART : states.PART + 2]]


def test_other_weights_have_their_own_states(tiny_gpt2: LanguageModel, tiny_phi: LanguageModel) -> None:
    assert not torch.equal(collect(tiny_gpt2, TEXTS), collect(tiny_phi, TEXTS))


def test_a_state_that_is_not_finite_names_its_layer_and_prompt(build: Build, cache: Path) -> None:
    def damage(network: PreTrainedModel) -> None:
        network.get_input_embeddings().weight[tokens[-1]] = float("nan")

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = PhiConfig(vocab_size=VOCABULARY, **sizes)
    prompt = "Only this one ends in 7"
    (tokens,) = load(str(build(config))).encode([prompt])
    with pytest.raises(ValueError, match=f"state of layer 0 is not finite for prompt '{prompt}'"):
        collect(load(str(build(config, damage))), [*TEXTS, prompt])
    assert not [file for file in cache.iterdir() if file.suffix != ".lock"]


def test_a_prompt_longer_than_the_model_reads_is_refused(tiny_llama_model: LanguageModel) -> None:
    with pytest.raises(ValueError, match=r"prompt 'word word .*'\.\.\. has \d+ tokens, .* reads 64: shorten it"):
        collect(tiny_llama_model, ["short", "word " * 100])


@pytest.mark.parametrize("position", [-1, 50])
def test_a_position_outside_its_prompt_is_refused(position: int, tiny_llama_model: LanguageModel) -> None:
    with pytest.raises(ValueError, match=rf"position {position} lies outside the \d+ tokens of prompt 'Go'"):
        collect(tiny_llama_model, ["Go"], [[position]])


def test_a_prompt_without_tokens_is_refused(build: Build) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = load(str(build(PhiConfig(vocab_size=5120, **sizes), tokenizer="expert-phi")))  # adds no special token
    with pytest.raises(ValueError, match="prompt '' has no tokens: remove it"):
        collect(model, ["Go", ""])


@pytest.mark.parametrize(
    ("module", "asked", "answer", "error"),
    [
        (shutil, "disk_usage", SimpleNamespace(free=0), OSError),
        (psutil, "virtual_memory", SimpleNamespace(available=0), MemoryError),
    ],
)
def test_too_little_room_says_how_much_is_needed_before_the_pass(
    tiny_llama_model: LanguageModel,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: object,
    asked: str,
    answer: SimpleNamespace,
    error: type[Exception],
) -> None:
    monkeypatch.setattr(module, asked, lambda *_: answer)
    monkeypatch.setattr(states, "_read", lambda *_: pytest.fail("the pass has begun"))
    with pytest.raises(error, match=r"1 MiB of (disk|memory) for the states of \d+ tokens are needed, 0 MiB are free"):
        collect(tiny_llama_model, TEXTS)
    assert not [file for file in cache.iterdir() if file.suffix != ".lock"]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a flipped bit": lambda stored: stored[:-9] + bytes([stored[-9] ^ 1]) + stored[-8:],
    "a header of another": lambda stored: b"0" * 64 + stored[64:],
    "cut short": lambda stored: stored[:-100],
    "empty": lambda stored: b"",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_cache_is_noticed_and_made_anew(kind: str, tiny_gpt2: LanguageModel, cache: Path) -> None:
    sound = collect(tiny_gpt2, TEXTS)
    (stored,) = [file for file in cache.iterdir() if file.suffix != ".lock"]
    whole = stored.read_bytes()
    stored.write_bytes(DAMAGE[kind](whole))
    with pytest.warns(UserWarning, match=f"{stored.name} in the cache is damaged: it is made anew"):
        assert torch.equal(collect(tiny_gpt2, TEXTS), sound)
    assert stored.read_bytes() == whole
