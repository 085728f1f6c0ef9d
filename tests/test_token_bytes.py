"""The bytes of every token add up to the text; segments on bytes are the tokenizer's own; safe cuts are safe."""

import json
import random
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from chassis_utils.bridge.segmenter import Segmenter
from chassis_utils.bridge.token_bytes import BYTE_FALLBACK, BYTE_LEVEL, ByteTable, byte_alphabet
from chassis_utils.files import BUILD, MODELS, ROOT
from chassis_utils.text.corpus import Document

SHARED = ROOT.parent / "shared"
FOLDERS = {
    "port-llama": MODELS / "port-llama",
    "expert-phi": MODELS / "expert-phi",
    "stories260K": SHARED / "models" / "stories260K",
    "gpt2": SHARED / "tokenizers" / "gpt2",
    "phi2": SHARED / "tokenizers" / "phi2",
    "tinyllama": SHARED / "tokenizers" / "tinyllama",
    "smollm2": BUILD / "models" / "smollm2-135m-instruct",
    "gemma3": BUILD / "models" / "gemma-3-270m",
}
BASES = [*(name for name in FOLDERS if name != "phi2"), "digits", "added"]  # added tokens of phi2 change its words
STRINGS = 17_000  # for each of the first six tokenizers: 100 000 together
FRAGMENTS = (
    *(
        "the cat",
        "Hello",
        " Hello",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\t",
        "\t\t ",
        "\r\n",
        " ",
        " a",
        "un",
        "believable",
        "'s",
    ),
    *(
        "'",
        "!'",
        "ll",
        "I've",
        "x = 1",
        "3.14",
        "-",
        "def f(x):\n    return",
        "Größe",
        "naïve",
        "日本語",
        "слово",
        "e\u0301",
    ),
    *(
        "😀",
        "👩‍🚀",
        "\u00a0",
        "\u3000",
        "\ufffd",
        "\x00",
        "\x7f",
        "\u2028",
        "<0x41>",
        "<s>x",
        "̈",
        "🇩🇪",
        "ﬁ",
        "\U0010ffff",
    ),
    *("12", "  7", "\n 3", "½", "١٢", "x²", "\x04", "a\x04a", "\x16", "\U00040000", "<td>", "\n\n\n", "z this"),
)
# U+2581 is how byte-fallback tokenizers write a space: they cannot tell the two apart.
characters = st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])
fragments = st.lists(st.sampled_from(FRAGMENTS) | st.text(characters, max_size=3), max_size=6).map("".join)
broken = st.lists(fragments.map(str.encode) | st.binary(max_size=3), max_size=4).map(b"".join)


def folder(name: str) -> Path:
    """The folder of a tokenizer; skips where it is absent."""
    if not FOLDERS[name].is_dir():
        reason = "`make models` writes it" if BUILD in FOLDERS[name].parents else "it is real test data of others"
        pytest.skip(f"{FOLDERS[name].relative_to(ROOT.parent)} is absent: {reason}")
    return FOLDERS[name]


def smollm_style() -> Tokenizer:
    """The shipped byte-level tokenizer with SmolLM's pre-tokenizer and, as there, without some bytes."""
    layout = json.loads((MODELS / "expert-phi" / "tokenizer.json").read_text(encoding="utf-8"))
    layout["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, layout["pre_tokenizer"]],
    }
    lost = {sign for sign, byte in byte_alphabet().items() if byte in MISSING}
    model = layout["model"]
    model["vocab"] = {piece: token for piece, token in model["vocab"].items() if not lost & set(piece)}
    model["merges"] = [pair for pair in model["merges"] if not lost & set("".join(pair))]
    return Tokenizer.from_str(json.dumps(layout))


