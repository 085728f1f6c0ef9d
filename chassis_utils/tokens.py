"""The exact bytes of every vocabulary entry, and how a tokenizer cuts bytes into its pieces.

Bytes come from `tokenizer.json`, never from `decode([id])`, which drops leading spaces and
shows half a character as a replacement sign. The decoder tells two families apart:

    byte-level      one byte for each sign of the byte alphabet; added tokens are literal text
    byte-fallback   "<0xNN>" is byte NN; in all else U+2581 is a space, the rest UTF-8

Main formulas: join(encode(text)) = text, and segment(u + v) = segment(u) + segment(v) at a
safe cut. Cost: a second for a vocabulary of 50 000.
"""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from chassis_utils.paths import ROOT

BYTE_LEVEL, BYTE_FALLBACK = "byte-level", "byte-fallback"
SPACE = "\u2581"  # how byte-fallback tokenizers write a space
END_OF_TEXT = ("<|endoftext|>", "</s>", "<|end_of_text|>")
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
LONE_BYTE = re.compile("([\udc80-\udcff])")  # Python's stand-ins for bytes that are no UTF-8
NORMALIZERS = {  # of a byte-fallback tokenizer, as JSON -> what is put before the start of a text
    '{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}': b"",
    '{"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, '
    '{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}': b" ",
}

Source = str | Path | Tokenizer


