"""Adapters at several layers of one base, fitted one after another in closed form.

Each middle layer's adapter is fitted to what is still missing at the end, pulled back
through the blocks (`lm.last_token.pull_back`), on the states that it will really see: those
that the adapters before it leave. How much of it to add is decided on prompts kept out of
the fit, with the last adapter refitted each time; nothing is one of the choices, so a
middle layer that does not help stays as it is. Cost: a pass of one token per prompt for
each length tried.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from chassis_utils.adapters.adapter import Adapter
from chassis_utils.adapters.fit import fit_moments
from chassis_utils.linalg.moments import Moments, by_fold
from chassis_utils.linalg.regression import choose_penalty
from chassis_utils.lm.last_token import Prefixes, pull_back
from chassis_utils.lm.model import Head
from chassis_utils.metrics import Reference, clearly_lower

LENGTHS = (0.5, 1.0)  # of a middle layer's edit, tried beside none
JUDGES = 3  # one fold in this many


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
    folds: Sequence[int]  # of each prompt; every third one judges lengths and is left out of the fits judged
    metric: Float64[Tensor, "d d"]
    responses: Mapping[int, Float64[Tensor, "d d"]]  # of the last state to each middle layer
    _first: dict[tuple[int, int], list[tuple[dict[int, Adapter], Tensor]]] = field(default_factory=dict, init=False)

    @cached_property
    def start(self) -> tuple[Float[Tensor, "layers n d"], float]:
        """The base's states, and the penalty of a last adapter fitted to them: where every stack begins."""
        states = self.prefixes.finish()
        return states, choose_penalty(self.moments(states[-1], self.target - states[-1].double()), self.metric)[0]

    @property
    def judges(self) -> list[int]:
        """The prompts that decide lengths."""
        return [k for k, fold in enumerate(self.folds) if fold % JUDGES == 0]

    @cached_property
    def expert(self) -> Reference:
        """The expert on the prompts that judge."""
        return Reference(self.head(self.target[self.judges]))

    def edited(
        self, middle: dict[int, Adapter], states: Float[Tensor, "layers n d"], layer: int, rank: int
    ) -> list[tuple[dict[int, Adapter], Float[Tensor, "layers n d"]]]:
        """`middle` with an edit at `layer` of each of `LENGTHS`, fitted to what `states` lack, and the states then.

        A first edit is kept: every stack of this task begins with the same.
        """
        if not middle and (layer, rank) in self._first:
            return self._first[layer, rank]
        wanted, metric = pull_back(self.target - states[-1].double(), self.responses[layer], self.metric)
        fitted = fit_moments(self.moments(states[layer], wanted), self.head, metric).at(rank)
        longer = [middle | {layer: fitted.scaled(length)} for length in LENGTHS]
        edited = [(adapters, self.run(adapters)) for adapters in longer]
        if not middle:
            self._first[layer, rank] = edited
        return edited

    def run(self, middle: Mapping[int, Adapter]) -> Float[Tensor, "layers n d"]:
        """The states under these edits."""
        return self.prefixes.finish({layer: adapter.edit for layer, adapter in middle.items()})

    def moments(self, h: Shaped[Tensor, "n d"], wanted: Float64[Tensor, "n d"]) -> list[Moments]:
        """Moments of the folds that do not judge."""
        moments = by_fold(h, wanted, self.folds)
        return [fold for number, fold in enumerate(moments) if number % JUDGES]


def fit_stack(task: Task, layers: Sequence[int], ranks: Sequence[int]) -> Stack:
    """A stack at `layers`, the last of which is the head's, with the given ranks; `ValueError` for another number."""
    if not layers or len(layers) != len(ranks):
        raise ValueError(f"{len(layers)} layers and {len(ranks)} ranks make no stack: give one rank for each layer")
    states, penalty = task.start
    best = _Trial.of(task, {}, states, ranks[-1], penalty)
    groups = [str(task.folds[k]) for k in task.judges]  # prompts of a fold count as one
    for layer, rank in zip(layers[:-1], ranks[:-1], strict=True):
        edited = task.edited(best.middle, best.states, layer, rank)
        trials = [_Trial.of(task, middle, states, ranks[-1], penalty) for middle, states in edited]
        better = [trial for trial in trials if clearly_lower(trial.kl, best.kl, groups)]
        best = min(better, key=lambda trial: float(trial.kl.mean()), default=best)
    h = best.states[-1]
    whole = fit_moments(by_fold(h, task.target - h.double(), task.folds), task.head, task.metric, penalty)
    return Stack(best.middle, whole.at(ranks[-1]))


@dataclass(frozen=True)
class _Trial:
    """Adapters of middle layers, the states under them, and the judges' KL with the last adapter refitted."""

    middle: dict[int, Adapter]
    states: Shaped[Tensor, "layers n d"]
    kl: Float64[Tensor, "judges"]

    @classmethod
    def of(cls, task: Task, middle: dict[int, Adapter], states: Tensor, rank: int, penalty: float) -> "_Trial":
        """`penalty` is that of the start: the states that reach the head under small edits differ little."""
        moments = task.moments(states[-1], task.target - states[-1].double())
        last = fit_moments(moments, task.head, task.metric, penalty).at(rank)
        adapted = last.logits(states[-1][task.judges], task.head)
        return cls(middle, states, task.expert.kl(adapted))
