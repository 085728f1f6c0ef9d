"""The exact bytes of every vocabulary entry.

Bytes come from `tokenizer.json`, never from `decode([id])`, which drops leading spaces and
shows half a character as a replacement sign. The decoder tells two families apart:

    byte-level      one byte for each sign of the byte alphabet; added tokens are literal text
    byte-fallback   "<0xNN>" is byte NN; in all else U+2581 is a space, the rest UTF-8

Main formula: join(encode(text)) = text, but for bytes without a piece of their own (`missing`), which the tokenizer
leaves out of a text. Cost: a second for a vocabulary of 260 000.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from tokenizers import Tokenizer

from chassis_utils.files import locate
from chassis_utils.lm.tokenizer import build, read_json

BYTE_LEVEL, BYTE_FALLBACK = "byte-level", "byte-fallback"
MARKS = ("continuing_subword_prefix", "end_of_word_suffix")
OTHER_FAMILIES = ("Unigram", "WordPiece", "WordLevel")  # which no table is made of
SPACE = "\u2581"  # how byte-fallback tokenizers write a space
END_OF_TEXT = ("<|endoftext|>", "</s>", "<|end_of_text|>")
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
NORMALIZERS = {  # of a byte-fallback tokenizer, as JSON -> what is put before the start of a text
    '{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}': b"",
    '{"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, '
    '{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}': b" ",
}

Source = str | Path | Tokenizer | dict  # a tokenizer.json: the file or its folder, loaded, or its content


@dataclass(frozen=True)
class ByteTable:
    """The bytes of each token id; None for special tokens and for padding ids, which are no text."""

    pieces: tuple[bytes | None, ...]
    ends: tuple[int, ...]  # the end-of-text tokens, first the one that the model itself writes
    family: str
    byte_ids: tuple[int, ...] = ()  # ids of the 256 pieces "<0xNN>", byte-fallback only
    prefix: bytes = b""  # what the tokenizer puts before the start of a text

    @classmethod
    def of(cls, source: Source, n_logits: int | None = None, ends: Iterable[int] = ()) -> "ByteTable":
        """The table of a `tokenizer.json` (file, its folder, or loaded) for a model with `n_logits` logits.

        `ends` are the model's end-of-text tokens; where none of them is a token outside the text, the first of
        `END_OF_TEXT` that the tokenizer has.
        Raises `ValueError` for a missing file, a family whose pieces are no exact bytes, and
        fewer logits than tokens.
        """
        layout = read_layout(source)
        family = _family(layout)
        vocabulary: dict[str, int] = layout["model"]["vocab"]
        added = {entry["id"]: entry for entry in layout["added_tokens"]}
        size = 1 + max([*vocabulary.values(), *added])
        if n_logits is not None and n_logits < size:
            raise ValueError(f"the tokenizer has {size} tokens but the model {n_logits} logits: use its own tokenizer")
        pieces: list[bytes | None] = [None] * (n_logits or size)
        silent = {layout["model"].get("unk_token")} | {entry["content"] for entry in added.values()}
        for piece, token in vocabulary.items():
            if piece not in silent:
                pieces[token] = _piece_bytes(piece, family)
        for token, entry in added.items():
            text = entry["content"].encode() if family == BYTE_LEVEL else _piece_bytes(entry["content"], family)
            pieces[token] = None if entry["special"] else text
        special = {entry["content"]: token for token, entry in added.items() if entry["special"]}
        known = [special[name] for name in END_OF_TEXT if name in special]
        last = tuple(token for token in ends if token in special.values()) or tuple(known[:1])
        if family == BYTE_LEVEL:
            return cls(tuple(pieces), last, family)
        lacking = [name for byte in range(256) if (name := f"<0x{byte:02X}>") not in vocabulary]
        if lacking:
            raise ValueError(
                f"a {family} tokenizer without piece {lacking[0]!r} cannot write every text: use it as its model came"
            )
        byte_ids = tuple(vocabulary[f"<0x{byte:02X}>"] for byte in range(256))
        return cls(tuple(pieces), last, family, byte_ids, _prefix(layout))

    @property
    def end(self) -> int | None:
        """The end-of-text token that the model writes; None where it has none."""
        return self.ends[0] if self.ends else None

    @cached_property
    def missing(self) -> frozenset[int]:
        """Bytes without a piece of their own: no text with them can be written."""
        return frozenset(range(256)) - {piece[0] for piece in self.pieces if piece is not None and len(piece) == 1}

    @cached_property
    def ids_of(self) -> dict[bytes, int]:
        """Bytes -> id. Of several ids the lowest, and a byte piece only where there is no other."""
        lone = set(self.byte_ids)
        ranked = sorted(range(len(self.pieces)), key=lambda token: (token in lone, token), reverse=True)
        return {piece: token for token in ranked if (piece := self.pieces[token]) is not None}

    def join(self, ids: Iterable[int]) -> bytes:
        """The text, as bytes, of the tokens of a whole text; special tokens and padding ids add nothing."""
        return b"".join(self.pieces[token] or b"" for token in ids).removeprefix(self.prefix)


def read_layout(source: Source) -> dict:
    """The content of a `tokenizer.json`; `ValueError` where there is none, or a damaged one."""
    if isinstance(source, dict):
        return source
    if isinstance(source, Tokenizer):
        return json.loads(source.to_str())
    path = locate(source)
    path = path / "tokenizer.json" if os.path.isdir(path) else path
    if not os.path.isfile(path):
        raise ValueError(f"tokenizer {str(path)!r} does not exist: name a tokenizer.json or its folder")
    layout = read_json(path)
    kind = layout["model"].get("type") if isinstance(layout.get("model"), dict) else None
    if kind in OTHER_FAMILIES:  # which `_family` refuses as they are
        return {"decoder": None} | layout
    return json.loads(build(layout, str(path)).to_str())


def _family(layout: dict) -> str:
    kind, decoder = layout["model"].get("type"), layout["decoder"]
    listed = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    steps = {str(step.get("type")) for step in listed if isinstance(step, dict)} if isinstance(listed, list) else set()
    marked = next((mark for mark in MARKS if layout["model"].get(mark)), None)
    if kind == "BPE" and marked:
        raise ValueError(f"pieces with a {marked} are not the bytes that they stand for: use a tokenizer without one")
    if kind == "BPE" and steps == {"ByteLevel"}:
        return BYTE_LEVEL
    if kind == "BPE" and {"Replace", "ByteFallback"} <= steps and layout["model"].get("byte_fallback"):
        return BYTE_FALLBACK
    raise ValueError(
        f"a {kind} tokenizer with decoder {', '.join(sorted(steps)) or 'none'} does not give the exact bytes of its "
        "pieces: use a model with a byte-level or byte-fallback BPE tokenizer"
    )


@cache
def byte_alphabet() -> dict[str, int]:
    """Sign -> byte: printable Latin-1 stands for itself, all other bytes are U+0100 and up in their order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}


def _piece_bytes(piece: str, family: str) -> bytes:
    if family == BYTE_LEVEL:
        alphabet = byte_alphabet()
        if any(sign not in alphabet for sign in piece):
            raise ValueError(f"piece {piece!r} is not written in the byte alphabet: mark it as an added token")
        return bytes(alphabet[sign] for sign in piece)
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()


def _prefix(layout: dict) -> bytes:
    normalizer = json.dumps(layout["normalizer"], ensure_ascii=False)
    if normalizer not in NORMALIZERS:
        raise ValueError(
            f"normalizer {normalizer} changes text in a way that the byte tables do not know: "
            "use a tokenizer that at most puts a space in front and writes spaces as U+2581"
        )
    return NORMALIZERS[normalizer]
