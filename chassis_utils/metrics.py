"""How far one next-token distribution is from another: KL in nats, and the figures beside it.

KL is always KL(expert || adapted), in nats per predicted token, computed from float64
log-probabilities; every mean carries its standard error, every KL the KL of the untouched
base against the same expert, and the share of that gap which was closed.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64, Int, Shaped
from scipy.stats import bootstrap, norm
from scipy.stats import t as student
from torch import Tensor

CACHED = 2**17  # logits whose float64 copies stay in a processor's cache
DRAWS = 2000  # of a bootstrap
ONE_ERROR = float(norm.cdf(1))  # how often a normal mean stays below the truth by less than its standard error
FIGURES = ("kl", "kl_se", "base_kl", "gap_closed", "top1", "top5_overlap", "n_prompts")  # of an evaluation row


def kl_divergence(expert: Shaped[Tensor, "n vocab"], other: Shaped[Tensor, "n vocab"]) -> Float64[Tensor, "n"]:
    """KL(expert || other) of each row of logits, nats; constants added to a row change nothing."""
    return _kl(_known(expert), other)


Known = tuple[Tensor, Tensor]  # of some rows: probabilities and their logarithms


def _known(logits: Shaped[Tensor, "n vocab"]) -> Iterator[Known]:
    """What a KL needs of the expert, a few rows at a time: float64 copies of all would spend their time on memory."""
    for rows in logits.split(max(1, CACHED // logits.shape[1])):
        log_p = rows.double().log_softmax(-1)
        yield log_p.exp(), log_p


def _kl(known: Iterable[Known], other: Shaped[Tensor, "n vocab"]) -> Float64[Tensor, "n"]:
    pairs = zip(known, other.split(max(1, CACHED // other.shape[1])), strict=True)
    return torch.cat([(p * (log_p - y.double().log_softmax(-1))).sum(-1) for (p, log_p), y in pairs]).clamp_min(0.0)


def kl_loss(expert: Shaped[Tensor, "n vocab"], student: Shaped[Tensor, "n vocab"]) -> Float[Tensor, ""]:
    """Mean KL(expert || student) to train on, in the student's precision or float32, whichever is higher."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_p, log_q = (logits.to(dtype).log_softmax(-1) for logits in (expert, student))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


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


def standard_error(values: Float[Tensor, "n"], groups: Sequence[str] | None = None) -> float:
    """Standard error of the mean; NaN for a single value, which has none.

    Values of one group (a template, a document) are not independent: with `groups` the error is
    the cluster-robust one, from the sums of each group's deviations. Raises `ValueError` where
    there is not one group for each value.
    """
    deviations = values - values.mean()
    if groups is not None:
        if len(groups) != len(values):
            raise ValueError(f"{len(groups)} groups do not belong to {len(values)} values: name that of each prompt")
        number = {group: k for k, group in enumerate(dict.fromkeys(groups))}
        places = torch.tensor([number[group] for group in groups])
        deviations = torch.zeros(len(number), dtype=values.dtype).index_add(0, places, deviations)
    count = len(deviations)
    if count < 2:
        return float("nan")
    return float((deviations.square().sum() * count / (count - 1)).sqrt() / len(values))


def clearly_lower(values: Float[Tensor, "n"], others: Float[Tensor, "n"], groups: Sequence[str] | None = None) -> bool:
    """Whether the mean of `values` is below that of `others` by more than the standard error of the difference.

    The two belong to the same prompts, so the error is that of the paired differences; without one, for a single prompt
    or group, nothing is clear. Of few groups the error is itself uncertain, so it is widened as Student's t asks.
    """
    gain, count = others - values, len(values if groups is None else set(groups))
    wider = float(student.ppf(ONE_ERROR, count - 1)) if count > 1 else math.nan
    return float(gain.mean()) > wider * standard_error(gain, groups)


def evaluation_row(
    kl: Float[Tensor, "n"],
    base_kl: float,
    top1: float,
    top5_overlap: float,
    groups: Sequence[str] | None,
    **keys: object,
) -> dict[str, object]:
    """One evaluation row: `keys`, then the figures that every table of KL carries (`FIGURES`)."""
    return keys | {
        "kl": float(kl.mean()),
        "kl_se": standard_error(kl, groups),
        "base_kl": base_kl,
        "gap_closed": 1 - float(kl.mean()) / base_kl if base_kl > 0 else math.nan,
        "top1": top1,
        "top5_overlap": top5_overlap,
        "n_prompts": len(kl),
    }


