"""An expert beside the base says what enumeration of its texts says, reads no token twice, and leaves no trace."""

import itertools
import random

import pytest
import torch
from conftest import SIZES, Build, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BloomConfig, Gemma2Config, MambaConfig

from chassis_utils.adapters.adapter import Adapter
from chassis_utils.adapters.port import Port
from chassis_utils.bridge import covers
from chassis_utils.bridge.bridge import Bridge
from chassis_utils.bridge.covers import Covers
from chassis_utils.bridge.segmenter import Segmenter
from chassis_utils.bridge.token_bytes import BYTE_LEVEL, ByteTable
from chassis_utils.experts.alongside import Alongside, mix
from chassis_utils.experts.bridged import FLOOR, BridgedExpert
from chassis_utils.experts.mixed_bits import bits_by_weight
from chassis_utils.files import MODELS
from chassis_utils.lm.bits_per_byte import bits_per_byte
from chassis_utils.lm.forward import pad, token_logits
from chassis_utils.lm.model import LanguageModel, load
from chassis_utils.lm.reader import Reader

TEXTS = ["Returns a new array.\n\nParameters", "The sum of 14 and 5", "    ", "Größe – é", "x"]
MANY = 1000  # calls: more than a toy has tokens
PIECES = (b"a", b"b", b" ", b" a", b"ab", b"aba", b"\n", b"\n\n", b"bb ", b"  ", "é".encode(), b"\xc3")


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    """The shipped base: byte-fallback."""
    return load("models/port-llama", device="cpu")


@pytest.fixture(scope="module")
def phi() -> LanguageModel:
    """The shipped expert: byte-level."""
    return load("models/expert-phi", device="cpu")


@pytest.fixture(scope="module")
def sibling() -> LanguageModel:
    """A checkpoint with the base's tokenizer."""
    return load("models/sibling-math", device="cpu")


@pytest.fixture(scope="module", params=["llama", "gpt2", "phi", "window", "alibi", "recurrent"])
def reading(request: pytest.FixtureRequest, build: Build) -> LanguageModel:
    """Models that keep what they have read in different ways, or cannot."""
    if request.param in ("gpt2", "phi"):
        return request.getfixturevalue(f"tiny_{request.param}")
    config = {
        "llama": tiny_llama(),
        "window": Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8, sliding_window=12),
        "alibi": BloomConfig(vocab_size=4096, hidden_size=16, n_layer=2, n_head=2),
        "recurrent": MambaConfig(vocab_size=4096, hidden_size=16, num_hidden_layers=2, state_size=4),
    }[request.param]
    return load(str(build(config)))


