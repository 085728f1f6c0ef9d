"""The byte-exact bridge behind text that ends within a token of the expert's, conditional on the bytes.

    q[v] ~ sum over m of p(t_(n-m+1) ... t_n) * sum of p(e | t_1 ... t_(n-m)) over e with first base token v behind r_m

The expert reads a text as t_1 ... t_n, but might have written its end, r_m (the bytes of the last m tokens), as the
beginning of one longer token e: "token" was read, "tokens" was meant. All these p come from the pass that reads the
text, m = 0 to `BACK`. The heaviest e can be looked behind, since what follows may change how the base cuts them. Cost:
a search in the sorted vocabulary for each r_m, kept; `FOLLOWING` short segmentations for each e looked behind.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from chassis_utils.bridge.bridge import Bridge

BACK = 2  # tokens that may have been meant as the beginning of one longer token
FOLLOWING = 64  # tokens behind e that are cut together with it: the heaviest
KEPT = 4096  # beginnings whose tokens are remembered

# rows of expert tokens, k -> next-token probabilities after the last k tokens of each row, fewer for a shorter one
Ends = Callable[[list[list[int]], int], Sequence[Float[Tensor, "k v_e"]]]


class _Token(NamedTuple):
    """A token e that the expert may have begun to write: its mass, the row that it ends, what it adds to the text."""

    mass: float
    row: list[int]
    added: bytes
    first: int  # the base's first token of what it adds


class Covers:
    """The expert's tokens by their beginnings, and the base's first token of what each adds to a text."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge, self._texts = bridge, bridge.is_text.nonzero()[:, 0]
        pieces = [bridge.expert.pieces[token] or b"" for token in self._texts.tolist()]
        self._sorted = sorted(zip(pieces, self._texts.tolist(), strict=True))
        self._ends = torch.tensor(bridge.expert.ends, dtype=torch.int64)
        self._longer = lru_cache(KEPT)(self._find_longer)

    def next_token(
        self, rows: list[list[int]], expert: Ends, calls: int
    ) -> tuple[Float64[Tensor, "n v"], Float64[Tensor, "n"]]:
        """Base distributions behind texts that the expert reads as `rows`, and its mass of text the base cannot write.

        `calls` of the heaviest e of each row are looked behind. Raises `ValueError` for rows that are no distribution.
        """
        p = expert(rows, BACK + 1)
        found = [self._written(row, last, calls) for row, last in zip(rows, p, strict=True)]
        q = torch.stack([total for total, _ in found])
        for heavy in zip(*(tokens for _, tokens in found), strict=False):  # one of each row
            for total, e, then in zip(q, heavy, expert([e.row for e in heavy], 1), strict=True):
                total += e.mass * self._behind(e, then)
                total[e.first] -= e.mass
        return q.clamp_min(0.0), self.bridge.lost(torch.stack([last[-1] for last in p]).double())

    def _find_longer(self, text: bytes) -> tuple[Int[Tensor, "k"], Int[Tensor, "k"]]:
        """The expert's tokens that begin with `text` and go on, and the base's first token of what they add."""
        first = bisect_right(self._sorted, text, key=lambda entry: entry[0])
        last = bisect_left(self._sorted, text + b"\xff" * 4, first, key=lambda entry: entry[0])  # no UTF-8 has an FF
        tokens = [token for _, token in self._sorted[first:last]]
        added = self.bridge.base.segment([piece[len(text) :] for piece, _ in self._sorted[first:last]])
        return torch.tensor(tokens, dtype=torch.int64), torch.tensor([ids[0] for ids in added], dtype=torch.int64)

    def _written(
        self, row: list[int], p: Float[Tensor, "k v_e"], calls: int
    ) -> tuple[Float64[Tensor, "v"], list[_Token]]:
        """The base's distribution where every e is cut alone, and the heaviest e that are no end of the text."""
        p, pieces, begun = self.bridge.text_only(p.double()), self.bridge.expert.pieces, [b""]
        columns = [(self._texts, self.bridge.first[self._texts], p[-1, self._texts])]
        for token, before in zip(reversed(row[len(row) - len(p) + 1 :]), p[:-1].flip(0), strict=True):
            if (piece := pieces[token]) is None:  # the start of the text
                break
            begun.append(piece + begun[-1])
            longer, first = self._longer(begun[-1])
            columns = [(tokens, firsts, before[token] * masses) for tokens, firsts, masses in columns]
            columns.append((longer, first, before[longer]))
        back = torch.arange(len(columns)).repeat_interleave(torch.tensor([len(tokens) for tokens, *_ in columns]))
        tokens, first, masses = (torch.cat(column) for column in zip(*columns, strict=True))
        masses, text = masses / masses.sum(), ~torch.isin(tokens, self._ends)
        q = masses.new_zeros(len(self.bridge.base.table.pieces)).index_add_(0, first, masses)
        heavy = []
        for k in (masses * text).topk(min(calls, int(text.sum()))).indices.tolist():
            token, m = int(tokens[k]), int(back[k])
            added = (pieces[token] or b"")[len(begun[m]) :]
            heavy.append(_Token(float(masses[k]), [*row[: len(row) - m], token], added, int(first[k])))
        return q, heavy

    def _behind(self, e: _Token, p: Float[Tensor, "1 v_e"]) -> Float64[Tensor, "v"]:
        """The base's first token of what e adds to the text, one more token of the expert being known."""
        settled = self.bridge.safe_boundaries(e.added).index_fill(0, self._ends, True)
        p = self.bridge.text_only(p.double())[0].masked_fill(settled, 0.0)
        masses, tokens = p.topk(min(FOLLOWING, len(p)))
        rows = self.bridge.base.segment([e.added + (self.bridge.expert.pieces[k] or b"") for k in tokens.tolist()])
        q = p.new_zeros(len(self.bridge.base.table.pieces))
        q[e.first] = 1 - masses.sum()
        return q.index_add_(0, torch.tensor([ids[0] for ids in rows]), masses)
