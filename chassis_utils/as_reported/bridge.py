"""The vocabulary bridges of the CHASSIS study exactly as they were measured, and what they match.

Stages A and B compare decoded strings; `coverage` counts what that finds, and finds wrongly, against exact bytes. The
target of both is log(p + 1e-8) with p[v] the sum over the expert's 256 likeliest tokens e of p[e] times the share of
e that goes to v. Nothing else in the package depends on this module. Cost: two dictionaries; at most ten look-ups a
string.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor

from chassis_utils.bridge.bridge import Bridge

TOP = 256  # expert tokens that are moved
FLOOR = 1e-8  # added to every probability before the logarithm
PAIRED = 4096  # base ids, from 0, that pairs are made of
LONGEST = 10  # characters of a string that is split in two


@dataclass(frozen=True)
class StringBridge:
    """Which share of each expert token goes to which base token: the entries of a sparse [v_e, v] matrix."""

    expert: Int[Tensor, "m"]
    base: Int[Tensor, "m"]
    share: Float[Tensor, "m"]
    n_base: int

    def target(self, p: Float[Tensor, "n v_e"]) -> Float[Tensor, "n v"]:
        """Target logits log(p + 1e-8) of the base [n, v] from the expert's probabilities [n, v_e].

        Flaw: what matches no base token is dropped and not made up for, so a row is no distribution, and every token
        that nothing maps to gets log 1e-8 = -18.4, a target that has nothing to do with the base's own logits there.
        Use `Bridge.one_step` or `look_ahead`.
        """
        top = p.topk(min(TOP, p.shape[1]), dim=1)
        kept = torch.zeros_like(p).scatter_(1, top.indices, top.values)
        moved = kept[:, self.expert] * self.share.to(p.dtype)
        q = torch.zeros(self.n_base, len(p), dtype=p.dtype).index_add_(0, self.base, moved.T.contiguous()).T
        return (q + FLOOR).log()


def decoded(tokenizer: Tokenizer) -> list[str]:
    """`decode([id])` of every token, special tokens spelt out.

    Flaw: a byte-fallback tokenizer drops the leading space of what it decodes, and every incomplete character becomes
    the same replacement sign. Use `ByteTable.of`.
    """
    return tokenizer.decode_batch([[token] for token in range(tokenizer.get_vocab_size())], skip_special_tokens=False)


def stage_a(base: Sequence[str], expert: Sequence[str]) -> StringBridge:
    """Each expert token, in equal parts, to the base tokens with the same decoded string.

    Flaw: see `decoded`: no string with a leading space matches, and of those that match many have other bytes. Use
    `Bridge.of`.
    """
    ids = _ids(base)
    return _string_bridge([Counter(ids.get(text, [])) for text in expert], len(base))


def stage_b(base: Sequence[str], expert: Sequence[str]) -> StringBridge:
    """Each expert token to the first of one or two base tokens whose decoded strings make its own.

    Every base token of equal string and every such pair of the first 4096 ids (for strings of at most 10 characters)
    counts the same. Flaws: those of `stage_a`; and a base reads a string in one way, not in every way it can be
    split: "the" goes in equal parts to "the", "t" and "th". Use `Bridge.of`.
    """
    ids, paired = _ids(base), _ids(base[:PAIRED])
    ways: list[Counter[int]] = []
    for text in expert:
        firsts = Counter(ids.get(text, []))
        for cut in range(1, len(text)) if len(text) <= LONGEST else ():
            seconds = len(paired.get(text[cut:], []))
            firsts.update({first: seconds for first in paired.get(text[:cut], []) if seconds})
        ways.append(firsts)
    return _string_bridge(ways, len(base))


def coverage(bridge: Bridge, base: Tokenizer, expert: Tokenizer) -> pd.DataFrame:
    """How many expert tokens each way of matching reaches, and how many wrongly: to other bytes than their own.

    Rows by `way` and `kind` of expert token: all; space-initial (a space and more); added (outside the merges, mostly
    runs of white space). A string match is wrong where no base token of that string has the bytes.
    """
    own, pieces = bridge.base.table, bridge.expert.pieces
    ids, strings = _ids(decoded(base)), decoded(expert)
    added = expert.get_added_tokens_decoder()
    rows = []
    for token, piece in enumerate(pieces):
        if piece:
            kinds = {"all": True, "space-initial": piece[:1] == b" " and piece.strip(b" "), "added": token in added}
            equal = [own.pieces[v] for v in ids.get(strings[token], [])]
            first, carried = own.pieces[int(bridge.first[token])] or b"?", bool(bridge.is_text[token])
            ways = {
                "equal decoded strings": (bool(equal), bool(equal) and piece not in equal),
                "equal bytes": (piece in own.ids_of, False),
                "first token of the bytes": (carried, carried and not piece.startswith(first)),
            }
            rows += [(way, kind, *hit) for way, hit in ways.items() for kind, belongs in kinds.items() if belongs]
    frame = pd.DataFrame(rows, columns=["way", "kind", "matched", "wrong"])
    frame.insert(2, "tokens", 1)
    return frame.groupby(["way", "kind"], sort=False).sum().reset_index()


def _ids(strings: Sequence[str]) -> dict[str, list[int]]:
    ids_of = defaultdict(list)
    for token, text in enumerate(strings):
        if text:  # what decodes to nothing matches nothing
            ids_of[text].append(token)
    return ids_of


def _string_bridge(ways: Sequence[Counter[int]], n_base: int) -> StringBridge:
    entries = [(e, v, n / targets.total()) for e, targets in enumerate(ways) for v, n in targets.items()]
    if not entries:
        raise ValueError("no expert token has the decoded string of a base token: use Bridge.of")
    expert, base, share = zip(*entries, strict=True)
    return StringBridge(torch.tensor(expert), torch.tensor(base), torch.tensor(share, dtype=torch.float64), n_base)