@dataclass(frozen=True)
class Reference:
    """An expert, and the untouched base, on one set of prompts: what every adapter is measured against.

    `groups` names each prompt's template or document, where prompts of one are not independent. Without `base`
    there is a KL but no scale for it. The expert's probabilities and their logarithms are kept in float64, so that
    each further KL takes a third of the time.
    """

    expert: Shaped[Tensor, "n vocab"]
    base: Shaped[Tensor, "n vocab"] | None = None
    groups: Sequence[str] | None = None

    @cached_property
    def _top(self) -> Int[Tensor, "n 5"]:
        return self.expert.topk(5).indices

    @cached_property
    def _base_kls(self) -> Float64[Tensor, "n"]:
        if self.base is None:
            raise ValueError("this reference has no logits of the base: give them, a KL has no scale without")
        return self.kl(self.base)

    @property
    def base_kl(self) -> float:
        """Mean KL(expert || base), nats: the scale of every other KL; `ValueError` without a base."""
        return float(self._base_kls.mean())

    @cached_property
    def _known(self) -> list[Known]:
        return list(_known(self.expert))

    def kl(self, adapted: Shaped[Tensor, "n vocab"]) -> Float64[Tensor, "n"]:
        """KL(expert || adapted) of each prompt, nats."""
        return _kl(self._known, adapted)

    def row(
        self,
        adapted: Shaped[Tensor, "n vocab"],
        kl: Float[Tensor, "n"] | None = None,
        interval: bool = False,
        **keys: object,
    ) -> dict[str, object]:
        """The evaluation row of `adapted` logits behind `keys`; `kl` where it is known, `interval` for its ends too."""
        kl = self.kl(adapted) if kl is None else kl
        keys |= self.gap_interval(kl) if interval else {}
        top = adapted.topk(5).indices
        top1 = float((top[:, 0] == self._top[:, 0]).double().mean())
        overlap = float((top[:, :, None] == self._top[:, None]).any(-1).double().mean())
        return evaluation_row(kl, self.base_kl, top1, overlap, self.groups, **keys)

    def gap_interval(self, kl: Float64[Tensor, "n"]) -> dict[str, float]:
        """Ends of the 95 percent interval of the share that prompts of this `kl` close; `ValueError` without a base.

        A paired bootstrap: whole groups are drawn again, and each draw gives the adapted and the base's mean at once.
        """
        numbers = pd.factorize(np.array(self.groups or range(len(kl))))[0]
        sums = [np.bincount(numbers, weights=values.cpu()) for values in (kl, self._base_kls)]

        def closed(adapted: np.ndarray, base: np.ndarray, axis: int) -> np.ndarray:
            return 1 - adapted.sum(axis) / base.sum(axis)

        drawn = bootstrap(sums, closed, paired=True, n_resamples=DRAWS, method="percentile", rng=0).confidence_interval
        return {"gap_low": float(drawn.low), "gap_high": float(drawn.high)}


def over_seeds(rows: pd.DataFrame, also: Sequence[str] = ()) -> pd.DataFrame:
    """Evaluation rows averaged over `seed`: rows that agree in all other settings become one.

    Settings are all columns but `seed`, `FIGURES` and those named in `also`, which are averaged too. The standard
    error joins the seeds' own (of their mean) with that of the prompts, averaged over the seeds because they share
    the prompts; `n_seeds` counts them.
    """
    settings = [column for column in rows if column not in (*FIGURES, *also, "seed")]
    averaged = []
    for key, group in rows.groupby(settings, sort=False, dropna=False):
        between = group["kl"].to_numpy().std(ddof=1) / len(group) ** 0.5 if len(group) > 1 else 0.0
        row = dict(zip(settings, key, strict=True)) | group.drop(columns=[*settings, "seed"]).mean().to_dict()
        row["kl_se"] = math.hypot(group["kl_se"].to_numpy().mean(), between)
        averaged.append(row | {"n_prompts": int(group["n_prompts"].iloc[0]), "n_seeds": len(group)})
    return pd.DataFrame(averaged)
