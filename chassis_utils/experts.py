"""Experts for the base to follow: their next-token logits, over the base's vocabulary.

`SyntheticExpert` edits the base's last state by a low-rank map, h_e = h + s (h U) V^T, and
shares its head: the expert of both earlier studies, with its strength s set by effect. The
others read prompts (`Expert`): that edit on a base, a bias on its logits, a sibling
checkpoint, the text bridge, and the byte-exact bridge from another tokenizer. Cost: one pass over the
prompts, kept by `states.collect`; the text bridge besides generates and the other looks ahead, which is not kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64, Shaped
from scipy.optimize import brentq
from torch import Tensor
from tqdm import tqdm

from chassis_utils.bridge import Bridge, Continuations
from chassis_utils.metrics import kl_divergence
from chassis_utils.models import Head, LanguageModel
from chassis_utils.states import batches, collect, encode, reading_limit

STRONGEST = 2.0**30  # where the search for a strength gives up: the softmax is one token long before
SPREAD = 0.01  # standard deviation of the entries of U and V, as in the first study
FLOOR = 1e-3  # the base's share of a bridged distribution, so that no token is impossible
BOOST = 4.0  # added by the study's logit-bias expert, for each of these strings
BOOSTED = (
    *"0123456789+-*/=^",
    *("Therefore", "Thus", "Hence", "QED", "The answer is", "Result:", "Proof", "Let", "Assume", "implies"),
)


@runtime_checkable
class Expert(Protocol):
    """What an adapter is fitted to."""

    def logits(self, prompts: Sequence[str]) -> Float[Tensor, "n vocab"]:
        """Of the token after each prompt, over the base's vocabulary."""


@dataclass(frozen=True)
class SyntheticExpert:
    """h_e = h + strength (h U) V^T, in float64."""

    u: Float64[Tensor, "d rank"]
    v: Float64[Tensor, "d rank"]
    strength: float = 1.0

    @classmethod
    def draw(cls, width: int, rank: int, seed: int = 0) -> "SyntheticExpert":
        """Factors drawn from N(0, 0.01^2); the seed alone decides them."""
        if not 1 <= rank <= width:
            raise ValueError(f"expert rank {rank} does not fit states of width {width}: use 1 to {width}")
        generator = torch.Generator().manual_seed(seed)
        u, v = torch.randn(2, width, rank, generator=generator, dtype=torch.float64) * SPREAD
        return cls(u, v)

    def edit(self, h: Shaped[Tensor, "n d"]) -> Float64[Tensor, "n d"]:
        """The edit h_e - h."""
        return self.strength * (h.double() @ self.u) @ self.v.T

    def states(self, h: Shaped[Tensor, "n d"]) -> Float64[Tensor, "n d"]:
        """The expert's states h_e."""
        return h.double() + self.edit(h)

    def with_effect(self, kl: float, head: Head, h: Shaped[Tensor, "n d"]) -> "SyntheticExpert":
        """The same expert with the strength at which KL(expert || base) is `kl` nats on `h`.

        The strength is bracketed by doubling and found by Brent's method to 1 part in ten thousand.
        Raises `ValueError` for an effect that no strength has.
        """
        base = head(h)
        low, high = 0.0, 1.0
        while self._effect(high, head, h, base) < kl:
            low, high = high, 2 * high
            if high > STRONGEST:
                raise ValueError(f"no strength of this expert reaches {kl} nats: ask for less, or raise its rank")
        strength = brentq(lambda tried: self._effect(tried, head, h, base) - kl, low, high, rtol=1e-4, xtol=1e-9)
        return replace(self, strength=strength)

    def _effect(self, strength: float, head: Head, h: Tensor, base: Tensor) -> float:
        expert = head(replace(self, strength=strength).states(h))
        return float(kl_divergence(expert, base).mean())


@dataclass(frozen=True)
class Edited:
    """A synthetic expert on the base that it edits, as an `Expert`."""

    base: LanguageModel
    edit: SyntheticExpert

    def logits(self, prompts: Sequence[str]) -> Float[Tensor, "n vocab"]:
        """The base's head on the edited states; `ValueError` as of `states.collect`."""
        return self.base.head(self.edit.states(collect(self.base, prompts)[-1]))


@dataclass(frozen=True)
class LogitBias:
    """The base's logits and a constant."""

    base: LanguageModel
    bias: Float64[Tensor, "vocab"]

    @classmethod
    def of_strings(cls, base: LanguageModel, strings: Sequence[str] = BOOSTED, boost: float = BOOST) -> "LogitBias":
        """`boost` on every token of each string as it is tokenised alone, once for each time that it occurs.

        As in the study, flaw included: SentencePiece puts the mark of a space before a string,
        and where that is a token of its own it collects the boost of every such string.
        """
        encodings = base.tokenizer.encode_batch_fast(list(strings), add_special_tokens=False)
        bias = torch.zeros(len(base.head.weight), dtype=torch.float64)
        for token in (token for encoding in encodings for token in encoding.ids):
            bias[token] += boost
        return cls(base, bias)

    def logits(self, prompts: Sequence[str]) -> Float[Tensor, "n vocab"]:
        """In the dtype of the base's logits; `ValueError` as of `states.collect`."""
        logits = self.base.head(collect(self.base, prompts)[-1])
        return logits + self.bias.to(logits.dtype)


