"""Look-ahead against brute force over every text a toy expert can write; the certificate; real vocabularies."""

import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import seeds
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, PhiConfig

from chassis_utils.bridge import look_ahead as search
from chassis_utils.bridge.bridge import Bridge
from chassis_utils.bridge.look_ahead import Bridged, Continuations, look_ahead, trace
from chassis_utils.bridge.segmenter import Segmenter
from chassis_utils.bridge.token_bytes import BYTE_FALLBACK, BYTE_LEVEL, ByteTable
from chassis_utils.files import BUILD, MODELS
from chassis_utils.lm.model import LanguageModel, load

LETTERS = {BYTE_FALLBACK: "\u2581abcé", BYTE_LEVEL: "Ġabs'!1Ã©"}  # é is one character or two bytes
TEXTS = (b" ", b"  ", b"a", b" a", b"ab", b"b ", b"c", b"ba", b"\xc3", b"\xa9", "é".encode(), "aé b".encode())
TEXTS_BYTE_LEVEL = (*TEXTS, b"'", b"s", b"'s", b"!", b"1", b" 1", b"11", b"   ", b"\x04", b"a\x04")
CONTEXTS = ("a", "ab a", "c ", "b  ", "x", "é", "ca b", " ")
CONTEXTS_BYTE_LEVEL = (*CONTEXTS, "a!", "b'", "1 ", "b  1", "it's", "a\x04")
MANY = 4096  # calls: more than any toy expert needs
LONGEST = 3  # tokens of a toy expert's text