@dataclass(frozen=True)
class ByteTable:
    """The bytes of each token id; None for special tokens and for padding ids, which are no text."""

    pieces: tuple[bytes | None, ...]
    end: int | None  # the end-of-text token
    family: str
    byte_ids: tuple[int, ...] = ()  # ids of the 256 pieces "<0xNN>", byte-fallback only
    prefix: bytes = b""  # what the tokenizer puts before the start of a text

    @classmethod
    def of(cls, source: Source, n_logits: int | None = None) -> "ByteTable":
        """The table of a `tokenizer.json` (file, its folder, or loaded) for a model with `n_logits` logits.

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
            pieces[token] = None if entry["special"] else entry["content"].encode()
        special = {entry["content"]: token for token, entry in added.items() if entry["special"]}
        end = next((special[name] for name in END_OF_TEXT if name in special), None)
        if family == BYTE_LEVEL:
            return cls(tuple(pieces), end, family)
        byte_ids = tuple(vocabulary[f"<0x{byte:02X}>"] for byte in range(256))
        return cls(tuple(pieces), end, family, byte_ids, _prefix(layout))

    @cached_property
    def ids_of(self) -> dict[bytes, int]:
        """Bytes -> id. Of several ids the lowest, and a byte piece only where there is no other."""
        lone = set(self.byte_ids)
        ranked = sorted(range(len(self.pieces)), key=lambda token: (token in lone, token), reverse=True)
        return {piece: token for token in ranked if (piece := self.pieces[token]) is not None}

    def join(self, ids: Iterable[int]) -> bytes:
        """The text, as bytes, of the tokens of a whole text; special tokens and padding ids add nothing."""
        return b"".join(self.pieces[token] or b"" for token in ids).removeprefix(self.prefix)


@dataclass(frozen=True, eq=False)
class Segmenter:
    """A tokenizer on bytes: no start of text, no special tokens, and bytes that are no UTF-8 allowed.

    Characters are those of `characters`. `pairs` holds every two neighbours within a piece:
    characters (byte-fallback) or bytes (byte-level).
    """

    table: ByteTable
    tokenizer: Tokenizer
    pairs: frozenset[str | bytes]

    @classmethod
    def of(cls, source: Source, n_logits: int | None = None) -> "Segmenter":
        """The segmenter of a tokenizer; `ValueError` where `ByteTable.of` or `_require_plain` refuses it."""
        table, layout = ByteTable.of(source, n_logits), read_layout(source)
        _require_plain(layout, table.family)
        if table.family == BYTE_FALLBACK:
            layout["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        layout |= {"added_tokens": [], "post_processor": None, "padding": None, "truncation": None}
        texts = [piece for piece in table.pieces if piece is not None and len(piece) > 1]
        rows: Sequence[str | bytes] = texts
        if table.family == BYTE_FALLBACK:  # where every piece of more than one byte is whole characters
            rows = [text.decode() for text in texts]
        pairs = frozenset(row[i : i + 2] for row in rows for i in range(len(row) - 1))
        return cls(table, Tokenizer.from_str(json.dumps(layout)), pairs)

    def segment(self, data: Sequence[bytes]) -> list[list[int]]:
        """Token ids of each byte string, as from the middle of a text."""
        texts = [text.decode("utf-8", "surrogateescape") for text in data]
        broken = {k for k, text in enumerate(texts) if LONE_BYTE.search(text)}
        whole = ["" if k in broken else text for k, text in enumerate(texts)]
        found = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(whole, add_special_tokens=False)]
        for k in broken:
            found[k] = self._segment_broken(texts[k])
        return found

    def characters(self, data: bytes) -> str:
        """The characters that are certain whatever follows: without a last one that later bytes may complete."""
        text = codecs.utf_8_decode(data, "surrogateescape", False)[0]
        return text if self.table.family == BYTE_LEVEL else text.replace(SPACE, " ")

    def is_open(self, data: bytes) -> bool:
        """Whether later bytes may complete a last character."""
        return codecs.utf_8_decode(data, "surrogateescape", False)[1] < len(data)

    def is_safe(self, text: str, cut: int) -> bool:
        """Whether text[:cut] and text[cut:] are segmented independently, whatever stands around `text`.

        Byte-fallback: no piece contains the two neighbours. Byte-level: white space after a word always
        starts anew; between other characters no piece may contain the neighbouring bytes and no
        contraction may be near; runs of white space are never cut.
        """
        if self.table.family == BYTE_FALLBACK:
            return text[cut - 1 : cut + 1] not in self.pairs
        left, right = text[cut - 1], text[cut]
        if left.isspace() or LONE_BYTE.match(left) or LONE_BYTE.match(right):
            return False
        if right in " \t\n\r":
            return True
        near = text[max(cut - 2, 0) : cut + 1]
        if len(near) < 3 or "'" in near or right.isspace():
            return False
        return left.encode()[-1:] + right.encode()[:1] not in self.pairs

    def has_safe_cut(self, text: str, start: int = 0) -> bool:
        """Whether a safe cut lies inside `text`, behind its first `start` characters."""
        return any(self.is_safe(text, cut) for cut in range(start + 1, len(text)))

    def last_stretch(self, text: str) -> bytes:
        """What follows the last safe cut of a whole text, with the start of the text where there is none."""
        text = self.characters(text.encode())
        cut = next((cut for cut in range(len(text) - 1, 0, -1) if self.is_safe(text, cut)), 0)
        return text[cut:].encode() if cut else self.table.prefix + text.encode()

    def _segment_broken(self, text: str) -> list[int]:
        if self.table.family == BYTE_FALLBACK:  # byte pieces take part in no merge
            parts = [part for part in LONE_BYTE.split(text) if part]
            ids = [
                [self.table.byte_ids[ord(part) - 0xDC00]]
                if LONE_BYTE.match(part)
                else self.tokenizer.encode(part, add_special_tokens=False).ids
                for part in parts
            ]
            return [token for part in ids for token in part]
        signs = {byte: sign for sign, byte in _byte_alphabet().items()}
        words = ByteLevel(add_prefix_space=False).pre_tokenize_str(LONE_BYTE.sub("\ufffd", text))
        found = []
        for _, (start, end) in words:
            word = "".join(signs[byte] for byte in text[start:end].encode("utf-8", "surrogateescape"))
            found += [token.id for token in self.tokenizer.model.tokenize(word)]
        return found


def read_layout(source: Source) -> dict:
    """The content of a `tokenizer.json`; `ValueError` where there is none."""
    if isinstance(source, Tokenizer):
        return json.loads(source.to_str())
    path = Path(source) if Path(source).is_absolute() else ROOT / source
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"tokenizer {str(path)!r} does not exist: name a tokenizer.json or its folder")
    return json.loads(path.read_text(encoding="utf-8"))


def _family(layout: dict) -> str:
    kind, decoder = layout["model"]["type"], layout["decoder"] or {}
    steps = {step["type"] for step in decoder.get("decoders", [decoder]) if step}
    if kind == "BPE" and steps == {"ByteLevel"}:
        return BYTE_LEVEL
    if kind == "BPE" and {"Replace", "ByteFallback"} <= steps and layout["model"].get("byte_fallback"):
        return BYTE_FALLBACK
    raise ValueError(
        f"a {kind} tokenizer with decoder {', '.join(sorted(steps)) or 'none'} does not give the exact bytes of its "
        "pieces: use a model with a byte-level or byte-fallback BPE tokenizer"
    )


@cache
def _byte_alphabet() -> dict[str, int]:
    """Sign -> byte: printable Latin-1 stands for itself, all other bytes are U+0100 and up in their order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}


def _piece_bytes(piece: str, family: str) -> bytes:
    if family == BYTE_LEVEL:
        alphabet = _byte_alphabet()
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


def _require_plain(layout: dict, family: str) -> None:
    """Refuse what would make segments depend on more than merges and the pre-tokenizer of GPT-2."""
    known = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True} if family == BYTE_LEVEL else None
    found = layout["pre_tokenizer"]
    if family == BYTE_LEVEL and found:
        found = {key: found.get(key) for key in ("type", "add_prefix_space", "use_regex")}
    if found != known or (family == BYTE_LEVEL and layout["normalizer"]):
        name = (layout["pre_tokenizer"] or {}).get("type")
        raise ValueError(
            f"a {family} base with pre-tokenizer {name} and normalizer {(layout['normalizer'] or {}).get('type')} has "
            "segments that the bridge does not know: use a Llama- or GPT-2-style base"
        )
    text = [entry["content"] for entry in layout["added_tokens"] if not entry["special"]]
    if text:
        raise ValueError(
            f"the base has {len(text)} added tokens that are text ({text[0]!r}, ...), found before any merge: "
            "use a base without them"
        )
