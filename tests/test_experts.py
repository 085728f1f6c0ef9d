"""Experts are those of the study, and read a batch of prompts as they read each prompt alone."""

from collections.abc import Callable

import pytest
import torch
from conftest import VOCABULARY, Build, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from samples import seeds
from torch import Tensor
from transformers import GPT2Config

from chassis_utils.adapters.adapter import Adapter
from chassis_utils.as_reported.sizes import scaled_rank
from chassis_utils.as_reported.text_bridge import Rescored
from chassis_utils.bridge.bridge import Bridge
from chassis_utils.bridge.look_ahead import Continuations, look_ahead
from chassis_utils.experts.bridged import BridgedExpert
from chassis_utils.experts.logit_bias import BOOSTED, LogitBias
from chassis_utils.experts.protocol import Expert
from chassis_utils.experts.sibling import Sibling
from chassis_utils.experts.synthetic import SyntheticExpert, SyntheticModel
from chassis_utils.lm.forward import continuations
from chassis_utils.lm.model import Head, LanguageModel, load
from chassis_utils.lm.states import collect, last_states
from chassis_utils.metrics import kl_divergence

WIDTH = 12


def head_and_states(seed: int) -> tuple[Head, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return Head(torch.randn(30, WIDTH, generator=generator)), torch.randn(25, WIDTH, generator=generator)


@given(seeds, st.sampled_from([0.1, 0.5, 2.0]), st.integers(1, WIDTH))
def test_the_asked_effect_is_reached_within_a_percent(seed: int, kl: float, rank: int) -> None:
    head, h = head_and_states(seed)
    expert = SyntheticExpert.draw(WIDTH, rank, seed).with_effect(kl, head, h)
    assert float(kl_divergence(head(expert.states(h)), head(h)).mean()) == pytest.approx(kl, rel=0.01)


@given(seeds, st.integers(1, WIDTH))
def test_the_edit_is_the_low_rank_product_of_the_study(seed: int, rank: int) -> None:
    _, h = head_and_states(seed)
    expert = SyntheticExpert.draw(WIDTH, rank, seed)
    product = torch.einsum("nd,dr,er->ne", h.double(), expert.u, expert.v)
    torch.testing.assert_close(expert.states(h) - h.double(), product, rtol=1e-9, atol=1e-12)
    assert torch.linalg.matrix_rank(expert.u @ expert.v.T) == rank


@given(seeds, st.integers(1, WIDTH), st.sampled_from([1e-4, 1e4]))
def test_a_bent_edit_is_linear_for_small_states_and_bounded_for_large_ones(seed: int, rank: int, size: float) -> None:
    head, h = head_and_states(seed)
    straight = SyntheticExpert.draw(WIDTH, rank, seed)
    bent = straight.bent(h)
    assert bent.scale is not None
    limit = straight.edit(size * h) if size < 1 else ((h.double() @ straight.u).sign() * bent.scale) @ straight.v.T
    torch.testing.assert_close(bent.edit(size * h), limit, rtol=1e-3, atol=1e-3 * float(limit.abs().max()))
    reached = bent.with_effect(0.5, head, h)
    assert float(kl_divergence(head(reached.states(h)), head(h)).mean()) == pytest.approx(0.5, rel=0.01)


def test_factors_have_the_spread_of_the_study() -> None:
    expert = SyntheticExpert.draw(2048, 64)
    assert torch.cat([expert.u, expert.v]).std() == pytest.approx(0.01, rel=0.01)
    assert abs(float((expert.u * expert.v).mean())) < 1e-6  # drawn apart


def test_the_seed_alone_decides_the_expert() -> None:
    first = SyntheticExpert.draw(WIDTH, 3, seed=1)
    torch.manual_seed(99)
    assert torch.equal(first.u, SyntheticExpert.draw(WIDTH, 3, seed=1).u)
    assert not torch.equal(first.u, SyntheticExpert.draw(WIDTH, 3, seed=2).u)


def test_an_effect_beyond_all_strengths_is_refused() -> None:
    head, h = head_and_states(0)
    with pytest.raises(ValueError, match=r"no strength of this expert reaches 50.0 nats: ask for less"):
        SyntheticExpert.draw(WIDTH, 1).with_effect(50.0, Head(head.weight, softcap=1.0), h)


@pytest.mark.parametrize("rank", [0, WIDTH + 1])
def test_a_rank_that_does_not_fit_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"expert rank {rank} does not fit states of width 12: use 1 to 12"):
        SyntheticExpert.draw(WIDTH, rank)


def test_ranks_keep_their_share_of_the_width() -> None:
    assert [scaled_rank(width) for width in (2048, 256, 64, 16)] == [64, 8, 2, 1]
    assert [scaled_rank(256, rank) for rank in (4, 32, 128)] == [1, 4, 16]