def gemma_style() -> Tokenizer:
    """The shipped byte-fallback tokenizer with added tokens that are text, and as Gemma's in all else."""
    layout = json.loads((MODELS / "port-llama" / "tokenizer.json").read_text(encoding="utf-8"))
    layout["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    pattern = {"String": " "}
    layout["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "MergedWithPrevious", "invert": False}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    size = len(layout["model"]["vocab"])
    for k, text in enumerate(("\n\n", "\n\n\n", "\t\t", "<td>", "z th")):
        layout["added_tokens"].append({"id": size + k, "content": text} | plain)
    layout["decoder"]["decoders"] = layout["decoder"]["decoders"][:-1]  # nothing to strip from the start
    return Tokenizer.from_str(json.dumps(layout))


MISSING = (0x04, 0x16, 0xC0, 0xF1, 0xFF)
MADE = {"digits": smollm_style, "added": gemma_style}


def source(name: str) -> Path | Tokenizer:
    """A tokenizer made here, or the folder of one."""
    return MADE[name]() if name in MADE else folder(name)


def written(name: str, data: bytes) -> bytes:
    """What a tokenizer can write of a text: it leaves out the bytes that its vocabulary lacks."""
    return bytes(byte for byte in data if byte not in table(name).missing)


@cache
def tokenizer(name: str) -> Tokenizer:
    """The tokenizer as it stands in its file."""
    return MADE[name]() if name in MADE else Tokenizer.from_file(str(folder(name) / "tokenizer.json"))


@cache
def table(name: str) -> ByteTable:
    """Its byte table."""
    return ByteTable.of(source(name))


@cache
def segmenter(name: str) -> Segmenter:
    """Its segmenter."""
    return Segmenter.of(source(name))


def strings(documents: dict[str, list[Document]], seed: int, count: int = STRINGS) -> list[str]:
    """Natural passages and random ones, half each, cut and joined at random places."""
    rng = random.Random(seed)
    natural = "\n".join(document.text for document in documents["test"]).replace("\u2581", "")
    special = ("<s>", "</s>", "<unk>", "<|endoftext|>", "<pad>", "<mask>", "<bos>", "<eos>")  # no text, to some
    found = []
    while len(found) < count:
        start, size = rng.randrange(len(natural)), rng.randint(1, 60)
        mixed = "".join(rng.choice(FRAGMENTS) for _ in range(rng.randint(1, 6)))
        text = natural[start : start + size] if len(found) % 2 else mixed
        for name in special:
            text = text.replace(name, "")
        found.append(text)
    return found


@pytest.mark.parametrize("name", [*FOLDERS, *MADE])
def test_bytes_of_the_tokens_add_up_to_the_text(name: str, documents: dict[str, list[Document]]) -> None:
    texts = strings(documents, len(name), 3000 if name in ("smollm2", "gemma3", *MADE) else STRINGS)
    encodings = tokenizer(name).encode_batch_fast(texts)
    wrong = [
        text
        for text, encoding in zip(texts, encodings, strict=True)
        if table(name).join(encoding.ids) != written(name, text.encode())
    ]
    assert wrong[:3] == []


@pytest.mark.parametrize("name", [*FOLDERS, *MADE])
@given(text=fragments.filter(lambda text: "<s>" not in text))
@example("")
@example(" ")
@example("  two before, two after  ")
@example("\n\tline\n")
def test_bytes_of_the_tokens_add_up_to_any_text(name: str, text: str) -> None:
    assert table(name).join(tokenizer(name).encode(text).ids) == written(name, text.encode())


@pytest.mark.parametrize("name", BASES)
@given(data=broken)
def test_segments_add_up_to_any_bytes(name: str, data: bytes) -> None:
    (ids,) = segmenter(name).segment([data])
    joined = b"".join(table(name).pieces[token] or b"?" for token in ids)
    if table(name).family == BYTE_FALLBACK:  # a literal U+2581 is read as a space
        data = data.replace("\u2581".encode(), b" ")
    assert joined == written(name, data)


@pytest.mark.parametrize("name", BASES)
@given(text=fragments.filter(lambda text: "<s>" not in text))
def test_segments_with_the_start_of_the_text_are_the_tokenizers_own(name: str, text: str) -> None:
    own = tokenizer(name).encode(text, add_special_tokens=False).ids
    start = table(name).prefix if text else b""
    assert segmenter(name).segment([start + text.encode()]) == [own]


@pytest.mark.parametrize("name", BASES)
@given(first=broken, second=broken, before=st.sampled_from(["", "a", "'", " ", "it'r"]))
@example(first=b"it'r", second=b"e cold", before="")
@example(first=b"a  ", second=b"b", before="")
@example(first=b"!", second=b"'s", before="")
@example(first=b"a  ", second=b"12", before="")
@example(first=b"1", second=b"'s", before="!")
@example(first=b"a\x04", second=b"b", before="")
@example(first=b"x\n", second=b"\n\n", before="\n")
@settings(max_examples=60)
def test_segments_do_not_cross_a_safe_cut(name: str, first: bytes, second: bytes, before: str) -> None:
    of = segmenter(name)
    text = of.characters(first + second)
    for cut in range(1, len(text)):
        if of.is_safe(text, cut):
            left, right = (part.encode("utf-8", "surrogateescape") for part in (text[:cut], text[cut:]))
            context = before.encode()
            whole, start, rest = of.segment([context + left + right, context + left, right])
            assert whole == start + rest


@pytest.mark.parametrize("name", BASES)
@given(text=fragments, more=fragments)
def test_the_unsettled_end_is_all_that_a_continuation_can_change(name: str, text: str, more: str) -> None:
    of = segmenter(name)
    prefix = of.table.prefix
    end = of.unsettled_end(text)
    settled = (prefix + text.encode()).removesuffix(end)
    parts = of.segment([prefix + (text + more).encode(), settled, end + more.encode()])
    assert parts[0] == parts[1] + parts[2]


@pytest.mark.parametrize("name", ["port-llama", "tinyllama", "expert-phi", "gpt2", "smollm2", "digits", "added"])
def test_ordinary_text_has_safe_cuts(name: str) -> None:
    of = segmenter(name)
    assert of.has_safe_cut("the cat") and not of.has_safe_cut(" the")
    assert not of.has_safe_cut("the cat", start=3)
    assert of.unsettled_end("I saw the cat") == b" cat"
    assert of.unsettled_end("cat") == of.table.prefix + b"cat"


@pytest.mark.parametrize("name", ["digits", "smollm2"])
@pytest.mark.parametrize("text", ["a1", "12", " 1", "1 ", "1'", "'1", "½a", "a²", "١٢", "1\udcc3"])
def test_a_digit_stands_between_two_safe_cuts(name: str, text: str) -> None:
    assert segmenter(name).is_safe(text, 1)


@pytest.mark.parametrize(
    ("text", "cut"), [("xa\x04b", 2), ("xa\x04b", 3), ("xa\U00040000b", 3), ("aab", 2), ("  a", 1)]
)
def test_what_a_left_out_byte_brings_together_is_no_safe_cut(text: str, cut: int) -> None:
    assert not segmenter("digits").is_safe(text, cut)


@pytest.mark.parametrize("name", ["smollm2", "gemma3", "digits", "added"])
def test_segments_of_many_strings_are_the_tokenizers_own(name: str, documents: dict[str, list[Document]]) -> None:
    texts = [text for text in strings(documents, seed=5, count=3000) if text]
    own = [encoding.ids for encoding in tokenizer(name).encode_batch_fast(texts, add_special_tokens=False)]
    assert segmenter(name).segment([table(name).prefix + text.encode() for text in texts]) == own


def test_the_real_vocabularies_have_the_expected_tables() -> None:
    smollm = table("smollm2")
    missing = (0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100))
    assert smollm.missing == set(missing) and smollm.family == BYTE_LEVEL
    assert sum(piece is None for piece in smollm.pieces) == 17 and len(smollm.pieces) == 49152
    gemma = table("gemma3")
    assert not gemma.missing and gemma.family == BYTE_FALLBACK and len(gemma.pieces) == 262144
    assert gemma.pieces[108] == b"\n\n" and gemma.pieces[1] is None


def test_missing_bytes_are_left_out() -> None:
    assert table("digits").missing == set(MISSING) and not table("expert-phi").missing
    assert segmenter("digits").segment([b"\x04", b"\xff\xf1", b"a\x04"]) == [
        [],
        [],
        segmenter("digits").segment([b"a"])[0],
    ]


@pytest.mark.parametrize(
    ("name", "ends", "expected"),
    [
        ("port-llama", (), (2,)),
        ("port-llama", (1,), (1,)),
        ("port-llama", (1, 2), (1, 2)),
        ("port-llama", (300,), (2,)),  # a token of the text
        ("expert-phi", (0, 5199), (0,)),  # the second is no token
    ],
)
def test_the_model_says_what_ends_a_text(name: str, ends: tuple[int, ...], expected: tuple[int, ...]) -> None:
    found = ByteTable.of(FOLDERS[name], 5200, ends)
    assert (found.ends, found.end) == (expected, expected[0])


def test_characters_wait_for_their_last_byte() -> None:
    of = segmenter("port-llama")
    emoji = "😀".encode()
    assert [of.characters(b"a" + emoji[:k]) for k in range(5)] == ["a", "a", "a", "a", "a😀"]
    assert of.characters(emoji[:2] + b"a") == "\udcf0\udc9fa"  # nothing can complete it any more
    assert of.characters("a\u2581b".encode()) == "a b"


def test_special_tokens_and_padding_ids_have_no_bytes() -> None:
    found = ByteTable.of(MODELS / "expert-phi", 5200)
    assert found.family == BYTE_LEVEL and found.end == 0
    assert [token for token, piece in enumerate(found.pieces) if piece is None] == [0, *range(5120, 5200)]
    llama = table("port-llama")
    assert llama.end == 2 and [token for token, piece in enumerate(llama.pieces) if piece is None] == [0, 1, 2]
    assert found.join([0, 5199]) == b""


def test_a_byte_piece_gives_way_to_a_piece_of_equal_bytes() -> None:
    llama = table("port-llama")
    letter = tokenizer("port-llama").token_to_id("a")
    assert llama.pieces[llama.byte_ids[0x61]] == llama.pieces[letter] == b"a"
    assert llama.ids_of[b"a"] == letter and letter not in llama.byte_ids
    assert llama.ids_of[b"\xff"] == llama.byte_ids[0xFF]


def test_phi2_and_tinyllama_have_the_expected_tables() -> None:
    phi = ByteTable.of(folder("phi2"), 51200)
    assert sum(piece is not None for piece in phi.pieces) == 50294 and phi.end == 50256
    assert phi.pieces[50257] == 31 * b" " and phi.pieces[50294] == b"\t\t" and phi.pieces[50295:] == (None,) * 905
    llama = table("tinyllama")
    texts = [piece for piece in llama.pieces if piece is not None]
    assert (len(texts), len(texts) - len(set(texts))) == (31997, 96)
    assert not {llama.ids_of[piece] for piece in texts if len(piece) > 1} & set(llama.byte_ids)


@pytest.mark.parametrize("name", ["port-llama", "expert-phi"])
def test_file_folder_and_loaded_tokenizer_give_the_same_table(name: str) -> None:
    inside = f"models/{name}"  # from the repository root
    assert ByteTable.of(inside) == table(name) == ByteTable.of(FOLDERS[name] / "tokenizer.json")
    assert ByteTable.of(tokenizer(name)) == table(name)


def changed(tmp_path: Path, name: str, **changes: object) -> Path:
    """A copy of a tokenizer's file with top-level entries replaced."""
    layout = json.loads((MODELS / name / "tokenizer.json").read_text(encoding="utf-8"))
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(layout | changes), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece", "WordLevel"])
def test_an_unknown_family_is_refused(tmp_path: Path, kind: str) -> None:
    path = changed(tmp_path, "port-llama", model={"type": kind, "vocab": {}})
    with pytest.raises(ValueError, match=rf"a {kind} tokenizer with decoder .* does not give the exact bytes.*: use a"):
        ByteTable.of(path)


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never"},
        {"type": "BPEDecoder", "suffix": ""},
    ],
)
def test_an_unknown_decoder_is_refused(tmp_path: Path, decoder: object) -> None:
    with pytest.raises(ValueError, match=r"a BPE tokenizer with decoder (none|Metaspace|BPEDecoder) does not give"):
        ByteTable.of(changed(tmp_path, "expert-phi", decoder=decoder))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer '.*none' does not exist: name a tokenizer.json or its folder"):
        ByteTable.of(tmp_path / "none")


