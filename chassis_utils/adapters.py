"""Adapters: low-rank edits beside the head of a frozen base, fitted in closed form.

In state coordinates the head reads h + (h A) B^T + b; in vocabulary coordinates
(h A) B^T + b is added to the head's product W h. Either may carry an intercept over the
whole vocabulary. An adapter is fitted by reduced-rank regression of the edit under the
vocabulary metric (`regression.reduced_rank`): one SVD gives every rank. Cost per token:
2 r d multiplications in state coordinates, r (d + V) in vocabulary coordinates.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float64, Shaped
from safetensors.torch import load_file, save
from torch import Tensor

from chassis_utils.models import Head
from chassis_utils.moments import Moments, by_fold, merge
from chassis_utils.paths import ROOT, write_atomically
from chassis_utils.regression import RankPath, choose_penalty, reduced_rank, solve_symmetric, vocabulary_metric

FORMAT = 1  # of the files
CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
Space = Literal["state", "vocabulary"]


@dataclass(frozen=True)
class Adapter:
    """(h A) B^T + b with A = `down`, B = `up`, b = `shift`; `out` is d or V as `space` says."""

    space: Space
    down: Float64[Tensor, "d rank"]
    up: Float64[Tensor, "out rank"]
    shift: Float64[Tensor, "out"]
    head: str  # fingerprint of the head it belongs to
    intercept: Float64[Tensor, "vocab"] | None = None  # added to the head's product

    @classmethod
    def untouched(cls, head: Head, rank: int) -> "Adapter":
        """One that edits nothing, in state coordinates: where a refinement may start."""
        width = head.weight.shape[1]
        down, up = (torch.zeros(width, rank, dtype=torch.float64) for _ in range(2))
        return cls("state", down, up, torch.zeros(width, dtype=torch.float64), head.fingerprint)

    @property
    def rank(self) -> int:
        """Number of columns of A and B."""
        return self.down.shape[1]

    @property
    def parameters(self) -> int:
        """Numbers stored; a row of B whose factors and shift are zero (a token left alone) is not."""
        used = int(((self.up != 0).any(1) | (self.shift != 0)).sum()) if self.space == "vocabulary" else len(self.up)
        return self.down.numel() + used * (self.rank + 1) + (0 if self.intercept is None else len(self.intercept))

    def edit(self, h: Shaped[Tensor, "n d"]) -> Float64[Tensor, "n out"]:
        """What is added for states `h`: to the states or to the head's product, as `space` says."""
        return (h.double() @ self.down) @ self.up.T + self.shift

    def logits(self, h: Shaped[Tensor, "n d"], head: Head) -> Shaped[Tensor, "n vocab"]:
        """The adapted logits; `ValueError` for a head that the adapter was not fitted to."""
        self.check(head)
        if self.space == "state":
            product = head.product(h.double() + self.edit(h))
        else:
            product = head.product(h) + self.edit(h).to(head.weight.dtype)
        if self.intercept is not None:
            product = product + self.intercept.to(product.dtype)
        return head.finish(product)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `adapter_config.json` and `adapter.safetensors`, factors in float32."""
        folder = ROOT / folder  # an absolute folder stays itself
        tensors = {"down": self.down, "up": self.up, "shift": self.shift, "intercept": self.intercept}
        stored = {name: tensor.float().contiguous() for name, tensor in tensors.items() if tensor is not None}
        config = {"format": FORMAT, "space": self.space, "rank": self.rank, "head": self.head}
        write_atomically(folder / WEIGHTS, save(stored))
        write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, head: Head) -> "Adapter":
        """Read what `save_pretrained` wrote.

        Raises `ValueError` where a file is missing, the format is unknown, or `head` is not
        the one that the adapter was fitted to.
        """
        folder = ROOT / folder
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise ValueError(
                    f"{folder.name!r} holds no adapter, {name} is missing: name a folder that was saved to"
                )
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config["format"] != FORMAT:
            raise ValueError(f"adapter {folder.name!r} has format {config['format']}, {FORMAT} is read: save it anew")
        tensors = {name: tensor.double() for name, tensor in load_file(folder / WEIGHTS).items()}
        adapter = cls(space=config["space"], head=config["head"], **tensors)
        adapter.check(head)
        return adapter

    def check(self, head: Head) -> None:
        """Raise `ValueError` for a head that the adapter was not fitted to."""
        if self.head != head.fingerprint:
            raise ValueError(
                f"this adapter was fitted to the head {self.head}, not to {head.fingerprint}: "
                "plug it into the base that it was made for, or fit it anew"
            )


def fit_path(
    folds: Sequence[Moments], metric: Float64[Tensor, "d d"] | None = None, penalty: float | None = None
) -> RankPath:
    """Every rank of the adapter from the moments of states and edits; the penalty by K-fold unless given."""
    if penalty is None:
        penalty, _ = choose_penalty(folds, metric)
    return reduced_rank(merge(folds), penalty, metric)


@dataclass(frozen=True)
class LogitFit:
    """Every rank of the adapter fitted to an expert's logits, and the penalty that was chosen."""

    path: RankPath
    intercept: Float64[Tensor, "vocab"]
    penalty: float
    head: Head

    def at(self, rank: int) -> Adapter:
        """The adapter of one rank; 0 is the intercept alone. `ValueError` beyond its ranks."""
        return at_rank(self.path, rank, self.head, self.intercept)


def fit_logits(
    h: Shaped[Tensor, "n d"], logits: Shaped[Tensor, "n vocab"], head: Head, folds: Sequence[int]
) -> LogitFit:
    """Adapters that bring the base's logits at states `h` to those of an expert of any kind.

    The edits that come closest (`state_edits`) under the expert's mean probabilities are regressed on the
    states in that metric, the penalty by K-fold.
    """
    likely = logits.softmax(-1).mean(0, dtype=torch.float64)
    edits, intercept = state_edits(logits - head(h), head, likely)
    moments, metric = by_fold(h, edits, folds), vocabulary_metric(head.weight, likely)
    penalty, _ = choose_penalty(moments, metric)
    return LogitFit(fit_path(moments, metric, penalty), intercept, penalty, head)


def at_rank(path: RankPath, rank: int, head: Head, intercept: Float64[Tensor, "vocab"] | None = None) -> Adapter:
    """The adapter of one rank of a path fitted to edits of the state; `ValueError` beyond its ranks."""
    fitted = path.at(rank)
    return Adapter("state", path.left[:, :rank], path.right[:, :rank], fitted.bias, head.fingerprint, intercept)


def state_edits(
    delta: Shaped[Tensor, "n vocab"], head: Head, mean_probabilities: Float64[Tensor, "vocab"]
) -> tuple[Float64[Tensor, "n d"], Float64[Tensor, "vocab"]]:
    """The edits of the state that come closest to given changes of the head's product, and the intercept left.

    Least squares in the metric of `mean_probabilities` p: y solves (W^T Omega W) y = W^T Omega delta with
    Omega = diag p - p p^T, the projection under which regression on y is regression on delta.
    The intercept, over the whole vocabulary, is what the mean edit leaves of the mean change.
    """
    w, p = head.weight.double(), mean_probabilities.double()
    centred = (w - p @ w) * p[:, None]
    edits = solve_symmetric(centred.T @ w, centred.T @ delta.double().T).T
    return edits, delta.double().mean(0) - edits.mean(0) @ w.T
