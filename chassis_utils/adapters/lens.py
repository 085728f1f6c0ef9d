"""Lenses: linear maps from the state of one layer to an expert's next-token distribution.

For an expert that shares the base's head, logits are linear in its last state, so ridge
from h_l to the logits and ridge from h_l to that state give the same lens; the second needs
d x d systems in place of d x V. At the last layer the edit h_e - h is fitted instead: then
the ridge shrinks toward the untouched base (plus the mean edit), not toward the mean state.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float64, Shaped
from torch import Tensor

from chassis_utils.linalg.moments import Moments, by_fold, merge
from chassis_utils.linalg.regression import LinearMap, choose_penalty, ridge
from chassis_utils.lm.model import Head


@dataclass(frozen=True)
class Lens:
    """From states of one layer to the expert's last state; an `edit` lens adds its input back."""

    map: LinearMap
    edit: bool
    penalty: float

    def states(self, h: Shaped[Tensor, "n d"]) -> Float64[Tensor, "n d"]:
        """The predicted last state."""
        return self.map(h) + h.double() if self.edit else self.map(h)

    def logits(self, h: Shaped[Tensor, "n d"], head: Head) -> Shaped[Tensor, "n vocab"]:
        """The predicted logits."""
        return head(self.states(h))


def lens_moments(
    h: Shaped[Tensor, "n d"], target: Shaped[Tensor, "n d"], folds: Sequence[int], edit: bool = False
) -> list[Moments]:
    """Per-fold moments of a lens from `h` to `target` states, or to the edit `target - h`."""
    return by_fold(h, target.double() - h.double() if edit else target, folds)


def fit_lens(
    folds: Sequence[Moments],
    edit: bool = False,
    penalty: float | None = None,
    metric: Float64[Tensor, "d d"] | None = None,
) -> Lens:
    """Ridge from the merged moments; the penalty by K-fold validation under `metric` unless given."""
    if penalty is None:
        penalty, _ = choose_penalty(folds, metric)
    return Lens(ridge(merge(folds), penalty), edit, penalty)