def test_fewer_logits_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="has 4096 tokens but the model 4095 logits: use its own tokenizer"):
        ByteTable.of(MODELS / "port-llama", 4095)


def test_a_piece_outside_the_byte_alphabet_is_refused(tmp_path: Path) -> None:
    layout = json.loads((MODELS / "expert-phi" / "tokenizer.json").read_text(encoding="utf-8"))
    model = layout["model"] | {"vocab": layout["model"]["vocab"] | {"日": 5120}}
    with pytest.raises(ValueError, match="piece '日' is not written in the byte alphabet: mark it as an added token"):
        ByteTable.of(changed(tmp_path, "expert-phi", model=model))


def test_a_normalizer_that_changes_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"normalizer .*NFKC.* changes text in a way .* do not know: use a tokenizer"):
        ByteTable.of(changed(tmp_path, "port-llama", normalizer={"type": "NFKC"}))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("port-llama", {"pre_tokenizer": {"type": "Whitespace"}}),
        ("expert-phi", {"pre_tokenizer": None}),
        ("expert-phi", {"pre_tokenizer": {"type": "Digits", "individual_digits": True}}),
        (
            "expert-phi",
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        ),
        ("expert-phi", {"normalizer": {"type": "NFC"}}),
    ],
)
def test_a_base_whose_segments_depend_on_more_than_merges_is_refused(
    tmp_path: Path, name: str, changes: dict[str, object]
) -> None:
    path = changed(tmp_path, name, **changes)
    assert ByteTable.of(path) == table(name)  # an expert may have it: only bytes matter there
    with pytest.raises(ValueError, match="has segments that the bridge does not know: use a Llama- or GPT-2-style"):
        Segmenter.of(path)


def test_a_base_with_added_tokens_that_are_text_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"has 38 added tokens that are text \('  .*found before any merge: use a base"
    ):
        Segmenter.of(folder("phi2"))
