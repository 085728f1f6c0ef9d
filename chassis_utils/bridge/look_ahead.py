"""Look-ahead: asking the expert what follows until the base's next-token distribution is exact.

    q*[v] = P(v comes first behind encode(x) in encode(x + Y)),  Y the expert's text

Mass behind a safe cut is resolved; the heaviest unresolved text is taken, the expert asked for its next distribution
behind it, all that a safe cut then resolves settled, and so on, several texts sharing one batch on a cached context.
Where encode(x + Y) does not begin with encode(x) (re-merged mass, reported), Y is cut on its own, because the base
has already read encode(x). TV(q, exact) <= unresolved mass. Cost: one short segmentation for each heavy token of
every text that the expert continues.
"""

import copy
import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from chassis_utils.bridge.bridge import Bridge
from chassis_utils.lm.forward import at_ends, encode, pad
from chassis_utils.lm.model import LanguageModel

FEWEST, MOST = 4, 64  # texts that the expert continues at once: few while the next are still to be found
DEFERRED = 0.01  # share of a text's mass whose many light tokens wait together until nothing heavier does

# token rows that continue the context -> next-token probabilities [rows, expert tokens]
NextToken = Callable[[list[list[int]]], Float[Tensor, "n v_e"]]


@dataclass(frozen=True)
class Bridged:
    """A base next-token distribution and how far it is from exact; sums to 1."""

    q: Float64[Tensor, "v"]
    unresolved: float  # TV(q, exact) is at most this
    remerged: Float64[Tensor, "v"]  # the part of q owed to text that re-merges with the context
    calls: int  # texts that the expert was asked to continue

    @property
    def remerged_mass(self) -> float:
        """Mass of the text before which the base would have cut the context otherwise."""
        return float(self.remerged.sum())


def look_ahead(bridge: Bridge, expert: NextToken, text: str, calls: int = 16, delta: float = 1e-3) -> Bridged:
    """The base's distribution behind `text`, after asking the expert what follows up to `calls` texts.

    It ends early at `delta` unresolved mass; no call is one step in context. `expert` must
    be bound to `text` (as `Continuations` is). Raises `ValueError` for an empty text.
    """
    return trace(bridge, expert, text, [calls], delta)[0]