def toy_base(rng: random.Random, family: str, merges: int = 14) -> Tokenizer:
    """A tokenizer with random merges over a few letters, those of spaces included.

    A byte-level one has no piece for byte 04, and half of them set every digit apart before they go to bytes.
    """
    known = list(LETTERS[family])
    rules: list[list[str]] = []
    while len(rules) < merges:
        left, right = rng.choice(known), rng.choice(known)
        if left + right not in known and len(left + right) <= 4:
            rules.append([left, right])
            known.append(left + right)
    specials = ["<unk>", "<s>", "</s>"] if family == BYTE_FALLBACK else ["<|endoftext|>"]
    signs = [f"<0x{byte:02X}>" for byte in range(256)] if family == BYTE_FALLBACK else all_signs()
    vocabulary = {piece: k for k, piece in enumerate(dict.fromkeys([*specials, *signs, *known]))}
    layout = json.loads(
        (MODELS / ("port-llama" if family == BYTE_FALLBACK else "expert-phi") / "tokenizer.json").read_text()
    )
    layout["model"] |= {"vocab": vocabulary, "merges": rules}
    if family == BYTE_LEVEL and rng.random() < 0.5:
        digits = {"type": "Digits", "individual_digits": True}
        layout["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, layout["pre_tokenizer"]]}
    return Tokenizer.from_str(json.dumps(layout))


def all_signs() -> list[str]:
    """The byte alphabet, read off the shipped tokenizer."""
    layout = json.loads((MODELS / "expert-phi" / "tokenizer.json").read_text())
    return sorted(piece for piece in layout["model"]["vocab"] if len(piece) == 1 and piece != "Ą")  # but byte 04's


@dataclass(frozen=True)
class Toy:
    """A base, an expert whose texts can be listed, and a context."""

    seed: int
    family: str

    @cached_property
    def rng(self) -> random.Random:
        """What the toy is drawn from."""
        return random.Random(self.seed)

    @cached_property
    def own(self) -> Tokenizer:
        """The base tokenizer as a file has it."""
        return toy_base(random.Random(self.seed), self.family)

    @cached_property
    def base(self) -> Segmenter:
        """The base on bytes."""
        return Segmenter.of(self.own)

    @cached_property
    def context(self) -> str:
        """What stands before."""
        return self.rng.choice(CONTEXTS if self.family == BYTE_FALLBACK else CONTEXTS_BYTE_LEVEL)

    @cached_property
    def expert(self) -> ByteTable:
        """Five random texts, a special token, the end and a padding id."""
        texts = TEXTS if self.family == BYTE_FALLBACK else TEXTS_BYTE_LEVEL
        pieces = self.rng.sample(texts, 5)
        return ByteTable((None, *pieces, None, None), (6,), BYTE_LEVEL)

    @cached_property
    def bridge(self) -> Bridge:
        """Between the two."""
        return Bridge.of(self.base, self.expert)

    def next(self, row: list[int]) -> np.ndarray:
        """The expert's next token after a row: random, decided by the row; the end at `LONGEST`."""
        if len(row) == LONGEST:
            return np.eye(8)[6]
        p = np.random.default_rng([self.seed, *row]).dirichlet(np.full(6, 0.5))
        return np.array([0, *p, 0])

    def writes(self, row: list[int]) -> np.ndarray:
        """The same without what the base cannot write, byte 04, as if dropped before the softmax."""
        p = self.next(row)
        if self.family == BYTE_LEVEL:
            p = p * [b"\x04" not in (piece or b"") for piece in self.expert.pieces]
        return p / p.sum()

    def __call__(self, rows: list[list[int]]) -> Tensor:
        """The expert."""
        return torch.from_numpy(np.stack([self.next(row) for row in rows]))

    def texts(self, row: tuple[int, ...] = (), mass: float = 1.0) -> Iterator[tuple[bytes, float]]:
        """Every text that the expert can write, with its probability."""
        p = mass * self.writes(list(row))
        yield b"".join(self.expert.pieces[token] or b"" for token in row), p[6]
        for token in p[:6].nonzero()[0].tolist():
            yield from self.texts((*row, token), p[token])

    def encode(self, data: bytes) -> list[int]:
        """The base's tokens of a whole text: by its own tokenizer where it can read the bytes."""
        try:
            return self.own.encode(data.decode(), add_special_tokens=False).ids
        except UnicodeDecodeError:
            return self.base.segment([self.base.table.prefix + data])[0]

    @cached_property
    def exact(self) -> tuple[Tensor, Tensor]:
        """q* and the part of it owed to text that re-merges, text by text."""
        q, remerged = torch.zeros(2, len(self.base.table.pieces), dtype=torch.float64)
        context = self.context.encode()
        start = self.encode(context)
        for text, p in self.texts():
            whole = self.encode(context + text)
            if not text:
                q[self.base.table.end] += p
            elif whole[: len(start)] == start:
                q[whole[len(start)]] += p
            else:
                first = self.base.segment([text])[0][0]
                q[first] += p
                remerged[first] += p
        return q, remerged


toys = st.builds(Toy, seeds, st.sampled_from([BYTE_FALLBACK, BYTE_LEVEL]))


def distance(p: Tensor, q: Tensor) -> float:
    """Total variation."""
    return float((p - q).abs().sum() / 2)


@given(toy=toys)
@settings(max_examples=40)
def test_the_reference_is_what_brute_force_finds(toy: Toy) -> None:
    found = look_ahead(toy.bridge, toy, toy.context, MANY, 1e-12)
    q, remerged = toy.exact
    assert found.unresolved <= 1e-12
    torch.testing.assert_close(found.q, q, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.remerged, remerged, rtol=0, atol=1e-9)
    assert abs(found.remerged_mass - float(remerged.sum())) < 1e-9


@given(
    toy=toys,
    calls=st.integers(0, 30),
    batch=st.integers(1, 64),
    left=st.sampled_from([0.01, 0.5]),
    delta=st.sampled_from([1e-12, 1e-2, 0.3]),
)
@settings(max_examples=40)
def test_unresolved_mass_bounds_the_error(toy: Toy, calls: int, batch: int, left: float, delta: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "MOST", batch)
        patch.setattr(search, "DEFERRED", left)
        found = look_ahead(toy.bridge, toy, toy.context, calls, delta)
    q, remerged = toy.exact
    assert abs(float(found.q.sum()) - 1) < 1e-6 and found.calls <= calls
    assert (found.q >= found.remerged).all() and (found.remerged >= 0).all()
    assert distance(found.q, q) <= found.unresolved + 1e-9
    assert abs(found.remerged_mass - float(remerged.sum())) <= found.unresolved + 1e-9


@given(toy=toys.filter(lambda toy: toy.family == BYTE_FALLBACK))
@settings(max_examples=30)
def test_the_unresolved_mass_of_one_step_bounds_its_error_in_every_context(toy: Toy) -> None:
    q, unresolved = toy.bridge.one_step(toy([[]]))
    assert abs(float(q.sum()) - 1) < 1e-6
    assert distance(q[0], toy.exact[0]) <= float(unresolved) + 1e-9


@given(toy=toys)
@settings(max_examples=30)
def test_one_step_takes_the_first_token_of_the_encoded_text(toy: Toy) -> None:
    p = toy([[]])
    found = look_ahead(toy.bridge, lambda _: p, toy.context, 0, 1e-12)
    q, remerged = torch.zeros(2, len(toy.base.table.pieces), dtype=torch.float64)
    start = toy.encode(toy.context.encode())
    for piece, mass in zip(toy.expert.pieces, toy.writes([]), strict=True):
        if not mass:
            continue
        whole = toy.encode(toy.context.encode() + (piece or b""))
        kept = whole[: len(start)] == start
        first = whole[len(start)] if kept and piece else toy.base.segment([piece or b"a"])[0][0]
        first = first if piece else toy.base.table.end
        q[first] += mass
        remerged[first] += 0 if kept else mass
    torch.testing.assert_close(found.q, q, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.remerged, remerged, rtol=0, atol=1e-12)
    assert found.calls == 0


@given(toy=toys, before=st.sampled_from(CONTEXTS_BYTE_LEVEL))
def test_safe_cuts_inside_tokens_are_those_of_the_joined_text(toy: Toy, before: str) -> None:
    base, known = toy.base, toy.base.characters(before.encode())
    joined = [base.characters(before.encode() + (piece or b"")) for piece in toy.expert.pieces]
    expected = [base.has_safe_cut(text, len(known)) for text in joined]
    found = toy.bridge.safe_inside(before.encode()).tolist()
    assert all(found[k] == expected[k] for k in range(len(joined)) if k not in toy.expert.ends)


class Writer:
    """An expert that writes letter by letter, so that what follows depends on the text alone; four at most."""

    letters = " ab"

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.table = ByteTable((*(letter.encode() for letter in self.letters), None), (3,), BYTE_LEVEL)

    def next(self, text: str) -> np.ndarray:
        """Probabilities of the letters and of the end."""
        end = len(text) == 4
        return np.eye(4)[3] if end else np.random.default_rng([self.seed, *text.encode()]).dirichlet(np.ones(4))

    def behind(self, text: str) -> Callable[[list[list[int]]], Tensor]:
        """The expert bound to what it has written."""
        return lambda rows: torch.from_numpy(
            np.stack([self.next(text + "".join(self.letters[token] for token in row)) for row in rows])
        )

    def chance(self, text: str) -> float:
        """The probability of a whole text."""
        factors = [self.next(text[:k])[self.letters.index(letter)] for k, letter in enumerate(text)]
        return float(np.prod(factors) * self.next(text)[3])


def kept(bridged: Bridged, token: int) -> float:
    """What q is given that the context keeps its tokens: the factors of the probability of a token sequence."""
    others = bridged.q - bridged.remerged
    return float(others[token] / others.sum())


@pytest.mark.parametrize("seed", range(3))
def test_the_kept_distributions_multiply_to_the_probability_of_the_text(seed: int) -> None:
    own, writer, context = toy_base(random.Random(seed), BYTE_FALLBACK), Writer(seed), "ab"
    base = Segmenter.of(own)
    bridge = Bridge.of(base, writer.table)

    @cache
    def behind(text: str) -> Bridged:
        return look_ahead(bridge, writer.behind(text), context + text, MANY, 1e-12)

    known = own.encode(context, add_special_tokens=False).ids
    checked = 0
    for text in map("".join, itertools.product(writer.letters, repeat=3)):
        ids = own.encode(context + text, add_special_tokens=False).ids
        if ids[: len(known)] == known:
            product, written = 1 - behind("").remerged_mass, ""
            for token in ids[len(known) :]:
                product *= kept(behind(written), token)
                written += base.table.pieces[token].decode()
            assert abs(product * kept(behind(text), base.table.end) - writer.chance(text)) < 1e-9
            checked += 1
    assert checked > 5


@given(toy=toys, delta=st.floats(0.01, 0.99), calls=st.integers(0, 9))
def test_light_tokens_that_nobody_looked_at_count_as_unresolved(toy: Toy, delta: float, calls: int) -> None:
    loose = look_ahead(toy.bridge, toy, toy.context, 0, delta)
    tight = look_ahead(toy.bridge, toy, toy.context, 0, 1e-12)
    assert loose.unresolved >= tight.unresolved - 1e-12
    found = look_ahead(toy.bridge, toy, toy.context, calls, delta)
    assert abs(float(found.q.sum()) - 1) < 1e-9 and distance(found.q, toy.exact[0]) <= found.unresolved + 1e-9


def test_look_ahead_stops_at_delta_and_at_its_calls() -> None:
    toy = next(toy for toy in (Toy(seed, BYTE_FALLBACK) for seed in itertools.count()) if hard(toy))
    asked = []

    def expert(rows: list[list[int]]) -> Tensor:
        asked.extend(rows)
        return toy(rows)

    found = look_ahead(toy.bridge, expert, toy.context, 7, 1e-9)
    assert found.calls == 7 == len(asked) - 1 and asked[0] == []
    loose = look_ahead(toy.bridge, toy, toy.context, 1000, 0.2)
    assert 0 < loose.unresolved <= 0.2 and loose.calls < look_ahead(toy.bridge, toy, toy.context, MANY, 1e-9).calls


@pytest.mark.parametrize("seed", range(4))
def test_a_trace_is_the_look_ahead_of_each_budget(seed: int) -> None:
    toy = Toy(seed, BYTE_FALLBACK)
    budgets = [0, 4, 8, 16]  # whole batches, so that both ask the same texts
    for budget, found in zip(budgets, trace(toy.bridge, toy, toy.context, budgets, 1e-9), strict=True):
        alone = look_ahead(toy.bridge, toy, toy.context, budget, 1e-9)
        assert torch.equal(found.q, alone.q) and found.calls == alone.calls
        assert found.unresolved == alone.unresolved and torch.equal(found.remerged, alone.remerged)


def hard(toy: Toy) -> bool:
    """Whether twenty calls leave something unresolved."""
    return look_ahead(toy.bridge, toy, toy.context, 20, 1e-9).unresolved > 0.01


@pytest.fixture(scope="module")
def shipped() -> Bridge:
    """Between the vocabularies of the shipped base and the shipped expert, padded as models are."""
    return Bridge.of(Segmenter.of(MODELS / "port-llama", 4100), ByteTable.of(MODELS / "expert-phi", 5200))


def test_each_expert_token_goes_to_the_start_of_its_bytes(shipped: Bridge) -> None:
    base, expert = shipped.base.table, shipped.expert
    for token, piece in enumerate(expert.pieces):
        if piece:
            assert piece.startswith(base.pieces[int(shipped.first[token])])
    assert int(shipped.first[expert.end]) == base.end == 2
    assert shipped.is_text.nonzero()[:, 0].tolist() == list(range(5120))


@pytest.mark.parametrize("piece", [b" the", b"the", b"\n", b"    ", b"0", "─".encode()])
def test_a_piece_of_both_vocabularies_goes_to_its_equal(shipped: Bridge, piece: bytes) -> None:
    base, expert = shipped.base.table, shipped.expert
    p = torch.zeros(1, 5200)
    p[0, expert.ids_of[piece]] = 1
    assert shipped.one_step(p)[0].argmax() == base.ids_of[piece]


def test_half_a_character_goes_to_a_byte_piece(shipped: Bridge) -> None:
    token = shipped.expert.ids_of["é".encode()[:1]]
    assert int(shipped.first[token]) == shipped.base.table.byte_ids[0xC3] and not shipped.resolved[token]


def test_padding_ids_are_dropped_before_the_softmax(shipped: Bridge) -> None:
    logits = torch.randn(3, 5200, generator=torch.Generator().manual_seed(0))
    kept = logits.clone()
    kept[:, 5120:] = -torch.inf
    torch.testing.assert_close(shipped.text_only(logits.softmax(1)), kept.softmax(1))
    for found, expected in zip(shipped.one_step(logits.softmax(1)), shipped.one_step(kept.softmax(1)), strict=True):
        torch.testing.assert_close(found, expected)
    q, unresolved = shipped.one_step(logits.softmax(1))
    assert q.shape == (3, 4100) and unresolved.shape == (3,)
    torch.testing.assert_close(q.sum(1), torch.ones(3))


@pytest.fixture(scope="module")
def poor() -> Bridge:
    """From a base without a piece for byte 04 and an expert that writes it, and has two ends."""
    base = Segmenter.of(toy_base(random.Random(0), BYTE_LEVEL))
    return Bridge.of(base, ByteTable((b"a", b"\x04", b"b\x04a", b"b", None, None, None), (4, 6), BYTE_LEVEL))


def test_what_the_base_cannot_write_is_dropped_before_the_softmax_and_reported(poor: Bridge) -> None:
    p = torch.tensor([[0.2, 0.1, 0.3, 0.1, 0.1, 0.05, 0.15]], dtype=torch.float64)
    assert poor.is_text.tolist() == [True, False, False, True, True, False, True]
    torch.testing.assert_close(poor.lost(p), torch.tensor([0.4], dtype=torch.float64))
    expected = {poor.base.table.ids_of[b"a"]: 0.2, poor.base.table.ids_of[b"b"]: 0.1, poor.base.table.end: 0.25}
    for q in (poor.one_step(p)[0][0], look_ahead(poor, lambda rows: p.repeat(len(rows), 1), "x", 0).q):
        assert {int(v): round(float(q[v]) * 0.55, 12) for v in q.nonzero()[:, 0]} == expected


@pytest.mark.parametrize("context", ["x", "a\x04", "\x04"])
def test_text_that_the_base_cannot_write_stops_no_search(poor: Bridge, context: str) -> None:
    p = torch.tensor([[0.01, 0.45, 0.45, 0.03, 0.02, 0.02, 0.02]], dtype=torch.float64)
    found = look_ahead(poor, lambda rows: p.repeat(len(rows), 1), context, 8, 1e-6)
    assert abs(float(found.q.sum()) - 1) < 1e-9 and found.q[poor.base.table.end] > 0.04 / 0.1 - 1e-6


def test_the_ends_of_the_models_are_those_of_the_bridge(build: Callable[..., Path]) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=4096, eos_token_id=[1, 2, 4096], max_position_embeddings=64, **sizes)
    model = load(str(build(config)))
    assert model.end_tokens == [1, 2]
    bridge = Bridge.between(model, model)
    p = torch.zeros(1, 4096)
    p[0, 1], p[0, 2], p[0, 300] = 0.25, 0.25, 0.5
    assert bridge.one_step(p)[0][0, [1, 2, 300]].tolist() == [0.5, 0.0, 0.5]


