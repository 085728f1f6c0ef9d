"""Lenses: linear maps from the state of one layer to an expert's next-token distribution.

For an expert that shares the base's head, logits are linear in its last state, so ridge
from h_l to the logits and ridge from h_l to that state give the same lens; the second needs
d x d systems in place of d x V. At the last layer the edit h_e - h is fitted instead: then
the ridge shrinks toward the untouched base (plus the mean edit), not toward the mean state.

`read_moments` gathers what the lenses of all layers need in one pass, in memory that does not grow with the number of
texts, and shared between the processes of `torch.distributed` where several run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor
from tqdm import tqdm

from chassis_utils.limits import require_memory
from chassis_utils.linalg.moments import Moments, by_fold, gram_matrix, merge, over_processes, processes
from chassis_utils.linalg.regression import LinearMap, choose_penalty, ridge
from chassis_utils.lm.forward import at_ends, batches, encode, layer_states, pad
from chassis_utils.lm.model import Head, LanguageModel

WAITING = 512  # states of each layer that are held until they are added to the moments


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
    h: Shaped[Tensor, "n d"],
    target: Shaped[Tensor, "n d"],
    folds: Sequence[int],
    edit: bool = False,
    yy: Sequence[Float64[Tensor, "d d"]] | None = None,
) -> list[Moments]:
    """Per-fold moments of a lens from `h` to `target` states, or to the edit `target - h`; `yy` as of `by_fold`."""
    if edit:  # whose targets are of this layer alone
        return by_fold(h, target.double() - h.double(), folds)
    return by_fold(h, target, folds, yy)


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


def read_moments(
    base: LanguageModel, expert: LanguageModel, texts: Sequence[str], folds: Sequence[int]
) -> list[list[Moments]]:
    """Moments [layer][fold] from the base's states at the texts' last tokens to the expert's last states there.

    Layers 0 to `depth` in one pass of each model (one pass in all where the two are the same). Of several processes
    each reads its share of the batches, which are those of one process, and all return the sums. Raises `ValueError`
    for texts that either model cannot read or that the two cut differently and folds that are not one for each text,
    `MemoryError` where the moments do not fit.
    """
    if len(folds) != len(texts):
        raise ValueError(f"{len(folds)} folds for {len(texts)} texts: give one for each text")
    ids = encode(base, texts)
    if expert is not base and encode(expert, texts) != ids:
        raise ValueError(f"{expert.name!r} cuts these texts into other tokens than {base.name!r}: give a sibling of it")
    size = (base.depth + 1) * len(set(folds)) * 8 * (base.width + expert.width) ** 2
    require_memory(size, f"moments of {base.depth + 1} layers and {len(set(folds))} folds", "use fewer folds")
    rows = [[row for row, own in zip(ids, folds, strict=True) if own == fold] for fold in sorted(set(folds))]
    parts = [_moments_of(base, expert, own, planned) for own, planned in zip(rows, _planned(rows), strict=True)]
    return [list(layer) for layer in zip(*map(over_processes, parts), strict=True)]  # none waits before all is read


def _planned(folds: list[list[list[int]]]) -> list[list[list[int]]]:
    """This process's batches of each fold's rows: the largest first, each to the process with least to do so far."""
    (process, count), own = processes(), [list[list[int]]() for _ in folds]
    every = ((len(b) * max(len(rows[k]) for k in b), fold, b) for fold, rows in enumerate(folds) for b in batches(rows))
    loads = [0] * count
    for tokens, fold, batch in sorted(every, reverse=True):
        least = loads.index(min(loads))
        loads[least] += tokens
        if least == process:
            own[fold].append(batch)
    return own


@torch.inference_mode()
def _moments_of(
    base: LanguageModel, expert: LanguageModel, ids: list[list[int]], planned: list[list[int]]
) -> list[Moments]:
    """The moments of each layer; it holds the states of `WAITING` texts at most, beside those of a batch."""
    waiting, sums = list[tuple[Tensor, Tensor]](), list[Moments]()
    for number, batch in enumerate(tqdm(planned, desc=f"moments of {base.name}", disable=None, leave=False), start=1):
        rows = [ids[k] for k in batch]
        own = _last_tokens(base, rows)
        waiting.append((own, own[-1] if expert is base else _last_tokens(expert, rows)[-1]))
        if sum(len(target) for _, target in waiting) >= WAITING or number == len(planned):
            states, targets = (torch.cat(part, dim=-2) for part in zip(*waiting, strict=True))
            yy = gram_matrix(targets)
            new, waiting = [Moments.of(h, targets, yy) for h in states], []
            sums = [a + b for a, b in zip(sums, new, strict=True)] if sums else new
    nothing = torch.zeros(0, base.width), torch.zeros(0, expert.width)
    return sums or [Moments.of(*nothing) for _ in range(base.depth + 1)]


def _last_tokens(model: LanguageModel, rows: list[list[int]]) -> Shaped[Tensor, "layers n d"]:
    ids, mask = pad(rows, model.device)
    states = layer_states(model, ids, attention_mask=mask, use_cache=False)
    return torch.stack([at_ends(state, mask).cpu() for state in states])
