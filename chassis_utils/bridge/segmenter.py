"""How a tokenizer cuts bytes into its pieces, and where a cut cannot be changed by what stands around it.

Main formula: segment(u + v) = segment(u) + segment(v) at a safe cut. Cost: that of the tokenizer.
"""

import codecs
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from chassis_utils.bridge.token_bytes import (
    BYTE_FALLBACK,
    BYTE_LEVEL,
    SPACE,
    ByteTable,
    Source,
    byte_alphabet,
    read_layout,
)

LONE_BYTE = re.compile("([\udc80-\udcff])")  # Python's stand-ins for bytes that are no UTF-8


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
        segments = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(whole, add_special_tokens=False)]
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
        words = ByteLevel(add_prefix_space=False).pre_tokenize_str(LONE_BYTE.sub("\ufffd", text))
        tokens = []
        for _, (start, end) in words:
            word = "".join(signs[byte] for byte in text[start:end].encode("utf-8", "surrogateescape"))
            tokens += [token.id for token in self.tokenizer.model.tokenize(word)]
        return tokens


def _require_plain(layout: dict, family: str) -> None:
    """Refuse what would make segments depend on more than merges and the pre-tokenizer of GPT-2."""
    known = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True} if family == BYTE_LEVEL else None
    pre_tokenizer = layout["pre_tokenizer"]
    if family == BYTE_LEVEL and pre_tokenizer:
        pre_tokenizer = {key: pre_tokenizer.get(key) for key in ("type", "add_prefix_space", "use_regex")}
    if pre_tokenizer != known or (family == BYTE_LEVEL and layout["normalizer"]):
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
