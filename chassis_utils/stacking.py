"""Adapters at several layers of one base, fitted one after another in closed form.

Each middle layer's adapter is fitted to what is still missing at the end, pulled back
through the blocks (`intervention.pull_back`), on the states that it will really see: those
that the adapters before it leave. How much of it to add is decided on prompts kept out of
the fit, with the last adapter refitted each time; nothing is one of the choices, so a
middle layer that does not help stays as it is. Cost: a pass of one token per prompt for
each length tried.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float64, Shaped
from torch import Tensor

from chassis_utils.adapters import Adapter, at_rank, fit_path
from chassis_utils.intervention import Prefixes, pull_back
from chassis_utils.metrics import kl_divergence
from chassis_utils.models import Head
from chassis_utils.moments import by_fold

LENGTHS = (0.5, 1.0)  # of a middle layer's edit, tried beside none


@dataclass(frozen=True)
class Stack:
    """Adapters of middle layers, by layer, and the one at the head."""

    middle: dict[int, Adapter]
    last: Adapter

    def logits(self, prefixes: Prefixes, head: Head) -> Shaped[Tensor, "n vocab"]:
        """Run the blocks with all edits in place."""
        edits = {layer: adapter.edit for layer, adapter in self.middle.items()}
        return self.last.logits(prefixes.finish(edits)[-1], head)


@dataclass(frozen=True)
class Task:
    """What a stack is fitted to: prompts, the expert's last states on them, folds, and the base's responses."""

    prefixes: Prefixes
    head: Head
    target: Float64[Tensor, "n d"]
    folds: Sequence[int]  # of each prompt; fold 0 decides lengths and is left out of the fits that it judges
    metric: Float64[Tensor, "d d"]
    responses: Mapping[int, Float64[Tensor, "d d"]]  # of the last state to each middle layer

    def states(self, middle: Mapping[int, Adapter]) -> Shaped[Tensor, "layers n d"]:
        """States under the edits of the middle layers."""
        return self.prefixes.finish({layer: adapter.edit for layer, adapter in middle.items()})


def fit(task: Task, layers: Sequence[int], ranks: Sequence[int]) -> Stack:
    """A stack at `layers`, the last of which is the head's, with the given ranks."""
    middle: dict[int, Adapter] = {}
    for layer, rank in zip(layers[:-1], ranks[:-1], strict=True):
        states = task.states(middle)
        missing = task.target - states[-1].double()
        wanted, metric = pull_back(missing, task.responses[layer], task.metric)
        fitted = at_rank(fit_path(by_fold(states[layer], wanted, task.folds), metric), rank, task.head)
        scaled = [replace(fitted, up=length * fitted.up, shift=length * fitted.shift) for length in LENGTHS]
        middle = min(
            [middle, *(middle | {layer: adapter} for adapter in scaled)], key=lambda m: _loss(task, m, ranks[-1])
        )
    return Stack(middle, _last(task, task.states(middle)[-1], ranks[-1]))


def _last(task: Task, h: Shaped[Tensor, "n d"], rank: int, without: int | None = None) -> Adapter:
    """The adapter at the head for the states that reach it; `without` leaves a fold out."""
    folds = by_fold(h, task.target - h.double(), task.folds)
    kept = [fold for number, fold in enumerate(folds) if number != without]
    return at_rank(fit_path(kept, task.metric), rank, task.head)


def _loss(task: Task, middle: Mapping[int, Adapter], rank: int) -> float:
    """Mean KL on fold 0 with the last adapter refitted to the other folds, nats."""
    h = task.states(middle)[-1]
    last = _last(task, h, rank, without=0)
    rows = [k for k, fold in enumerate(task.folds) if fold == 0]
    return float(kl_divergence(task.head(task.target[rows]), last.logits(h[rows], task.head)).mean())