@dataclass(frozen=True)
class Sibling:
    """Another checkpoint with the base's tokenizer; `ValueError` where the tokens differ."""

    base: LanguageModel
    model: LanguageModel

    def __post_init__(self) -> None:
        first, second = (model.tokenizer.get_vocab() for model in (self.base, self.model))
        sizes = [len(model.head.weight) for model in (self.base, self.model)]
        if first != second or sizes[0] != sizes[1]:
            differing = len(first.items() ^ second.items())
            raise ValueError(
                f"{self.model.name!r} is no sibling of {self.base.name!r}: {differing} entries of their vocabularies "
                f"differ and they give {sizes[1]} and {sizes[0]} logits; take a checkpoint of the same tokenizer"
            )

    def states(self, prompts: Sequence[str]) -> Float[Tensor, "n d"]:
        """The sibling's own last states; `ValueError` as of `states.collect`."""
        return collect(self.model, prompts)[-1]

    def logits(self, prompts: Sequence[str]) -> Float[Tensor, "n vocab"]:
        """The sibling's own logits; `ValueError` as of `states.collect`."""
        return self.model.head(self.states(prompts))


@dataclass(frozen=True)
class Rescored:
    """The text bridge of the study: the expert writes on, the base reads prompt, space and continuation.

    Its logits are those of the base after that text, so they belong to a later position than
    the prompt's last token. The expert's tokenizer may be any.
    """

    base: LanguageModel
    expert: LanguageModel
    tokens: int = 32  # of the continuation, the expert's own

    def logits(self, prompts: Sequence[str]) -> Float[Tensor, "n vocab"]:
        """The base's logits after prompt and continuation; `ValueError` as of `states.collect`."""
        written = continuations(self.expert, prompts, self.tokens)
        texts = [f"{prompt} {continuation}" for prompt, continuation in zip(prompts, written, strict=True)]
        return self.base.head(collect(self.base, texts)[-1])


@dataclass(frozen=True)
class BridgedExpert:
    """A model with another tokenizer, its next-token distribution carried over by the byte-exact bridge.

    `calls` texts are looked ahead at each prompt; none is one step. What the bridge gives no mass keeps
    the base's own order: the logits are those of (1 - `FLOOR`) q + `FLOOR` p_base.
    """

    base: LanguageModel
    model: LanguageModel
    bridge: Bridge
    calls: int = 0

    def logits(self, prompts: Sequence[str]) -> Float[Tensor, "n vocab"]:
        """Logarithms of the bridged probabilities above the floor; `ValueError` as of `states.collect`."""
        if self.calls:
            bar = tqdm(prompts, desc=f"bridge from {self.model.name}", disable=None, leave=False)
            q = torch.stack([self._ahead(prompt) for prompt in bar])
        else:
            q = self.bridge.one_step(self.model.head(collect(self.model, prompts)[-1]).softmax(-1))[0].double()
        own = self.base.head(collect(self.base, prompts)[-1]).softmax(-1, dtype=torch.float64)
        return ((1 - FLOOR) * q + FLOOR * own).log().float()

    def _ahead(self, prompt: str) -> Float64[Tensor, "vocab"]:
        return self.bridge.look_ahead(Continuations(self.model, prompt), prompt, self.calls).q


@torch.inference_mode()
def continuations(model: LanguageModel, prompts: Sequence[str], tokens: int) -> list[str]:
    """Greedy continuation of each prompt, without it and without what follows an end-of-text token.

    Prompts are padded on the left, so that every row continues at its own end. Raises
    `ValueError` for a prompt without tokens, or one that with `tokens` more exceeds what the model reads.
    """
    ids = encode(model, prompts)
    _check_room(model, prompts, ids, tokens)
    ends = model.network.generation_config.eos_token_id  # a number, several, or None
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    written = [""] * len(ids)
    for batch in batches(ids):
        longest = max(len(ids[k]) for k in batch)
        padded = torch.tensor([[0] * (longest - len(ids[k])) + ids[k] for k in batch], device=model.device)
        mask = torch.tensor([[0] * (longest - len(ids[k])) + [1] * len(ids[k]) for k in batch], device=model.device)
        grown = model.network.generate(
            padded, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=min(ends, default=0)
        )
        for k, row in zip(batch, grown[:, longest:].tolist(), strict=True):
            written[k] = model.tokenizer.decode(list(takewhile(lambda token: token not in ends, row)))
    return written


def _check_room(model: LanguageModel, prompts: Sequence[str], ids: Sequence[list[int]], tokens: int) -> None:
    limit = reading_limit(model)
    for prompt, row in zip(prompts, ids, strict=True):
        if len(row) + tokens > limit:
            raise ValueError(
                f"prompt {prompt[:40]!r} has {len(row)} tokens, with {tokens} more they exceed the {limit} that "
                f"{model.name} reads: shorten it, or continue it by less"
            )


def cast(
    head: Head, h: Shaped[Tensor, "n d"], rank: int, edits: Sequence[float], seeds: Sequence[int]
) -> dict[tuple[float, int], SyntheticExpert]:
    """One expert for each effect (nats on states `h`) and seed, by (effect, seed)."""
    drawn = {seed: SyntheticExpert.draw(h.shape[1], rank, seed) for seed in seeds}
    return {(edit, seed): drawn[seed].with_effect(edit, head, h) for edit in edits for seed in seeds}


def scaled_rank(width: int, rank: int = 64, original_width: int = 2048) -> int:
    """A rank of the first study (of width 2048) as the same fraction of another width, at least 1."""
    return max(1, round(rank * width / original_width))


def scaled_layer(depth: int, layer: int, original_depth: int = 22) -> int:
    """A layer of the first study (of 22) at the same fraction of another depth."""
    return round(layer * depth / original_depth)
