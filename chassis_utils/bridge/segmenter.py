"""How a tokenizer cuts bytes into its pieces, and where a cut cannot be changed by what stands around it.

Main formula: segment(u + v) = segment(u) + segment(v) at a safe cut. Cost: that of the tokenizer.
"""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import Digits

from chassis_utils.bridge.token_bytes import (
    BYTE_FALLBACK,
    BYTE_LEVEL,
    SPACE,
    ByteTable,
    Source,
    byte_alphabet,
    read_layout,
)

FIRST_LONE, LAST_LONE = "\udc80", "\udcff"  # Python's stand-ins for bytes that are no UTF-8
LONE_BYTE = re.compile(f"([{FIRST_LONE}-{LAST_LONE}])")
BATCH = 256  # texts encoded at a time: a vocabulary at once takes a third longer
DIGIT_BY_DIGIT = Digits(individual_digits=True)
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}  # every digit a piece of its own, as in SmolLM
# Gemma's, which finds no space because the normalizer has replaced them all
NO_SPACE_LEFT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


@dataclass(frozen=True, eq=False)
class Segmenter:
    """A tokenizer on bytes: no start of text, no special tokens, and bytes that are no UTF-8 allowed.

    Characters are those of `characters`. `pairs` holds every two neighbours within a piece:
    characters (byte-fallback) or bytes (byte-level). `digits` says whether every digit is a piece of its own.
    """

    table: ByteTable
    tokenizer: Tokenizer
    pairs: frozenset[str | bytes]
    digits: bool = False
    _decided: dict[str, bool] = field(default_factory=dict)  # by `is_safe`

    @classmethod
    def of(cls, source: Source, n_logits: int | None = None, ends: Iterable[int] = ()) -> "Segmenter":
        """The segmenter of a tokenizer; `ValueError` where `ByteTable.of` or `_require_plain` refuses it."""
        layout = read_layout(source)
        table = ByteTable.of(layout, n_logits, ends)
        _require_plain(layout, table.family)
        if table.family == BYTE_FALLBACK:
            layout["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        layout["added_tokens"] = [entry for entry in layout["added_tokens"] if not entry["special"]]
        layout |= {"post_processor": None, "padding": None, "truncation": None}
        texts = [piece for piece in table.pieces if piece is not None and len(piece) > 1]
        rows: Sequence[str | bytes] = texts
        if table.family == BYTE_FALLBACK:  # where every piece of more than one byte is whole characters
            rows = [text.decode() for text in texts]
        pairs = frozenset(row[i : i + 2] for row in rows for i in range(len(row) - 1))
        return cls(table, Tokenizer.from_str(json.dumps(layout)), pairs, DIGITS in _steps(layout))

    def segment(self, data: Sequence[bytes]) -> list[list[int]]:
        """Token ids of each byte string, as from the middle of a text; bytes missing in the table are left out."""
        texts = [text.decode("utf-8", "surrogateescape") for text in data]
        broken = {k for k, text in enumerate(texts) if LONE_BYTE.search(text)}
        whole = ["" if k in broken else text for k, text in enumerate(texts)]
        segments: list[list[int]] = []
        for first in range(0, len(whole), BATCH):
            batch = self.tokenizer.encode_batch_fast(whole[first : first + BATCH], add_special_tokens=False)
            segments += [encoding.ids for encoding in batch]
        for k in broken:
            segments[k] = self._segment_broken(texts[k])
        return segments

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
        starts anew, and a digit that is a piece of its own stands between two cuts; between other characters
        no piece may contain the neighbouring bytes, none of them may be left out, and no contraction may be
        near; runs of white space are never cut. Two characters before the cut and one behind it decide.
        """
        near = text[max(cut - 2, 0) : cut + 1]
        if near not in self._decided:
            self._decided[near] = self._decide(near)
        return self._decided[near]

    def _decide(self, near: str) -> bool:
        left, right = near[-2], near[-1]
        if self.table.family == BYTE_FALLBACK:
            return left + right not in self.pairs
        if self.digits and (_is_digit(left) or _is_digit(right)):
            return True
        if left.isspace() or FIRST_LONE <= left <= LAST_LONE or FIRST_LONE <= right <= LAST_LONE:
            return False
        if right in " \t\n\r":
            return True
        if len(near) < 3 or "'" in near or right.isspace():
            return False
        before, after = left.encode(), right.encode()
        return before[-1:] + after[:1] not in self.pairs and self.table.missing.isdisjoint(before + after)

    def has_safe_cut(self, text: str, start: int = 0) -> bool:
        """Whether a safe cut lies inside `text`, behind its first `start` characters."""
        return any(self.is_safe(text, cut) for cut in range(start + 1, len(text)))

    def unsettled_end(self, text: str) -> bytes:
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
        signs = {byte: sign for sign, byte in byte_alphabet().items()}
        words = self.tokenizer.pre_tokenizer.pre_tokenize_str(LONE_BYTE.sub("\ufffd", text))
        tokens = []
        for _, (start, end) in words:
            word = "".join(signs[byte] for byte in text[start:end].encode("utf-8", "surrogateescape"))
            tokens += [token.id for token in self.tokenizer.model.tokenize(word)]
        return tokens


def _steps(layout: dict) -> list[dict]:
    """What the pre-tokenizer does, step by step, without what changes no segment."""
    whole = layout["pre_tokenizer"]
    steps = whole["pretokenizers"] if whole and whole["type"] == "Sequence" else [whole] if whole else []
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


@cache
def _is_digit(character: str) -> bool:
    """Whether the tokenizers library takes the character for a digit: its tables of Unicode are not Python's."""
    return not LONE_BYTE.match(character) and len(DIGIT_BY_DIGIT.pre_tokenize_str("a" + character)) > 1


def _require_plain(layout: dict, family: str) -> None:
    """Refuse what would make segments depend on more than merges and the pre-tokenizers of GPT-2 and SmolLM.

    Added tokens that are text are found before any merge: as good as a merge between characters, but not before the
    words of a byte-level tokenizer are found, which would be others.
    """
    known = [[GPT2], [DIGITS, GPT2]] if family == BYTE_LEVEL else [[], [NO_SPACE_LEFT]]
    if _steps(layout) not in known or (family == BYTE_LEVEL and layout["normalizer"]):
        name = (layout["pre_tokenizer"] or {}).get("type")
        raise ValueError(
            f"a {family} base with pre-tokenizer {name} and normalizer {(layout['normalizer'] or {}).get('type')} has "
            "segments that the bridge does not know: use a Llama- or GPT-2-style base"
        )
    unlike = ("single_word", "lstrip", "rstrip", "normalized") if family == BYTE_FALLBACK else ("content",)
    added = [entry for entry in layout["added_tokens"] if not entry["special"]]
    text = [entry["content"] for entry in added if any(entry[key] for key in unlike)]
    if text:
        raise ValueError(
            f"the base has {len(text)} added tokens that are text ({text[0]!r}, ...), found before any merge: "
            "use a base without them"
        )