def test_gemmas_vocabulary_goes_to_smollms() -> None:
    models = BUILD / "models"
    if not (models / "gemma-3-270m").is_dir() or not (models / "smollm2-135m-instruct").is_dir():
        pytest.skip("build/models is absent: `make models` writes it")
    base = Segmenter.of(models / "smollm2-135m-instruct", 49152, [2])
    expert = ByteTable.of(models / "gemma-3-270m", 262144, [1])
    expert = ByteTable(expert.pieces[:30_000], expert.ends, BYTE_FALLBACK)  # the whole takes beartype half a minute
    bridge = Bridge.of(base, expert)
    assert (int(bridge.unwritable.sum()), int(bridge.first[1]), bool(bridge.is_text[1])) == (21, 2, True)
    rows = zip(bridge.expert.pieces, bridge.first.tolist(), bridge.is_text.tolist(), strict=True)
    assert all(piece.startswith(base.table.pieces[first] or b"?") for piece, first, text in rows if piece and text)
    q, _ = bridge.one_step(torch.full((2, 30_000), 1 / 30_000, dtype=torch.float64))
    torch.testing.assert_close(q.sum(1), torch.ones(2, dtype=torch.float64))


def in_context(bridge: Bridge, p: Tensor, texts: list[str]) -> list[Bridged]:
    """One step behind each context, from an expert that is asked nothing more."""
    return [look_ahead(bridge, lambda _, row=row: row[None], text, 0) for row, text in zip(p, texts, strict=True)]