PROMPTS = ["Two and two", "A sentence of several words that ends with", "In", "The function returns"]
NEW = 6
Cast = Callable[[LanguageModel, LanguageModel], Expert]
CAST: dict[str, Cast] = {
    "edited": lambda base, _: SyntheticModel(base, SyntheticExpert.draw(base.width, 2)),
    "bias": lambda base, _: LogitBias.of_strings(base),
    "sibling": Sibling,
    "rescored": lambda base, other: Rescored(base, other, tokens=NEW),
}


@pytest.fixture(scope="module")
def sibling(build: Build) -> LanguageModel:
    """A wider Llama with the tokenizer of the other tiny ones."""
    return load(str(build(tiny_llama(hidden_size=24))))


@pytest.fixture(scope="module")
def byte_level(build: Build) -> LanguageModel:
    """A GPT-2 with the other shipped tokenizer."""
    config = GPT2Config(vocab_size=5120, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return load(str(build(config, tokenizer="expert-phi")))


@torch.inference_mode()
def logits_of(model: LanguageModel, text: str) -> Tensor:
    """After the last token, straight from the network."""
    return model.network(torch.tensor(model.encode([text]))).logits[0, -1]


@torch.inference_mode()
def written(model: LanguageModel, prompt: str, tokens: int) -> list[int]:
    """The greedy continuation, token after token, the whole text read each time."""
    ids = model.encode([prompt])[0]
    for _ in range(tokens):
        ids = [*ids, int(model.network(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids[-tokens:]


@pytest.mark.parametrize("cast", CAST.values(), ids=CAST)
def test_an_expert_gives_each_prompt_the_logits_that_it_has_alone(
    cast: Cast, tiny_gpt2: LanguageModel, sibling: LanguageModel
) -> None:
    expert = cast(tiny_gpt2, sibling)
    assert isinstance(expert, Expert)
    together = expert.logits(PROMPTS)
    assert together.shape == (len(PROMPTS), VOCABULARY)
    alone = torch.cat([expert.logits([prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together, base_logits(tiny_gpt2, PROMPTS), atol=1e-5)


def base_logits(model: LanguageModel, prompts: list[str]) -> Tensor:
    return torch.stack([logits_of(model, prompt) for prompt in prompts])


def test_the_synthetic_expert_edits_the_states_of_its_base(tiny_phi: LanguageModel) -> None:
    edit = SyntheticExpert.draw(tiny_phi.width, 2)
    with torch.inference_mode():
        output = tiny_phi.network(torch.tensor(tiny_phi.encode(PROMPTS[:1])), output_hidden_states=True)
    expected = tiny_phi.head(edit.states(output.hidden_states[-1][0, -1:]))
    torch.testing.assert_close(SyntheticModel(tiny_phi, edit).logits(PROMPTS[:1]), expected, rtol=1e-5, atol=1e-5)


def test_the_list_of_the_study_is_boosted_by_four_for_each_string_that_has_the_token(
    tiny_phi: LanguageModel, byte_level: LanguageModel
) -> None:
    assert len(BOOSTED) == 26 == len(set(BOOSTED)) and {"7", "^", "The answer is", "implies"} < set(BOOSTED)
    for model, boosts in (
        (byte_level, {"7": 1, "^": 1, "The": 2, "\u0120": 0}),
        (tiny_phi, {"7": 1, "^": 1, "\u2581The": 2, "<s>": 0}),
    ):
        bias = LogitBias.of_strings(model).bias
        assert {token: float(bias[model.tokenizer.token_to_id(token)]) / 4 for token in boosts} == boosts
        tokens = [token for string in BOOSTED for token in model.tokenizer.encode(string, add_special_tokens=False).ids]
        counted = torch.bincount(torch.tensor(tokens), minlength=len(model.head.weight))
        assert torch.equal(bias, 4.0 * counted)
        assert float(bias.sum()) == 4 * len(tokens)
    mark = tiny_phi.tokenizer.token_to_id("\u2581")
    assert float(LogitBias.of_strings(tiny_phi).bias[mark]) >= 40  # the space before each digit: the study's flaw


def test_a_token_listed_twice_is_boosted_twice(byte_level: LanguageModel) -> None:
    bias = LogitBias.of_strings(byte_level, ["7", "77", "7"], boost=1.5).bias
    seven = byte_level.tokenizer.token_to_id("7")
    assert bias[seven] == 1.5 * (2 + byte_level.encode(["77"])[0].count(seven)) and int((bias != 0).sum()) <= 2


def test_a_logit_bias_is_an_intercept_at_rank_0(tiny_phi: LanguageModel) -> None:
    expert, d = LogitBias.of_strings(tiny_phi), tiny_phi.width
    torch.testing.assert_close(expert.logits(PROMPTS), base_logits(tiny_phi, PROMPTS) + expert.bias.float())
    nothing = torch.zeros(d, 0, dtype=torch.float64)
    shift = torch.zeros(d, dtype=torch.float64)
    adapter = Adapter("state", nothing, nothing, shift, tiny_phi.head.fingerprint, expert.bias)
    h = last_states(tiny_phi, PROMPTS)
    assert float(kl_divergence(expert.logits(PROMPTS), adapter.logits(h, tiny_phi.head)).max()) < 1e-12


def test_a_sibling_speaks_for_itself(tiny_gpt2: LanguageModel, sibling: LanguageModel) -> None:
    expert = Sibling(tiny_gpt2, sibling)
    assert last_states(expert.model, PROMPTS).shape == (len(PROMPTS), sibling.width)
    torch.testing.assert_close(expert.logits(PROMPTS), base_logits(sibling, PROMPTS), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_with_other_tokens_is_no_sibling(
    tiny_phi: LanguageModel, byte_level: LanguageModel, build: Build
) -> None:
    with pytest.raises(
        ValueError, match=r"is no sibling of .* \d+ entries of their vocabularies differ .* 5120 and 4096"
    ):
        Sibling(tiny_phi, byte_level)
    longer = load(str(build(tiny_llama(vocab_size=VOCABULARY + 8))))  # the same tokens, and logits of none
    with pytest.raises(ValueError, match="0 entries of their vocabularies differ and they give 4104 and 4096 logits"):
        Sibling(tiny_phi, longer)
    other = load(str(build(tiny_llama(vocab_size=5120))))  # as many logits, of other tokens
    with pytest.raises(ValueError, match=r"is no sibling of .* take a checkpoint of the same tokenizer"):
        Sibling(byte_level, other)


@pytest.mark.parametrize("writer", ["tiny_gpt2", "tiny_phi", "sibling", "byte_level"])
def test_continuations_are_the_greedy_ones_of_each_prompt(writer: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(writer)
    expected = [model.tokenizer.decode(written(model, prompt, NEW)) for prompt in PROMPTS]
    assert continuations(model, PROMPTS, NEW) == expected


def test_a_continuation_stops_where_the_text_ends(tiny_phi: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [written(tiny_phi, prompt, NEW) for prompt in PROMPTS]
    ends = [tokens[0][2], tokens[1][4]]
    for setting, among in ((ends[0], ends[:1]), (ends, ends)):
        monkeypatch.setattr(tiny_phi.network.generation_config, "eos_token_id", setting)
        places = [min([row.index(end) for end in among if end in row], default=NEW) for row in tokens]
        expected = [tiny_phi.tokenizer.decode(row[:place]) for row, place in zip(tokens, places, strict=True)]
        assert len(set(places)) > 1 and min(places) < NEW
        assert continuations(tiny_phi, PROMPTS, NEW) == expected


def test_the_text_bridge_rescores_prompt_space_and_continuation(
    tiny_gpt2: LanguageModel, byte_level: LanguageModel
) -> None:
    texts = [f"{p} {byte_level.tokenizer.decode(written(byte_level, p, NEW))}" for p in PROMPTS]
    found = Rescored(tiny_gpt2, byte_level, tokens=NEW).logits(PROMPTS)
    torch.testing.assert_close(found, base_logits(tiny_gpt2, texts), rtol=1e-4, atol=1e-4)
    assert Rescored(tiny_gpt2, byte_level).tokens == 32


def test_a_prompt_that_cannot_be_continued_is_refused(tiny_gpt2: LanguageModel) -> None:
    count = len(tiny_gpt2.encode(["word word"])[0])
    assert continuations(tiny_gpt2, ["word word"], 64 - count)
    sentence = (
        rf"prompt 'word word' has {count} tokens, with {65 - count} more they exceed the 64 that .* reads: shorten"
    )
    with pytest.raises(ValueError, match=sentence):
        continuations(tiny_gpt2, ["word word"], 65 - count)
    with pytest.raises(ValueError, match="there are no prompts for the model to read"):
        continuations(tiny_gpt2, [], 4)


@pytest.mark.parametrize("calls", [0, 2])
def test_a_bridged_expert_says_what_the_bridge_says_above_the_floor(calls: int) -> None:
    base, other = load("models/port-llama"), load("models/expert-phi")
    bridge = Bridge.between(base, other)
    expert = BridgedExpert(base, other, bridge, calls)
    assert isinstance(expert, Expert)
    texts = ["Returns the sum of", "What is 3 + 4?"]
    p = other.head(collect(other, texts)[-1]).softmax(-1)
    if calls:
        q = torch.stack([look_ahead(bridge, Continuations(other, text), text, calls).q for text in texts])
    else:
        q = bridge.one_step(p)[0].double()
    own = base.head(collect(base, texts)[-1]).double().softmax(-1)
    found = expert.logits(texts).double().softmax(-1)
    torch.testing.assert_close(found, 0.999 * q + 0.001 * own, rtol=1e-4, atol=1e-9)
    assert (q == 0).any() and (found > 0).all()
