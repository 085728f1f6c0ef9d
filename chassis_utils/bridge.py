"""The byte-exact bridge: an expert's next-token distribution as one over another vocabulary.

One step: q[v] = sum of p[e] over the expert tokens e whose bytes the base cuts into v first.
What follows e may still change that cut. A cut between two characters is safe if no base
piece contains the pair; mass behind a safe cut is resolved, and TV(q, exact) <= unresolved
mass. Look-ahead asks the expert what follows the heaviest unresolved text. The exact q*:

    q*[v] = P(v comes first behind encode(x) in encode(x + Y)),  Y the expert's text

Where encode(x + Y) does not begin with encode(x) (re-merge mass, reported), Y is cut on its
own, because the base has already read encode(x). Cost: one `index_add_` a batch for one step;
one short segmentation for each heavy token of every expert call for look-ahead.
"""

import copy
import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from chassis_utils.models import LanguageModel
from chassis_utils.states import encode, pad
from chassis_utils.tokens import ByteTable, Segmenter

FEWEST, MOST = 4, 64  # texts that the expert continues at once: few while the next are still to be found
LEFT = 0.01  # share of a text's mass whose many light tokens are left together until nothing heavier waits

# token rows that continue the context -> next-token probabilities [rows, expert tokens]
Expert = Callable[[list[list[int]]], Float[Tensor, "n v_e"]]


@dataclass(frozen=True)
class Bridged:
    """A base next-token distribution and how far it is from exact; sums to 1."""

    q: Float64[Tensor, "v"]
    unresolved: float  # TV(q, exact) is at most this
    aside: Float64[Tensor, "v"]  # the part of q owed to text that re-merges with the context
    calls: int  # texts that the expert was asked to continue

    @property
    def remerged(self) -> float:
        """Mass of the text before which the base would have cut the context otherwise."""
        return float(self.aside.sum())

    @property
    def kept(self) -> Float64[Tensor, "v"]:
        """What q is given that the context keeps its tokens: the factors of the probability of a token sequence.

        NaN where it never does.
        """
        rest = self.q - self.aside
        return rest / rest.sum()