def test_runs_of_spaces_remerge_with_the_context(shipped: Bridge) -> None:
    p = torch.zeros(2, 5200, dtype=torch.float64)
    p[:, shipped.expert.ids_of[b"  "]] = 0.25
    p[:, shipped.expert.ids_of[b"("]] = 0.75
    after_space, after_word = in_context(shipped, p, ["def f(x):\n  ", "print"])
    assert (after_space.remerged_mass, after_word.remerged_mass) == (0.25, 0.0)
    torch.testing.assert_close(after_space.q, shipped.one_step(p)[0][0])
    torch.testing.assert_close(kept(after_space, shipped.base.table.ids_of[b"("]), 1.0)


def test_a_pre_tokenizer_reads_what_stands_before() -> None:
    base = Segmenter.of(MODELS / "expert-phi")
    bridge = Bridge.of(base, ByteTable((b"'s", b" x"), (), BYTE_LEVEL))
    quote, contraction, word = (base.table.ids_of[piece] for piece in (b"'", b"'s", b" x"))
    p = torch.tensor([[0.25, 0.75]]).repeat(2, 1)
    after_word, after_sign = in_context(bridge, p, ["it", "it!"])  # "!'" is one word there, and "s" the next
    assert (float(after_word.q[contraction]), float(after_sign.q[quote])) == (0.25, 0.25)
    assert after_word.q[word] == after_sign.q[word] == 0.75
    assert after_word.remerged_mass == after_sign.remerged_mass == 0


