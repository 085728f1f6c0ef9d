"""Fitting adapters in closed form: every rank at once, and the one that kept-out text agrees to.

An expert of any kind is followed through its logits: the edits of the base's state that come closest to the changes
of the logits (`state_edits`) are regressed on the state under the vocabulary metric, which gives every rank from one
SVD (`regression.reduced_rank`), and a full-vocabulary intercept takes what the mean edit leaves. Where the expert
shares the base's head its states are regressed on directly. Penalty by K-fold validation of the squared error.

Which rank to use, and whether any, is not left to that squared error, which is only the second-order shadow of the
KL: `fit_gated` measures KL(expert || adapted) on folds kept out of the fit and gives back the untouched base where
nothing is clearly better. Cost: a few d^3 and n V d multiplications for each fold and rank tried, whatever the
expert.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float64, Shaped
from torch import Tensor

from chassis_utils.adapters.adapter import Adapter, HeldOut
from chassis_utils.bridge.bridge import Bridge
from chassis_utils.experts.bridged import BridgedExpert
from chassis_utils.experts.protocol import Expert
from chassis_utils.experts.sibling import Sibling
from chassis_utils.limits import require_memory
from chassis_utils.linalg.moments import Moments, by_fold, column_sums, merge
from chassis_utils.linalg.regression import (
    RankPath,
    choose_penalty,
    choose_rank,
    reduced_rank,
    solve_symmetric,
    vocabulary_metric,
)
from chassis_utils.lm.forward import every_position
from chassis_utils.lm.model import Head, LanguageModel, require_model
from chassis_utils.lm.states import last_states
from chassis_utils.metrics import Reference, clearly_lower, standard_error
from chassis_utils.text.prompts import deal, require_texts

FOLDS = 5
LENGTHS = (1.0, 0.5, 0.25)  # of an edit: shares of the fitted one that the gate tries
ROUNDING = 1e-9  # nats: below it an adapter is the expert
INDIFFERENCE = 0.1  # of a standard error: candidates closer than that are equal, and the smaller one is taken


@dataclass(frozen=True)
class AdapterPath:
    """The adapters of every rank from one fit; rank 0 is the intercept and the mean edit alone."""

    path: RankPath
    head: Head
    penalty: float
    folds: Sequence[Moments]  # of states and edits
    metric: Float64[Tensor, "d d"] | None
    intercept: Float64[Tensor, "vocab"] | None = None

    def at(self, rank: int) -> Adapter:
        """The adapter of one rank; `ValueError` beyond those that the samples give."""
        factors = self.path.left[:, :rank], self.path.right[:, :rank], self.path.at(rank).bias
        return Adapter("state", *factors, self.head.fingerprint, self.intercept)

    @cached_property
    def rank(self) -> int:
        """The rank of least K-fold squared error."""
        return choose_rank(self.folds, self.penalty, self.metric)[0]


def fit_moments(
    folds: Sequence[Moments],
    head: Head,
    metric: Float64[Tensor, "d d"] | None = None,
    penalty: float | None = None,
    intercept: Float64[Tensor, "vocab"] | None = None,
) -> AdapterPath:
    """Every rank from the moments of states and edits, one for each fold; the penalty by K-fold unless given."""
    if penalty is None:
        penalty, _ = choose_penalty(folds, metric)
    return AdapterPath(reduced_rank(merge(folds), penalty, metric), head, penalty, folds, metric, intercept)


def fit_states(
    h: Shaped[Tensor, "n d"], target: Shaped[Tensor, "n d"], head: Head, folds: Sequence[int]
) -> AdapterPath:
    """Adapters that bring the base's last states `h` to those of an expert with the same head.

    `folds` numbers each row's fold. The metric is that of the expert's mean probabilities on these rows.
    Raises `ValueError` for rows, widths and folds that do not belong together, and rows that are not finite.
    """
    _check_rows(h, target, head.weight.shape[1], head, folds)
    likely = head.mean_probabilities(target)
    edits = target.double() - h.double()
    return fit_moments(by_fold(h, edits, folds), head, vocabulary_metric(head.weight, likely))


def fit_logits(
    h: Shaped[Tensor, "n d"],
    logits: Shaped[Tensor, "n vocab"],
    head: Head,
    folds: Sequence[int],
    penalty: float | None = None,
) -> AdapterPath:
    """Adapters that bring the base's logits at states `h` to those of an expert of any kind.

    Raises `ValueError` for rows, widths and folds that do not belong together, and rows that are not finite.
    """
    _check_rows(h, logits, len(head.weight), head, folds, chosen=penalty is None)
    likely = column_sums(logits.softmax(-1)) / len(logits)
    edits, intercept = state_edits(head.unfinish(logits) - head.product(h), head, likely)
    return fit_moments(by_fold(h, edits, folds), head, vocabulary_metric(head.weight, likely), penalty, intercept)


def fit_gated(
    h: Shaped[Tensor, "n d"],
    logits: Shaped[Tensor, "n vocab"],
    head: Head,
    folds: Sequence[int],
    rank: int | None = None,
    groups: Sequence[str] | None = None,
) -> Adapter:
    """The adapter that kept-out folds agree to, fitted to all rows; its `held_out` says what they found.

    Each fold is judged by fits to the others, on its real KL: ranks 0, 1, 2, 4, ... unless `rank` is given, then
    `LENGTHS` of the rank that does best. Of ranks within a tenth of a standard error the smallest is taken. Where the
    KL of none is below the untouched base's by more than a standard error (rows of one of `groups`, or of a fold,
    counting as one), the adapter edits nothing. Raises `ValueError` as `fit_logits`, and for a rank above the width.
    """
    check_rank(rank, head, groups, len(h))
    whole = fit_logits(h, logits, head, folds)
    most = len(whole.path.singular_values)
    ranks = [0, *(2**k for k in range(most.bit_length()) if 2**k <= most)] if rank is None else [whole.at(rank).rank]
    labels = torch.as_tensor(folds)
    groups = [str(fold) for fold in labels.tolist()] if groups is None else groups
    kept_out = [_KeptOut.of(labels == fold, h, logits, head, whole.penalty) for fold in labels.unique()]

    def kl(rank: int | None, length: float) -> Float64[Tensor, "n"]:
        """KL of each row under the fit that has not seen its fold; no rank is the untouched base."""
        values = torch.empty(len(h), dtype=torch.float64)
        for fold in kept_out:
            adapter = Adapter.untouched(head) if rank is None else fold.path.at(rank).scaled(length)
            values[fold.rows] = fold.expert.kl(adapter.logits(h[fold.rows], head))
        return values

    base, by_rank = kl(None, 1.0), {tried: kl(tried, 1.0) for tried in ranks}
    best = _smallest_of_the_best(by_rank, groups)
    by_length = {1.0: by_rank[best]} | {length: kl(best, length) for length in LENGTHS if length != 1.0}
    length = min(by_length, key=lambda tried: float(by_length[tried].mean()))
    judged = by_length[length]
    if not clearly_lower(judged, base, groups):
        return replace(Adapter.untouched(head), held_out=HeldOut.of(base, base, groups))
    return replace(whole.at(best).scaled(length), held_out=HeldOut.of(judged, base, groups))


def fit(
    base: LanguageModel,
    expert: LanguageModel | Expert,
    texts: Sequence[str],
    rank: int | None = None,
    positions: int = 4096,
) -> Adapter:
    """An adapter that makes `base` follow `expert`, fitted in closed form on every position of `texts`.

    `expert` is another model (a sibling of the base, or one with another tokenizer, then carried over by the
    byte-exact bridge) or any `Expert`. Of more than `positions` tokens that many are taken, evenly. Rank and penalty
    are chosen on folds of whole texts; `held_out` of the result says what it does on texts that it was not fitted to.

    Raises `TypeError` for what are no models or texts, `ValueError` for fewer than two texts, texts that cannot be
    read, a rank beyond the width and models that cannot be joined, `MemoryError` where the logits do not fit.

    >>> from chassis_utils import fit, load
    >>> base, expert = load("models/port-llama"), load("models/sibling-math")
    >>> adapter = fit(base, expert, [f"What is {i} + {i + 3}? It is {2 * i + 3}." for i in range(64)])
    >>> adapter.held_out.gap_closed > 0.5
    True
    """
    _check_request(base, expert, rank, positions)
    texts = list(dict.fromkeys(require_texts(texts)))
    if len(texts) < 2:
        raise ValueError(f"{len(texts)} different texts leave none to hold out: give at least two, better hundreds")
    if isinstance(expert, LanguageModel):
        same = expert.tokenizer.get_vocab() == base.tokenizer.get_vocab()
        expert = Sibling(base, expert) if same else BridgedExpert(base, expert, Bridge.between(base, expert))
    places = _spread(every_position(base, texts), positions)
    owners = [k for k, row in enumerate(places) for _ in row]
    size = 3 * len(owners) * len(base.head.weight) * 8
    require_memory(size, f"logits at {len(owners)} positions", "ask for fewer positions")
    by_text = deal(texts, FOLDS)
    folds = [by_text[k] for k in owners]
    h, logits = last_states(base, texts, places), expert.logits(texts, places)
    return fit_gated(h, logits, base.head, folds, rank, [texts[k] for k in owners])


def state_edits(
    delta: Shaped[Tensor, "n vocab"], head: Head, mean_probabilities: Float64[Tensor, "vocab"]
) -> tuple[Float64[Tensor, "n d"], Float64[Tensor, "vocab"]]:
    """The edits of the state that come closest to given changes of the head's product, and the intercept left.

    Least squares in the metric of `mean_probabilities` p: y solves (W^T Omega W) y = W^T Omega delta with Omega =
    diag p - p p^T, the projection under which regression on y is regression on delta. The intercept, over the whole
    vocabulary, is what the mean edit leaves of the mean change.
    """
    edits = pulled_back([delta], head, mean_probabilities)
    return edits, delta.double().mean(0) - edits.mean(0) @ head.weight.double().T


def pulled_back(
    deltas: Iterable[Shaped[Tensor, "k vocab"]], head: Head, mean_probabilities: Float64[Tensor, "vocab"]
) -> Float64[Tensor, "n d"]:
    """The edits alone, from the changes of some rows at a time."""
    w, p = head.weight.double(), mean_probabilities.double()
    centred = (w - p @ w) * p[:, None]
    pulled = torch.cat([delta.double() @ centred for delta in deltas])
    return solve_symmetric(centred.T @ w, pulled.T).T


def _check_rows(h: Tensor, wanted: Tensor, out: int, head: Head, folds: Sequence[int], chosen: bool = True) -> None:
    """Refuse states and what is wanted at them that do not fit the head, each other, or the folds to choose on."""
    shapes, fitting = [list(h.shape), list(wanted.shape)], [[len(h), head.weight.shape[1]], [len(h), out]]
    if shapes != fitting or len(folds) != len(h):
        raise ValueError(
            f"states and targets are {shapes} with {len(folds)} folds, where this head takes {fitting} and "
            f"{len(h)} folds: give one row and one fold for each position"
        )
    bad = (~torch.isfinite(wanted).all(-1)).nonzero()
    if len(bad):
        raise ValueError(f"row {int(bad[0])} of the targets is not finite: leave that position out")
    if chosen and len(set(folds)) < 2:
        raise ValueError(f"all {len(h)} rows are of one fold, so nothing can be held out: number two folds at least")


def _check_request(base: LanguageModel, expert: LanguageModel | Expert, rank: int | None, positions: int) -> None:
    require_model(base)
    if not isinstance(expert, Expert):
        require_model(expert)
    if not isinstance(positions, int) or positions < 2:
        raise ValueError(f"{positions!r} positions leave none to hold out: ask for two at least, better thousands")
    check_rank(rank, base.head)


def check_rank(rank: int | None, head: Head, groups: Sequence[str] | None = None, rows: int = 0) -> None:
    """Raise `ValueError` for a rank beyond the width, and groups that are not one for each row."""
    limit = head.weight.shape[1]
    if rank is not None and (not isinstance(rank, int) or not 0 <= rank <= limit):
        raise ValueError(f"rank {rank!r} is beyond the limit: states of this width give ranks 0 to {limit}")
    if groups is not None and len(groups) != rows:
        raise ValueError(f"{len(groups)} groups for {rows} rows: give one for each row, or none")


@dataclass(frozen=True)
class _KeptOut:
    """A fold, and the fit to all other rows, which knows nothing of this fold but the penalty."""

    rows: Bool[Tensor, "n"]
    path: AdapterPath
    expert: Reference

    @classmethod
    def of(cls, rows: Tensor, h: Tensor, logits: Tensor, head: Head, penalty: float) -> "_KeptOut":
        others = fit_logits(h[~rows], logits[~rows], head, [0] * int((~rows).sum()), penalty)
        return cls(rows, others, Reference(logits[rows]))


def _smallest_of_the_best(kl: dict[int, Float64[Tensor, "n"]], groups: Sequence[str]) -> int:
    least = min(kl.values(), key=lambda values: float(values.mean()))
    error = standard_error(least, groups)
    limit = max(float(least.mean()) + INDIFFERENCE * error, ROUNDING)
    return min(rank for rank, values in kl.items() if float(values.mean()) <= limit)


def _spread(places: list[list[int]], most: int) -> list[list[int]]:
    """At most so many of all positions, evenly over the texts; `ValueError` where two texts have none."""
    total, numbers = sum(map(len, places)), itertools.count()
    spread = [[place for place in row if (next(numbers) * most) % total < most or total <= most] for row in places]
    fitted_at = sum(map(bool, spread))
    if fitted_at < 2:
        raise ValueError(
            f"{fitted_at} of {len(places)} texts have tokens to fit at: give two at least, and longer ones"
        )
    return spread
