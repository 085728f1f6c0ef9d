"""The synthetic expert: the base with its last state edited by a low-rank map, h_e = h + s (h U) V^T, and its head.

The expert of the CHASSIS study, with its strength s set by effect: the KL between expert and base on given states. A
linear map of the state reproduces it exactly, which is too easy. Bent, by c tanh(z / c) of each z = h u, it is one that
no linear map reproduces. Cost: that of the base.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64, Shaped
from scipy.optimize import brentq
from torch import Tensor

from chassis_utils.lm.model import Head, LanguageModel
from chassis_utils.lm.states import Positions, last_states
from chassis_utils.metrics import kl_divergence

STRONGEST = 2.0**30  # where the search for a strength gives up: the softmax is one token long before
SPREAD = 0.01  # standard deviation of the entries of U and V, as in the CHASSIS study


@dataclass(frozen=True)
class SyntheticExpert:
    """h_e = h + strength f(h U) V^T, in float64; f is the identity, or bends each coordinate beyond its own scale."""

    u: Float64[Tensor, "d rank"]
    v: Float64[Tensor, "d rank"]
    strength: float = 1.0
    scale: Float64[Tensor, "rank"] | None = None  # at which a coordinate is bent

    @classmethod
    def draw(cls, width: int, rank: int, seed: int = 0) -> "SyntheticExpert":
        """Factors drawn from N(0, 0.01^2); the seed alone decides them. `ValueError` for a rank beyond the width."""
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"{seed!r} is no seed: give a whole number from 0 to 2**63 - 1")
        if not isinstance(rank, int) or not 1 <= rank <= width:
            raise ValueError(f"expert rank {rank} does not fit states of width {width}: use 1 to {width}")
        generator = torch.Generator().manual_seed(seed)
        u, v = torch.randn(2, width, rank, generator=generator, dtype=torch.float64) * SPREAD
        return cls(u, v)

    def edit(self, h: Shaped[Tensor, "n d"]) -> Float64[Tensor, "n d"]:
        """The edit h_e - h."""
        z = h.double() @ self.u
        return self.strength * (z if self.scale is None else self.scale * (z / self.scale).tanh()) @ self.v.T

    def states(self, h: Shaped[Tensor, "n d"]) -> Float64[Tensor, "n d"]:
        """The expert's states h_e."""
        return h.double() + self.edit(h)

    def bent(self, h: Shaped[Tensor, "n d"]) -> "SyntheticExpert":
        """The same expert with each coordinate bent at its root mean square on `h`."""
        return replace(self, scale=(h.double() @ self.u).square().mean(0).sqrt())

    def with_effect(self, kl: float, head: Head, h: Shaped[Tensor, "n d"]) -> "SyntheticExpert":
        """The same expert with the strength at which KL(expert || base) is `kl` nats on `h`.

        The strength is bracketed by doubling and found by Brent's method to 1 part in ten thousand.
        Raises `ValueError` for an effect that no strength has, and for no states.
        """
        if not kl >= 0 or not len(h):
            raise ValueError(f"an effect of {kl} nats on {len(h)} states is none: ask for 0 or more on at least one")
        base, change = head.product(h), replace(head, bias=None).product(replace(self, strength=1.0).edit(h))

        def effect(strength: float) -> float:  # the head's product is linear in the edit: two of them do for all
            return float(kl_divergence(head.finish(base + strength * change), head.finish(base)).mean())

        low, high = 0.0, 1.0
        while effect(high) < kl:
            low, high = high, 2 * high
            if high > STRONGEST:
                raise ValueError(f"no strength of this expert reaches {kl} nats: ask for less, or raise its rank")
        strength = brentq(lambda tried: effect(tried) - kl, low, high, rtol=1e-4, xtol=1e-9)
        return replace(self, strength=strength)


@dataclass(frozen=True)
class SyntheticModel:
    """A synthetic expert on the base that it edits, as an `Expert`."""

    base: LanguageModel
    edit: SyntheticExpert

    def logits(self, texts: Sequence[str], positions: Positions = None) -> Float[Tensor, "n vocab"]:
        """The base's head on the edited states; `ValueError` as of `states.collect`."""
        return self.base.head(self.edit.states(last_states(self.base, texts, positions)))


def draw_experts(
    head: Head, h: Shaped[Tensor, "n d"], rank: int, edits: Sequence[float], seeds: Sequence[int]
) -> dict[tuple[float, int], SyntheticExpert]:
    """One expert for each effect (nats on states `h`) and seed, by (effect, seed)."""
    drawn = {seed: SyntheticExpert.draw(h.shape[1], rank, seed) for seed in seeds}
    return {(edit, seed): drawn[seed].with_effect(edit, head, h) for edit in edits for seed in seeds}