@pytest.mark.parametrize("name", ["tiny_llama_model", "tiny_gpt2", "tiny_phi"])
@pytest.mark.parametrize("text", ["a", "The cat sat on the "])
def test_continuations_are_the_models_own_distributions(name: str, text: str, request: pytest.FixtureRequest) -> None:
    model: LanguageModel = request.getfixturevalue(name)
    rows = [[], [5, 300, 7, 9], [400], [12, 13]]
    expert = Continuations(model, text)
    for _ in range(2):  # the second call finds the context as the first one left it
        found = expert(rows)
        for row, p in zip(rows, found, strict=True):
            alone = model.network(torch.tensor([model.encode([text])[0] + row])).logits[0, -1]
            torch.testing.assert_close(p, alone.double().softmax(-1), rtol=1e-4, atol=1e-8)


def test_a_context_of_one_token_has_nothing_to_read_ahead(build: Callable[..., Path]) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = load(str(build(PhiConfig(vocab_size=5120, **sizes), tokenizer="expert-phi")))
    (ids,) = model.encode(["a"])  # no start of text there
    assert len(ids) == 1
    found = Continuations(model, "a")([[], [5]])
    for p, row in zip(found, ([], [5]), strict=True):
        alone = model.network(torch.tensor([ids + row])).logits[0, -1]
        torch.testing.assert_close(p, alone.double().softmax(-1), rtol=1e-4, atol=1e-8)