def test_what_is_kept_changes_nothing(reading: LanguageModel) -> None:
    rng, reader = random.Random(0), Reader(reading)
    rows = [[rng.randrange(3, 4096) for _ in range(length)] for length in (1, 5, 9)]
    for step in range(30):
        last = rng.randrange(1, 4)
        found = reader(rows, last)
        for row, logits in zip(rows, found, strict=True):
            alone = token_logits(reading, [row], every_token=True)[-last:]
            torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)
        rows = [row[: max(1, len(row) - rng.choice((0, 0, 1, 3)))] for row in rows]  # as another cut of the end does
        rows = [[*row, *(rng.randrange(3, 4096) for _ in range(rng.randrange(3)))] for row in rows]
        if step % 10 == 9:
            rng.shuffle(rows)  # as beams do
            rows = rows[: 3 - step // 20]


def test_a_step_reads_what_is_new_alone(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, read = Reader(llama), []
    monkeypatch.setattr(
        Reader, "_read", lambda self, *given, own=Reader._read: read.append(given[0]) or own(self, *given)
    )
    for length in (8, 9, 11):
        reader([list(range(10, 10 + length))], 1)
    reader([[*range(10, 17), 5, 6]], 1)
    assert [len(new[0]) for new in read] == [8, 1, 2, 2]
    with pytest.raises(ValueError, match="rows of 0 tokens"):
        reader([[]])
    with pytest.raises(ValueError, match="reads 1 to 1024"):
        reader([[5] * 1025])


def toy_next(seed: int, row: list[int], size: int) -> Tensor:
    """A toy expert: what follows a row is random, decided by the row."""
    generator = torch.Generator().manual_seed(hash((seed, *row)) % 2**31)
    return torch.rand(size, generator=generator, dtype=torch.float64).square().softmax(-1)


def enumerated(base: Segmenter, table: ByteTable, seed: int, row: list[int]) -> Tensor:
    """By all texts of two tokens from the place where the expert leaves `row`, at most `BACK` tokens before its end."""
    size, pieces = len(table.pieces), table.pieces
    q = torch.zeros(len(base.table.pieces), dtype=torch.float64)
    for back in range(min(covers.BACK, len(row) - 1) + 1):
        kept, read = row[: len(row) - back], b"".join(pieces[token] or b"" for token in row[len(row) - back :])
        before = toy_next(seed, kept, size)
        share = torch.ones((), dtype=torch.float64)
        for k in range(max(len(row) - covers.BACK, 1), len(kept)):
            share = share * toy_next(seed, row[:k], size)[row[k]]
        for first, second in itertools.product(range(size), repeat=2):
            text = pieces[first] or b""
            if text.startswith(read) and len(text) > len(read):
                both = text[len(read) :] + (pieces[second] or b"")
                p = share * before[first] * toy_next(seed, [*kept, first], size)[second]
                q[base.segment([both])[0][0]] += p
            elif first == table.end and not back and not second:
                q[base.table.end] += share * before[first]
    return q / q.sum()


@pytest.mark.parametrize("family", ["port-llama", "expert-phi"])
@given(seed=st.integers(0, 10**6), data=st.data())
@settings(max_examples=15)
def test_with_every_token_looked_behind_it_is_plain_enumeration(family: str, seed: int, data: st.DataObject) -> None:
    base = Segmenter.of(MODELS / family)
    table = ByteTable((*PIECES, None), (len(PIECES),), BYTE_LEVEL)
    row = data.draw(st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=4))
    bridge = Bridge.of(base, table)

    def expert(rows: list[list[int]], last: int) -> list[Tensor]:
        return [
            torch.stack(
                [toy_next(seed, row[:k], len(table.pieces)) for k in range(max(len(row) - last, 0) + 1, len(row) + 1)]
            )
            for row in rows
        ]

    q, lost = Covers(bridge).next_token([row], expert, MANY)
    assert float(lost) == 0
    torch.testing.assert_close(q[0], enumerated(base, table, seed, row), rtol=0, atol=1e-9)


def test_the_scores_of_a_batch_are_those_of_every_row_alone_and_of_the_formula(
    llama: LanguageModel, phi: LanguageModel
) -> None:
    for base, expert in ((llama, phi), (phi, llama)):
        device = Alongside(base, expert, weight=0.3)
        rows = base.encode(TEXTS)
        scores = torch.stack([token_logits(base, [row], every_token=False)[0] for row in rows])
        longest = max(map(len, rows))
        padded = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        found = device(padded, scores)
        for row, own, mixed in zip(rows, scores, found, strict=True):
            alone = Alongside(base, expert, weight=0.3)
            torch.testing.assert_close(mixed, alone(torch.tensor([row]), own[None])[0], rtol=1e-4, atol=1e-4)
            q, p = alone.beside([row])[0][0], own.double().softmax(-1)
            product = p**0.7 * ((1 - FLOOR) * q + FLOOR * p) ** 0.3
            torch.testing.assert_close(mixed.double().exp(), product / product.sum(), rtol=1e-3, atol=1e-6)


def test_without_longer_tokens_and_looking_ahead_it_is_the_bridge_in_one_step(
    llama: LanguageModel, phi: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(covers, "BACK", 0)
    device, text = Alongside(phi, llama, calls=0), "Returns the mean of the val"
    q = device.beside(phi.encode([text]))[0]
    own = token_logits(phi, phi.encode([text]), every_token=False).double().log_softmax(-1)
    one_step = BridgedExpert(phi, llama, Bridge.between(phi, llama)).logits([text])
    torch.testing.assert_close(mix(own, q, 1.0).float(), one_step, rtol=1e-3, atol=1e-3)


def test_white_space_is_cut_as_before_a_word_and_half_a_character_byte_by_byte(
    llama: LanguageModel, phi: LanguageModel
) -> None:
    def read(base: LanguageModel, expert: LanguageModel, data: bytes) -> list[bytes | None]:
        device = Alongside(base, expert)
        (row,) = device._expert_tokens([data])
        return [device.bridge.expert.pieces[token] for token in row]

    assert read(llama, phi, b"x.\n\n") == [None, b"x", b".", b"\n", b"\n"]
    assert read(llama, phi, b"x\n    ") == [None, b"x", b"\n   ", b" "]
    assert read(phi, llama, b"x\n    ") == [None, b" x", b"\n", b"    "]
    assert read(phi, llama, b"x\xc3") == [None, b" x", b"\xc3"]


def test_an_expert_of_the_same_tokens_needs_no_bridge(llama: LanguageModel, sibling: LanguageModel) -> None:
    device = Alongside(llama, sibling)
    assert device.bridge is None
    inputs, mask = pad(llama.encode(["What is 2 + 3?", "The sum of 14 and 5 is"]), llama.device, left=True)
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 16, "pad_token_id": 0}
    found = llama.network.generate(inputs, logits_processor=[device], **settings)
    assert torch.equal(found, sibling.network.generate(inputs, **settings))
    assert not torch.equal(found, llama.network.generate(inputs, **settings))


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
def test_generation_is_that_of_an_expert_that_forgets(
    mode: dict[str, object], llama: LanguageModel, phi: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, mask = pad(llama.encode(["The sum of 14 and 5", "Return"]), llama.device, left=True)
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 10, "pad_token_id": 0} | mode
    device = Alongside(llama, phi)
    found = llama.network.generate(inputs, logits_processor=[device], **settings)
    monkeypatch.setattr(device._reader, "_keeps", False)
    assert torch.equal(found, llama.network.generate(inputs, logits_processor=[device], **settings))
    assert not torch.equal(found, llama.network.generate(inputs, **settings))


def test_weight_nought_is_the_base_and_what_is_excluded_stays_so(llama: LanguageModel, phi: LanguageModel) -> None:
    (row,) = llama.encode(["Return the"])
    scores = token_logits(llama, [row], every_token=False)
    scores[0, :7] = -torch.inf
    for weight in (0.0, 0.5, 1.0):
        found = Alongside(llama, phi, weight)(torch.tensor([row]), scores)
        assert found[0, :7].isneginf().all() and found[0, 7:].isfinite().all()
        if not weight:
            torch.testing.assert_close(found, scores.log_softmax(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("weight", "calls"), [(-0.1, 0), (1.1, 0), (float("nan"), 0), (0.5, -1)])
def test_another_weight_is_refused(weight: float, calls: int, llama: LanguageModel, phi: LanguageModel) -> None:
    with pytest.raises(ValueError, match="a weight is 0 to 1, calls are 0 or more"):
        Alongside(llama, phi, weight, calls)


def test_a_mix_where_the_expert_is_silent_is_the_base() -> None:
    own = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64).log()
    torch.testing.assert_close(mix(own, torch.zeros(1, 3, dtype=torch.float64), 0.7), own)


def test_bits_by_weight_begin_with_those_of_the_base_and_end_with_those_of_the_expert(
    llama: LanguageModel, phi: LanguageModel, sibling: LanguageModel
) -> None:
    texts = ["What is 2 + 3? It is 5.", "Returns a copy of the array.\n\nSee also", "x"]
    first, last = bits_by_weight(Alongside(llama, sibling), texts, [0.0, 1.0])[0]
    torch.testing.assert_close(first.bits, bits_per_byte(llama, texts).bits, rtol=1e-4, atol=1e-4)
    (row,) = llama.encode(texts[:1])
    theirs = token_logits(sibling, [row], every_token=True).double().log_softmax(-1)
    own = token_logits(llama, [row], every_token=True).double().log_softmax(-1)
    floored = ((1 - FLOOR) * theirs.exp() + FLOOR * own.exp()).log()
    bits = -sum(float(floored[k, token]) for k, token in enumerate(row[1:])) / torch.tensor(2.0).log()
    torch.testing.assert_close(float(last.bits[0]), float(bits), rtol=1e-4, atol=1e-4)
    bridged, lost = bits_by_weight(Alongside(llama, phi), texts, [0.0, 1.0])
    torch.testing.assert_close(bridged[0].bits, first.bits, rtol=1e-6, atol=1e-6)
    assert lost == 0 and float(bridged[1].sizes[1]) == len(texts[1])


def test_a_device_is_plugged_in_beside_adapters_and_leaves_no_trace(llama: LanguageModel, phi: LanguageModel) -> None:
    port, bystander, prompts = (
        Port(llama),
        Port(llama),
        ["The sum of 14 and 5", "Return the mean of", "Parameters\n------"],
    )
    shift = torch.zeros(len(llama.head.weight), dtype=torch.float64)
    shift[llama.tokenizer.token_to_id("e")] = 20.0
    nothing = Adapter.untouched(llama.head)
    before = [port.generate(prompt) for prompt in prompts]
    port.plug("device", Alongside(llama, phi))
    port.plug("nothing", nothing)
    with pytest.raises(ValueError, match="already"):
        port.plug("device", nothing)
    alone = [port.generate(prompts[0], "device"), port.generate(prompts[1], "nothing"), before[2]]
    inputs, mask = pad(llama.encode(prompts), llama.device, left=True)
    with port.use(["device", "nothing", None]), bystander.use(None):
        grown = llama.network.generate(inputs, attention_mask=mask, max_new_tokens=32, do_sample=False, pad_token_id=0)
        with pytest.raises(ValueError, match="3 rows have been chosen for a batch of 2"):
            llama.network.generate(inputs[:2], attention_mask=mask[:2], max_new_tokens=2, pad_token_id=0)
    assert [llama.tokenizer.decode(row) for row in grown[:, inputs.shape[1] :].tolist()] == alone
    assert alone[0] != before[0]
    assert port.memory["device"] == phi.network.get_memory_footprint()
    port.unplug("device")
    assert port.names == ["nothing"] and "generate" not in vars(llama.network)
    assert [port.generate(prompt) for prompt in prompts] == before


def test_a_device_of_another_base_is_refused(llama: LanguageModel, phi: LanguageModel) -> None:
    with pytest.raises(
        ValueError, match="the device runs beside 'models/expert-phi': make one for 'models/port-llama'"
    ):
        Port(llama).plug("device", Alongside(phi, llama))