def trace(bridge: Bridge, expert: NextToken, text: str, budgets: Sequence[int], delta: float = 1e-3) -> list[Bridged]:
    """What `look_ahead` has found when each of the rising `budgets` of calls is spent, in one search."""
    if not text:
        raise ValueError("there is no text before the token to predict: give a context")
    if list(budgets) != sorted(budgets) or min(budgets, default=0) < 0:
        raise ValueError(f"budgets {list(budgets)} of one search do not rise from 0 or more: sort them")
    if not 0 <= delta <= 1:
        raise ValueError(f"delta {delta} is no mass: give 0 to 1")
    search = _Search(bridge, text, delta)
    search.start(bridge.text_only(expert([[]])).double()[0])
    used, results = 0, []
    for budget in budgets:
        while used < budget and search.unresolved > delta:
            nodes = search.heaviest(min(max(FEWEST, min(used // FEWEST, MOST)), budget - used))
            p = bridge.text_only(expert([node.tokens for _, node in nodes])).double()
            for (mass, node), row in zip(nodes, p, strict=True):
                search.follow(node, mass * row)
            used += len(nodes)
        results.append(search.result(used))
    return results


@dataclass(frozen=True)
class _Node:
    """Expert tokens behind the context, their bytes, and the first base token if the text ended here."""

    tokens: list[int]
    data: bytes
    context: bytes  # of the context, where the boundary is no safe cut
    first: int
    remerged: bool


@dataclass(frozen=True)
class _Light:
    """The lighter tokens behind a text, heaviest first, and their masses."""

    node: _Node
    tokens: Int[Tensor, "k"]
    masses: Float64[Tensor, "k"]


@dataclass(frozen=True)
class _Texts:
    """A text with one token more each, heaviest first: arrays, because thousands wait for each that is taken."""

    node: _Node
    tokens: Int[np.ndarray, "k"]
    masses: Float64[np.ndarray, "k"]
    first: Int[np.ndarray, "k"]  # base tokens if the texts ended here
    remerged: Bool[np.ndarray, "k"]

    def __getitem__(self, part: slice | Bool[np.ndarray, "k"]) -> "_Texts":
        """Some of them, in the same order."""
        return _Texts(self.node, self.tokens[part], self.masses[part], self.first[part], self.remerged[part])


class _Search:
    """Best-first search over what the expert may write behind one context."""

    def __init__(self, bridge: Bridge, text: str, delta: float) -> None:
        self.bridge, self.delta = bridge, delta
        self.context = bridge.base.unsettled_end(text)
        self.q, self.remerged = (np.zeros(len(bridge.base.table.pieces)) for _ in range(2))
        # two heaps, by the negative mass of the heaviest text and of all light tokens; of equal ones the older first
        self.texts: list[tuple[float, int, _Texts]] = []
        self.light: list[tuple[float, int, _Light]] = []
        self._age = itertools.count()

    @property
    def unresolved(self) -> float:
        """Mass of all that waits."""
        return math.fsum(waiting.masses.sum() for heap in (self.texts, self.light) for *_, waiting in heap)

    def start(self, p: Float64[Tensor, "v_e"]) -> None:
        """Expert tokens right behind the context."""
        safe = self._boundaries(self.context)
        settled = (safe & self.bridge.resolved).nonzero()[:, 0]
        self._add_tokens(settled, p[settled])
        self._defer(_Node([], b"", b"", 0, False), p * (safe & ~self.bridge.resolved))
        self._defer(_Node([], b"", self.context, 0, False), p * ~safe)
        self._expand_light()

    def heaviest(self, count: int) -> list[tuple[float, _Node]]:
        """Take the heaviest unresolved texts with their masses, which `follow` then shares out."""
        taken: list[tuple[float, _Node]] = []
        while self.texts and len(taken) < count:
            mass, age, texts = self.texts[0]
            taken.append((-mass, self._first_of(texts)))
            if len(texts.tokens) > 1:
                heapq.heapreplace(self.texts, (-float(texts.masses[1]), age, texts[1:]))
            else:
                heapq.heappop(self.texts)
        return taken

    def follow(self, node: _Node, p: Float64[Tensor, "v_e"]) -> None:
        """What the expert writes after a text, `p` adding up to its mass: settled behind a safe cut, else grown."""
        settled = self._boundaries(node.context + node.data)
        self._add(node, float((p * settled).sum()))
        self._defer(node, p * ~settled)
        self._expand_light()

    def result(self, calls: int) -> Bridged:
        """What was found, unresolved texts cut as if they ended there; the search can go on."""
        unresolved, so_far = self.unresolved, (self.q.copy(), self.remerged.copy())
        for *_, texts in self.texts:
            self._add_texts(texts)
        for _, _, waiting in self.light:
            if waiting.node.data:
                self._add(waiting.node, float(waiting.masses.sum()))
            else:
                self._add_tokens(waiting.tokens, waiting.masses)
        bridged = Bridged(torch.from_numpy(self.q), min(unresolved, 1.0), torch.from_numpy(self.remerged), calls)
        self.q, self.remerged = so_far
        return bridged

    def _boundaries(self, before: bytes) -> Bool[Tensor, "v_e"]:
        ends = torch.tensor(self.bridge.expert.ends, dtype=torch.int64)
        return self.bridge.safe_boundaries(before).index_fill(0, ends, True)

    def _add(self, node: _Node, mass: float) -> None:
        self.q[node.first] += mass
        if node.remerged:
            self.remerged[node.first] += mass

    def _add_texts(self, texts: _Texts) -> None:
        np.add.at(self.q, texts.first, texts.masses)
        np.add.at(self.remerged, texts.first[texts.remerged], texts.masses[texts.remerged])

    def _add_tokens(self, tokens: Int[Tensor, "k"], masses: Float64[Tensor, "k"]) -> None:
        np.add.at(self.q, self.bridge.first[tokens].numpy(), masses.numpy())

    def _defer(self, node: _Node, p: Float64[Tensor, "v_e"]) -> None:
        masses, tokens = p.sort(descending=True)
        count = int((masses > 0).sum())
        if count:
            waiting = _Light(node, tokens[:count], masses[:count])
            heapq.heappush(self.light, (-float(waiting.masses.sum()), next(self._age), waiting))

    def _expand_light(self) -> None:
        """Look at light tokens one by one where they weigh more than `delta`, or than any text that waits."""
        while self.light and -self.light[0][0] > min(self.delta, -self.texts[0][0] if self.texts else 0.0):
            mass, _, waiting = heapq.heappop(self.light)
            count = 1 + int((waiting.masses.cumsum(0) < (1 - DEFERRED) * -mass).sum())
            self._expand(waiting.node, waiting.tokens[:count], waiting.masses[:count])
            if count < len(waiting.tokens):
                left = _Light(waiting.node, waiting.tokens[count:], waiting.masses[count:])
                heapq.heappush(self.light, (-float(left.masses.sum()), next(self._age), left))

    def _expand(self, node: _Node, tokens: Int[Tensor, "k"], masses: Float64[Tensor, "k"]) -> None:
        data = [node.data + (self.bridge.expert.pieces[token] or b"") for token in tokens.tolist()]
        if node.context or node.data:
            first, remerged = self.bridge.first_tokens(node.context, data)
        else:
            first, remerged = self.bridge.first[tokens].numpy(), np.zeros(len(tokens), dtype=bool)
        texts = _Texts(node, tokens.numpy(), masses.numpy(), first, remerged)
        settled = self._settled(node, tokens, data)
        self._add_texts(texts[settled])
        if not settled.all():
            left = texts[~settled]
            heapq.heappush(self.texts, (-float(left.masses[0]), next(self._age), left))

    def _settled(self, node: _Node, tokens: Int[Tensor, "k"], data: list[bytes]) -> Bool[np.ndarray, "k"]:
        """Behind which tokens a safe cut lies where none did before."""
        base, before = self.bridge.base, node.context + node.data
        if not base.is_open(before):
            return self.bridge.safe_inside(before)[tokens].numpy()
        start = len(base.characters(node.context))
        return np.array([base.has_safe_cut(base.characters(node.context + text), start) for text in data])

    def _first_of(self, texts: _Texts) -> _Node:
        node, token = texts.node, int(texts.tokens[0])
        data = node.data + (self.bridge.expert.pieces[token] or b"")
        return _Node([*node.tokens, token], data, node.context, int(texts.first[0]), bool(texts.remerged[0]))


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
                self.cache = model.body(read, use_cache=True).past_key_values

    @torch.inference_mode()
    def __call__(self, rows: list[list[int]]) -> Float64[Tensor, "n v_e"]:
        """Next-token probabilities after the context and each row."""
        padded, mask = pad([[self.last, *row] for row in rows], self.model.device)
        cache = copy.deepcopy(self.cache)
        if cache is not None:
            cache.batch_repeat_interleave(len(rows))
        whole = torch.cat([mask.new_ones(len(rows), self.length), mask], dim=1)
        states = self.model.body(padded, attention_mask=whole, past_key_values=cache, use_cache=True).last_hidden_state
        return self.model.head(at_ends(states, mask).cpu()).double().softmax(-1)