def test_between_two_models_mass_goes_where_the_bytes_go(
    tiny_llama_model: LanguageModel, tiny_phi: LanguageModel
) -> None:
    bridge = Bridge.between(tiny_llama_model, tiny_phi)
    text = "The cat sat"
    expert = Continuations(tiny_phi, text)
    one, more = (look_ahead(bridge, expert, text, calls) for calls in (0, 40))
    assert (one.calls, more.calls) == (0, 40) and more.unresolved < one.unresolved
    assert distance(one.q, more.q) <= one.unresolved + more.unresolved
    torch.testing.assert_close(one.q, bridge.one_step(expert([[]]))[0][0])


def test_an_end_of_text_needs_one_in_the_base() -> None:
    base = Segmenter.of(MODELS / "port-llama")
    endless = Segmenter(
        ByteTable(base.table.pieces, (), BYTE_FALLBACK, base.table.byte_ids), base.tokenizer, base.pairs
    )
    with pytest.raises(ValueError, match="expert has an end-of-text token and the base none: use a base that has one"):
        Bridge.of(endless, ByteTable((b"a", None), (1,), BYTE_LEVEL))
    Bridge.of(endless, ByteTable((b"a", None), (), BYTE_LEVEL))


@pytest.mark.parametrize(
    ("p", "sentence"),
    [
        (torch.ones(1, 5120), "5120 probabilities, but the expert has 5200 tokens: pass all of them"),
        (torch.full((1, 5200), torch.nan), "no distribution over its text: pass probabilities, not logits"),
        (torch.zeros(1, 5200), "no distribution over its text: pass probabilities, not logits"),
        (torch.linspace(-1, 2, 5200)[None], "no distribution over its text: pass probabilities, not logits"),
    ],
)
def test_what_is_no_distribution_of_the_expert_is_refused(shipped: Bridge, p: Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        shipped.one_step(p)


def test_an_empty_context_is_refused(shipped: Bridge) -> None:
    with pytest.raises(ValueError, match="there is no text before the token to predict: give a context"):
        look_ahead(shipped, lambda _: torch.ones(1, 5200), "", 0)
