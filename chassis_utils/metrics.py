"""How far one next-token distribution is from another: KL in nats, and the figures beside it.

KL is always KL(expert || adapted), in nats per predicted token, computed from float64
log-probabilities; every mean carries its standard error, every KL the KL of the untouched
base against the same expert, and the share of that gap which was closed.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def kl_divergence(expert: Shaped[Tensor, "n vocab"], other: Shaped[Tensor, "n vocab"]) -> Float[Tensor, "n"]:
    """KL(expert || other) of each row of logits, nats, float64; constants added to a row change nothing."""
    log_p, log_q = expert.double().log_softmax(-1), other.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0.0)


def top_overlap(expert: Shaped[Tensor, "n vocab"], other: Shaped[Tensor, "n vocab"], k: int) -> Float[Tensor, "n"]:
    """Share of the expert's k most likely tokens that are among the other's k, per row; k = 1 is agreement."""
    first, second = expert.topk(k).indices, other.topk(k).indices
    return (first.unsqueeze(-1) == second.unsqueeze(-2)).any(-1).double().mean(-1)


def cosine(expert: Shaped[Tensor, "n vocab"], other: Shaped[Tensor, "n vocab"]) -> Float[Tensor, "n"]:
    """Cosine between the rows of logits."""
    return torch.nn.functional.cosine_similarity(expert.double(), other.double(), dim=-1)


def l2(expert: Shaped[Tensor, "n vocab"], other: Shaped[Tensor, "n vocab"]) -> Float[Tensor, "n"]:
    """Euclidean distance between the rows of logits."""
    return (expert.double() - other.double()).norm(dim=-1)


def standard_error(values: Float[Tensor, "n"]) -> float:
    """Standard error of the mean; NaN for a single value, which has none."""
    return float(values.std(correction=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


@dataclass(frozen=True)
class Reference:
    """An expert and the untouched base on one set of prompts: what every adapter is measured against."""

    expert: Shaped[Tensor, "n vocab"]
    base: Shaped[Tensor, "n vocab"]

    @cached_property
    def base_kl(self) -> float:
        """Mean KL(expert || base), nats: the scale of every other KL."""
        return float(kl_divergence(self.expert, self.base).mean())

    def row(self, adapted: Shaped[Tensor, "n vocab"], **keys: object) -> dict[str, object]:
        """One evaluation row: `keys`, then the common figures of `adapted` logits."""
        kl = kl_divergence(self.expert, adapted)
        return keys | {
            "kl": float(kl.mean()),
            "kl_se": standard_error(kl),
            "base_kl": self.base_kl,
            "gap_closed": 1 - float(kl.mean()) / self.base_kl if self.base_kl > 0 else float("nan"),
            "top1": float(top_overlap(self.expert, adapted, 1).mean()),
            "top5_overlap": float(top_overlap(self.expert, adapted, 5).mean()),
            "n_prompts": len(kl),
        }
