"""The byte-exact bridge: an expert's next-token distribution as one over another vocabulary, in one step.

q[v] = sum of p[e] over the expert tokens e whose bytes the base cuts into v first.

What follows e may still change that cut. A cut between two characters is safe if no base piece contains the pair;
mass behind a safe cut is resolved, and TV(q, exact) <= unresolved mass (`look_ahead` resolves it). Cost: the table
once, by one segmentation of the expert's vocabulary; one `index_add_` a batch.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chassis_utils.bridge.segmenter import Segmenter
from chassis_utils.bridge.token_bytes import ByteTable
from chassis_utils.lm.model import LanguageModel


@dataclass(frozen=True, eq=False)
class Bridge:
    """Two vocabularies and the table of one step between them.

    >>> from chassis_utils import Bridge, load
    >>> bridge = Bridge.between(load("models/port-llama"), load("models/expert-phi"))
    >>> uniform = bridge.is_text.float()[None] / bridge.is_text.sum()
    >>> q, unresolved = bridge.one_step(uniform)
    >>> round(float(q.sum()), 3)
    1.0
    """

    base: Segmenter
    expert: ByteTable
    first: Int[Tensor, "v_e"]  # first base token of each expert token's bytes
    resolved: Bool[Tensor, "v_e"]  # whether nothing that follows can change it
    is_text: Bool[Tensor, "v_e"]  # whether it is text that the base can write, or the end of it
    unwritable: Bool[Tensor, "v_e"]  # whether it is text that the base cannot write
    beginning: Int[Tensor, "v_e"]  # number of its first two characters in `beginnings`
    beginnings: tuple[str, ...]
    _boundaries: dict[str, Bool[Tensor, "v_e"]] = field(default_factory=dict)
    _inside: dict[str, Bool[Tensor, "v_e"]] = field(default_factory=dict)

    @classmethod
    def of(cls, base: Segmenter, expert: ByteTable) -> "Bridge":
        """The bridge between two vocabularies; `ValueError` where only the expert ends its texts."""
        if expert.end is not None and base.table.end is None:
            raise ValueError("the expert has an end-of-text token and the base none: use a base that has one")
        pieces = [piece or b"" for piece in expert.pieces]
        unwritable = [not base.table.missing.isdisjoint(piece) for piece in pieces]
        first = [ids[0] if ids else 0 for ids in base.segment(pieces)]
        texts = [base.characters(piece) for piece in pieces]
        resolved = [base.has_safe_cut(text) for text in texts]
        is_text = [bool(piece) and not lost for piece, lost in zip(pieces, unwritable, strict=True)]
        if base.table.end is not None:
            for token in expert.ends:
                first[token], resolved[token], is_text[token] = base.table.end, True, True
        beginnings = dict.fromkeys(text[:2] for text in texts)  # "" where no character is certain
        number = {characters: k for k, characters in enumerate(beginnings)}
        beginning = torch.tensor([number[text[:2]] for text in texts])
        tables = torch.tensor(first), torch.tensor(resolved), torch.tensor(is_text), torch.tensor(unwritable), beginning
        return cls(base, expert, *tables, tuple(beginnings))

    @classmethod
    def between(cls, base: LanguageModel, expert: LanguageModel) -> "Bridge":
        """The bridge between two models; `ValueError` for tokenizers whose bytes or segments are not known."""
        return cls.of(
            Segmenter.of(base.tokenizer, len(base.head.weight), base.end_tokens),
            ByteTable.of(expert.tokenizer, len(expert.head.weight), expert.end_tokens),
        )

    def text_only(self, p: Float[Tensor, "n v_e"]) -> Float[Tensor, "n v_e"]:
        """Probabilities without padding ids and tokens that are no text of the base, as if dropped before the softmax.

        Raises `ValueError` for another width than the expert's and rows that are no distribution.
        """
        if p.ndim != 2 or not len(p) or not p.is_floating_point():
            raise ValueError(
                f"a tensor {list(p.shape)} of {p.dtype} holds no rows of probabilities: pass one for each text"
            )
        if p.shape[1] != len(self.first):
            raise ValueError(
                f"{p.shape[1]} probabilities, but the expert has {len(self.first)} tokens: pass all of them"
            )
        total = p @ self.is_text.to(p.dtype)
        if not (torch.isfinite(total) & (total > 0)).all() or p.min() < 0:
            raise ValueError("a row of the expert is no distribution over its text: pass probabilities, not logits")
        return p.masked_fill(~self.is_text, 0.0).div_(total[:, None])

    def lost(self, p: Float[Tensor, "n v_e"]) -> Float[Tensor, "n"]:
        """Probability of text that the base cannot write: bytes without a piece, in which some vocabularies are poor.

        It is dropped as padding is, and the only mass of the expert's text that a bridge does not carry over.
        """
        return p @ self.unwritable.to(p.dtype)

    def one_step(self, p: Float[Tensor, "n v_e"]) -> tuple[Float[Tensor, "n v"], Float[Tensor, "n"]]:
        """Base distributions [n, v] from the expert's [n, v_e], whatever the context, and unresolved mass [n].

        The mass bounds the error as in `look_ahead`; for a byte-level base only behind a safe boundary.
        """
        p = self.text_only(p)
        q = torch.zeros(len(p), len(self.base.table.pieces), dtype=p.dtype)
        return q.index_add_(1, self.first, p), p @ (~self.resolved).to(p.dtype)

    def safe_boundaries(self, before: bytes) -> Bool[Tensor, "v_e"]:
        """Before which tokens' first character, following the text `before`, there is a safe cut."""
        text = self.base.characters(before)
        if not text or self.base.is_open(before):
            return torch.zeros_like(self.resolved)
        last = text[-2:]
        if last not in self._boundaries:
            safe = [bool(begin) and self.base.is_safe(last + begin[:1], len(last)) for begin in self.beginnings]
            self._boundaries[last] = torch.tensor(safe)[self.beginning]
        return self._boundaries[last]

    def safe_inside(self, before: bytes) -> Bool[Tensor, "v_e"]:
        """Which tokens have a safe cut between two of their characters, following the text `before`.

        It is no half character at its end. Of the text before a cut two characters decide, so that only the cut
        behind a token's first character depends on `before` at all, and that on its last character.
        """
        last = self.base.characters(before)[-1:]
        if last not in self._inside:
            safe = [len(begin) == 2 and self.base.is_safe(last + begin, len(last) + 1) for begin in self.beginnings]
            self._inside[last] = self.resolved | torch.tensor(safe)[self.beginning]
        return self._inside[last]

    def first_tokens(self, context: bytes, data: list[bytes]) -> tuple[Int[np.ndarray, "k"], Bool[np.ndarray, "k"]]:
        """First base token of each byte string behind the end of a context, and whether it re-merges with it."""
        (start,) = self.base.segment([context])
        whole = self.base.segment([context + text for text in data])
        remerged = [ids[: len(start)] != start for ids in whole]
        alone = iter(self.base.segment([text for text, changed in zip(data, remerged, strict=True) if changed]))
        first = [next(alone)[0] if changed else ids[len(start)] for ids, changed in zip(whole, remerged, strict=True)]
        return np.array(first), np.array(remerged)