@dataclass(frozen=True, eq=False)
class Bridge:
    """Two vocabularies and the table of one step between them."""

    base: Segmenter
    expert: ByteTable
    first: Int[Tensor, "v_e"]  # first base token of each expert token's bytes
    resolved: Bool[Tensor, "v_e"]  # whether nothing that follows can change it
    spoken: Bool[Tensor, "v_e"]  # whether it is text, or the end of it
    lead: Int[Tensor, "v_e"]  # number of its first character in `leads`
    leads: tuple[str, ...]
    _seams: dict[str, Bool[Tensor, "v_e"]] = field(default_factory=dict)

    @classmethod
    def of(cls, base: Segmenter, expert: ByteTable) -> "Bridge":
        """The bridge between two vocabularies; `ValueError` where only the expert ends its texts."""
        if expert.end is not None and base.table.end is None:
            raise ValueError("the expert has an end-of-text token and the base none: use a base that has one")
        pieces = [piece or b"" for piece in expert.pieces]
        first = [ids[0] if ids else 0 for ids in base.segment(pieces)]
        texts = [base.characters(piece) for piece in pieces]
        resolved, spoken = [base.has_safe_cut(text) for text in texts], [bool(piece) for piece in pieces]
        if expert.end is not None and base.table.end is not None:
            first[expert.end], resolved[expert.end], spoken[expert.end] = base.table.end, True, True
        leads = dict.fromkeys(text[:1] for text in texts)  # "" for none that is certain
        number = {lead: k for k, lead in enumerate(leads)}
        lead = torch.tensor([number[text[:1]] for text in texts])
        return cls(base, expert, torch.tensor(first), torch.tensor(resolved), torch.tensor(spoken), lead, tuple(leads))

    @classmethod
    def between(cls, base: LanguageModel, expert: LanguageModel) -> "Bridge":
        """The bridge between two models; `ValueError` for tokenizers whose bytes or segments are not known."""
        return cls.of(
            Segmenter.of(base.tokenizer, len(base.head.weight)), ByteTable.of(expert.tokenizer, len(expert.head.weight))
        )

    def text_only(self, p: Float[Tensor, "n v_e"]) -> Float[Tensor, "n v_e"]:
        """Probabilities without padding ids and tokens that are no text, as if dropped before the softmax.

        Raises `ValueError` for another width than the expert's and rows that are no distribution.
        """
        if p.shape[1] != len(self.first):
            raise ValueError(
                f"{p.shape[1]} probabilities, but the expert has {len(self.first)} tokens: pass all of them"
            )
        total = p @ self.spoken.to(p.dtype)
        if not (torch.isfinite(total) & (total > 0)).all() or p.min() < 0:
            raise ValueError("a row of the expert is no distribution over its text: pass probabilities, not logits")
        return p.masked_fill(~self.spoken, 0.0).div_(total[:, None])

    def one_step(self, p: Float[Tensor, "n v_e"]) -> tuple[Float[Tensor, "n v"], Float[Tensor, "n"]]:
        """Base distributions [n, v] from the expert's [n, v_e], whatever the context, and unresolved mass [n].

        The mass bounds the error as in `look_ahead`; for a byte-level base only behind a safe seam.
        """
        p = self.text_only(p)
        q = torch.zeros(len(p), len(self.base.table.pieces), dtype=p.dtype)
        return q.index_add_(1, self.first, p), p @ (~self.resolved).to(p.dtype)

    def in_context(self, p: Float[Tensor, "n v_e"], texts: Sequence[str], delta: float = 1e-3) -> list[Bridged]:
        """One step behind each context, cut together with it, with the re-merge mass; see `look_ahead`."""
        rows = zip(p.split(1), texts, strict=True)
        return [self.look_ahead(partial(_asked_once, row), text, 0, delta) for row, text in rows]

    def look_ahead(self, expert: Expert, text: str, calls: int = 16, delta: float = 1e-3) -> Bridged:
        """The base's distribution behind `text`, after asking the expert what follows up to `calls` texts.

        It ends early at `delta` unresolved mass; no call is one step in context. `expert` must
        be bound to `text` (as `Continuations` is). Raises `ValueError` for an empty text.
        """
        return self.trace(expert, text, [calls], delta)[0]

    def trace(self, expert: Expert, text: str, budgets: Sequence[int], delta: float = 1e-3) -> list[Bridged]:
        """What `look_ahead` has found when each of the rising `budgets` of calls is spent, in one search."""
        if not text:
            raise ValueError("there is no text before the token to predict: give a context")
        search = _Search(self, text, delta)
        search.start(self.text_only(expert([[]])).double()[0])
        used, found = 0, []
        for budget in budgets:
            while used < budget and search.unresolved > delta:
                nodes = search.heaviest(min(max(FEWEST, min(used // FEWEST, MOST)), budget - used))
                p = self.text_only(expert([node.tokens for _, node in nodes])).double()
                for (mass, node), row in zip(nodes, p, strict=True):
                    search.follow(node, mass * row)
                used += len(nodes)
            found.append(search.result(used))
        return found

    def reference(self, expert: Expert, text: str, delta: float = 1e-4, calls: int = 4096) -> Bridged:
        """Look-ahead until the distribution is exact up to `delta` in total variation, or `calls` are spent."""
        return self.look_ahead(expert, text, calls, delta)

    def seams(self, before: bytes) -> Bool[Tensor, "v_e"]:
        """Behind which tokens' first character, following `before`, nothing is cut together with it."""
        text = self.base.characters(before)
        if not text or self.base.is_open(before):
            return torch.zeros_like(self.resolved)
        last = text[-2:]
        if last not in self._seams:
            safe = [bool(lead) and self.base.is_safe(last + lead, len(last)) for lead in self.leads]
            self._seams[last] = torch.tensor(safe)[self.lead]
        return self._seams[last]

    def first_tokens(self, stretch: bytes, data: Sequence[bytes]) -> list[tuple[int, bool]]:
        """First base token of each byte string behind `stretch`, and whether it re-merges with it."""
        (start,) = self.base.segment([stretch])
        whole = self.base.segment([stretch + text for text in data])
        alone = self.base.segment(data) if start else whole
        return [
            (ids[len(start)], False) if ids[: len(start)] == start else (own[0], True)
            for ids, own in zip(whole, alone, strict=True)
        ]


@dataclass(frozen=True)
class _Node:
    """Expert tokens behind the context, their bytes, and the first base token if the text ended here."""

    tokens: list[int]
    data: bytes
    stretch: bytes  # of the context, where the seam is not a safe cut
    first: int
    remerged: bool


@dataclass(frozen=True)
class _Rest:
    """The lighter tokens behind a text, heaviest first, and their masses."""

    node: _Node
    tokens: Int[Tensor, "k"]
    masses: Float64[Tensor, "k"]


class _Search:
    """Best-first search over what the expert may write behind one context."""

    def __init__(self, bridge: Bridge, text: str, delta: float) -> None:
        self.bridge, self.delta = bridge, delta
        self.stretch = bridge.base.last_stretch(text)
        self.q, self.aside = (np.zeros(len(bridge.base.table.pieces)) for _ in range(2))
        self.texts: list[tuple[float, int, _Node]] = []  # two heaps by negative mass; of equal ones the older first
        self.rests: list[tuple[float, int, _Rest]] = []
        self._age = itertools.count()

    @property
    def unresolved(self) -> float:
        """Mass of all that waits."""
        return -math.fsum(mass for heap in (self.texts, self.rests) for mass, *_ in heap)

    def start(self, p: Float64[Tensor, "v_e"]) -> None:
        """Expert tokens right behind the context."""
        safe = self._seams(self.stretch)
        settled = (safe & self.bridge.resolved).nonzero()[:, 0]
        self._add_tokens(settled, p[settled])
        self._leave(_Node([], b"", b"", 0, False), p * (safe & ~self.bridge.resolved))
        self._leave(_Node([], b"", self.stretch, 0, False), p * ~safe)
        self._grow_rests()

    def heaviest(self, count: int) -> list[tuple[float, _Node]]:
        """Take the heaviest unresolved texts with their masses, which `follow` then shares out."""
        taken = [heapq.heappop(self.texts) for _ in range(min(count, len(self.texts)))]
        return [(-mass, node) for mass, _, node in taken]

    def follow(self, node: _Node, p: Float64[Tensor, "v_e"]) -> None:
        """What the expert writes after a text, `p` adding up to its mass: settled behind a safe cut, else grown."""
        settled = self._seams(node.stretch + node.data)
        self._add(node, float((p * settled).sum()))
        self._leave(node, p * ~settled)
        self._grow_rests()

    def result(self, calls: int) -> Bridged:
        """What was found, unresolved texts cut as if they ended there; the search can go on."""
        unresolved, so_far = self.unresolved, (self.q.copy(), self.aside.copy())
        for mass, _, node in self.texts:
            self._add(node, -mass)
        for _, _, rest in self.rests:
            if rest.node.data:
                self._add(rest.node, float(rest.masses.sum()))
            else:
                self._add_tokens(rest.tokens, rest.masses)
        found = Bridged(torch.from_numpy(self.q), min(unresolved, 1.0), torch.from_numpy(self.aside), calls)
        self.q, self.aside = so_far
        return found

    def _seams(self, before: bytes) -> Bool[Tensor, "v_e"]:
        safe, end = self.bridge.seams(before), self.bridge.expert.end
        return safe if end is None else safe.index_fill(0, torch.tensor(end), True)

    def _add(self, node: _Node, mass: float) -> None:
        self.q[node.first] += mass
        if node.remerged:
            self.aside[node.first] += mass

    def _add_tokens(self, tokens: Int[Tensor, "k"], masses: Float64[Tensor, "k"]) -> None:
        np.add.at(self.q, self.bridge.first[tokens].numpy(), masses.numpy())

    def _leave(self, node: _Node, p: Float64[Tensor, "v_e"]) -> None:
        masses, tokens = p.sort(descending=True)
        count = int((masses > 0).sum())
        if count:
            rest = _Rest(node, tokens[:count], masses[:count])
            heapq.heappush(self.rests, (-float(rest.masses.sum()), next(self._age), rest))

    def _grow_rests(self) -> None:
        """Look at light tokens one by one where they weigh more than `delta`, or than any text that waits."""
        while self.rests and -self.rests[0][0] > min(self.delta, -self.texts[0][0] if self.texts else 0.0):
            mass, _, rest = heapq.heappop(self.rests)
            count = 1 + int((rest.masses.cumsum(0) < (1 - LEFT) * -mass).sum())
            self._grow(rest.node, rest.tokens[:count], rest.masses[:count])
            if count < len(rest.tokens):
                left = _Rest(rest.node, rest.tokens[count:], rest.masses[count:])
                heapq.heappush(self.rests, (-float(left.masses.sum()), next(self._age), left))

    def _grow(self, node: _Node, tokens: Int[Tensor, "k"], masses: Float64[Tensor, "k"]) -> None:
        base, chosen = self.bridge.base, tokens.tolist()
        data = [node.data + (self.bridge.expert.pieces[token] or b"") for token in chosen]
        start = len(base.characters(node.stretch))
        found = zip(chosen, data, self.bridge.first_tokens(node.stretch, data), masses.tolist(), strict=True)
        for token, text, (first, remerged), mass in found:
            child = _Node([*node.tokens, token], text, node.stretch, first, remerged)
            if base.has_safe_cut(base.characters(node.stretch + text), start):
                self._add(child, mass)
            else:
                heapq.heappush(self.texts, (-mass, next(self._age), child))


def _asked_once(p: Float[Tensor, "1 v_e"], rows: list[list[int]]) -> Float[Tensor, "1 v_e"]:
    return p


class Continuations:
    """A language model as the expert behind one context, which it reads once.

    Called with token rows that continue the context, it gives next-token probabilities
    [rows, tokens], float64. The rows are padded on the right behind a copy of the context's keys and values.
    """

    def __init__(self, model: LanguageModel, text: str) -> None:
        (ids,) = encode(model, [text])
        self.model, self.last, self.length = model, ids[-1], len(ids) - 1
        self.cache = None
        if self.length:
            with torch.inference_mode():
                read = torch.tensor([ids[:-1]], device=model.device)
                self.cache = model.network(read, use_cache=True).past_key_values

    @torch.inference_mode()
    def __call__(self, rows: list[list[int]]) -> Float64[Tensor, "n v_e"]:
        """Next-token probabilities after the context and each row."""
        padded, mask = pad([[self.last, *row] for row in rows], self.model.device)
        cache = copy.deepcopy(self.cache)
        if cache is not None:
            cache.batch_repeat_interleave(len(rows))
        mask = torch.cat([mask.new_ones(len(rows), self.length), mask], dim=1)
        logits = self.model.network(padded, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        ends = torch.tensor([len(row) for row in rows])
        return logits[torch.arange(len(rows)), ends].cpu().double().softmax(-1)
