"""Bits per byte count every token once, whatever the windows."""

import math

import pytest
import torch
from conftest import Build, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

import chassis_utils.lm.bits_per_byte as module
from chassis_utils.lm.bits_per_byte import bits_per_byte
from chassis_utils.lm.model import LanguageModel, load

TEXT = "Once upon a time, there was a little girl named Lily."


def bits(model: LanguageModel, text: str) -> float:
    """Bits of all tokens after the start token, from one pass without windows or padding."""
    (ids,) = model.encode([text])
    if model.start_token not in (None, ids[0]):
        ids = [model.start_token, *ids]
    with torch.inference_mode():
        log_p = model.network(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(log_p[k, token]) for k, token in enumerate(ids[1:])) / math.log(2)


@pytest.fixture(scope="module")
def memoryless(build: Build) -> LanguageModel:
    """A model whose next token depends on the last one alone, so that windows lose nothing."""

    def silence(network: PreTrainedModel) -> None:
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight.zero_()

    return load(str(build(tiny_llama(max_position_embeddings=4096), silence)))


def test_a_short_text_is_the_plain_sum_over_tokens(stories: LanguageModel) -> None:
    found = bits_per_byte(stories, [TEXT])
    assert found.mean == pytest.approx(bits(stories, TEXT) / len(TEXT.encode()), rel=1e-5)
    assert math.isnan(found.se)


def test_each_document_keeps_its_own_bits_and_bytes(tiny_gpt2: LanguageModel) -> None:
    texts = [TEXT, "Größe über alles.", "Hm.", TEXT * 2]
    found = bits_per_byte(tiny_gpt2, texts)
    direct = torch.tensor([bits(tiny_gpt2, text) for text in texts], dtype=torch.float64)
    torch.testing.assert_close(found.bits, direct, rtol=1e-5, atol=1e-5)
    assert found.mean == pytest.approx(float(direct.sum()) / sum(len(text.encode()) for text in texts), rel=1e-5)
    part = bits_per_byte(tiny_gpt2, [texts[3], texts[1]])
    assert (found[[3, 1]].mean, found[[3, 1]].se) == pytest.approx((part.mean, part.se), rel=1e-5)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(2, 12), st.data())
def test_every_token_is_scored_once_in_any_windows(
    memoryless: LanguageModel, lengths: list[int], window: int, data: st.DataObject
) -> None:
    texts = [" ".join(str(k * n) for k in range(n)) for n in lengths]
    total = sum(bits(memoryless, text) for text in texts) / sum(map(len, texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WINDOW", window)
        patch.setattr(module, "CONTEXT", data.draw(st.integers(1, window - 1)))
        patch.setattr(module, "BATCH", 64)
        assert bits_per_byte(memoryless, texts).mean == pytest.approx(total, rel=1e-5)


def test_equal_documents_have_no_spread_and_different_ones_do(tiny_llama_model: LanguageModel) -> None:
    assert bits_per_byte(tiny_llama_model, [TEXT] * 3).se == pytest.approx(0, abs=1e-6)
    assert bits_per_byte(tiny_llama_model, [TEXT, "Other words entirely.", "3 + 4 = 7"]).se > 0
