"""Adapters: low-rank edits beside the head of a frozen base, fitted in closed form.

In state coordinates the head reads h + (h A) B^T + b; in vocabulary coordinates (h A) B^T + b is added to the head's
product W h. Either may carry an intercept over the whole vocabulary. An adapter is fitted by reduced-rank regression
of the edit under the vocabulary metric (`regression.reduced_rank`): one SVD gives every rank. Cost per token: 2 r d
multiplications in state coordinates, r (d + V) in vocabulary coordinates.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Float64, Shaped
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from chassis_utils.files import write_together
from chassis_utils.lm.model import Head
from chassis_utils.lm.tokenizer import read_json
from chassis_utils.metrics import standard_error

FORMAT = 2  # of the files
CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
Space = Literal["state", "vocabulary"]


@dataclass(frozen=True)
class HeldOut:
    """What an adapter does on text that it was not fitted to, nats per predicted token.

    The least of a few candidates' KL to the logits that were fitted, so a little on the hopeful side.
    """

    kl: float  # KL(expert || adapted)
    kl_se: float
    base_kl: float  # KL(expert || untouched base)
    n: int  # predicted tokens

    @classmethod
    def of(cls, kl: Float[Tensor, "n"], base_kl: Float[Tensor, "n"], groups: Sequence[str]) -> "HeldOut":
        """From the KL of each row; rows of one group count as one in the standard error."""
        return cls(float(kl.mean()), standard_error(kl, groups), float(base_kl.mean()), len(kl))

    @property
    def gap_closed(self) -> float:
        """1 - kl / base_kl."""
        return 1 - self.kl / self.base_kl if self.base_kl > 0 else 0.0

    def __str__(self) -> str:
        return (
            f"held-out KL {self.kl:.3g} ± {self.kl_se:.1g} nats, base {self.base_kl:.3g}: "
            f"{self.gap_closed:.0%} of the gap closed"
        )


@dataclass(frozen=True, repr=False)
class Adapter:
    """(h A) B^T + b with A = `down`, B = `up`, b = `shift`; `out` is d or V as `space` says.

    >>> from chassis_utils import Adapter, load
    >>> head = load("models/port-llama").head
    >>> Adapter.untouched(head)
    Adapter(edits nothing)
    """

    space: Space
    down: Float64[Tensor, "d rank"]
    up: Float64[Tensor, "out rank"]
    shift: Float64[Tensor, "out"]
    head_fingerprint: str  # of the head it belongs to
    intercept: Float64[Tensor, "vocab"] | None = None  # added to the head's product
    held_out: HeldOut | None = None  # as the fit found it

    @classmethod
    def untouched(cls, head: Head, rank: int = 0) -> "Adapter":
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
        """Numbers stored; rows of B whose factors and shift are zero (a token or a state left alone) are not."""
        rows = (self.up != 0).any(1) | (self.shift != 0)
        used = int(rows.sum()) if self.space == "vocabulary" else len(rows) * bool(rows.any())
        return self.down.numel() + used * (self.rank + 1) + (0 if self.intercept is None else len(self.intercept))

    @property
    def edits_nothing(self) -> bool:
        """Whether the base stays as it is."""
        constant = bool(self.shift.any()) or (self.intercept is not None and bool(self.intercept.any()))
        return not constant and not (bool(self.down.any()) and bool(self.up.any()))

    def __repr__(self) -> str:
        what = f"rank {self.rank}, {self.parameters:,} parameters"
        if self.edits_nothing:
            what = "edits nothing" + (": no fit was clearly better than the untouched base" if self.held_out else "")
        return f"Adapter({what}{f'; {self.held_out}' if self.held_out else ''})"

    def scaled(self, length: float) -> "Adapter":
        """The same edit, `length` times as large."""
        intercept = None if self.intercept is None else length * self.intercept
        return replace(self, up=length * self.up, shift=length * self.shift, intercept=intercept)

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
        """Write `adapter_config.json` and `adapter.safetensors`, factors in float32.

        Raises `OSError`, and leaves an adapter that was saved there before, where the folder cannot be written.
        """
        folder = Path(folder)
        tensors = {"down": self.down, "up": self.up, "shift": self.shift, "intercept": self.intercept}
        stored = {name: tensor.float().contiguous() for name, tensor in tensors.items() if tensor is not None}
        judged = {"held_out": asdict(self.held_out)} if self.held_out else {}
        config = {"format": FORMAT, "space": self.space, "rank": self.rank, "head": self.head_fingerprint, **judged}
        write_together({folder / WEIGHTS: save(stored), folder / CONFIG: json.dumps(config, indent=2) + "\n"})

    @classmethod
    def from_pretrained(cls, folder: str | Path, head: Head) -> "Adapter":
        """Read what `save_pretrained` wrote.

        Raises `ValueError` where a file is missing or damaged, the format is unknown, or `head` is not the one that
        the adapter was fitted to.
        """
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise ValueError(
                    f"{folder.name!r} holds no adapter, {name} is missing: name a folder that was saved to"
                )
        config = read_json(folder / CONFIG)
        if config.get("format", FORMAT) != FORMAT:
            raise ValueError(f"adapter {folder.name!r} has format {config['format']}, {FORMAT} is read: save it anew")
        try:
            tensors = load_file(folder / WEIGHTS)
            held_out = HeldOut(**config["held_out"]) if "held_out" in config else None
        except (SafetensorError, TypeError) as error:  # TypeError: `held_out` is no object of its four numbers
            raise _damaged(folder, str(error)) from None
        _check_content(folder, config, tensors, held_out)
        doubles = {name: tensor.double() for name, tensor in tensors.items()}
        adapter = cls(space=config["space"], head_fingerprint=config["head"], held_out=held_out, **doubles)
        adapter.check(head)
        return adapter

    def check(self, head: Head) -> None:
        """Raise `ValueError` for a head that the adapter was not fitted to, and factors that do not fit it."""
        if self.head_fingerprint != head.fingerprint:
            raise ValueError(
                f"this adapter was fitted to the head {self.head_fingerprint}, not to {head.fingerprint}: "
                "plug it into the base that it was made for, or fit it anew"
            )
        vocabulary, width = head.weight.shape
        out = width if self.space == "state" else vocabulary
        factors = [list(tensor.shape) for tensor in (self.down, self.up, self.shift)]
        fitting = [[width, self.rank], [out, self.rank], [out]]
        if factors != fitting or (self.intercept is not None and list(self.intercept.shape) != [vocabulary]):
            raise ValueError(
                f"down, up and shift of this adapter are {factors}, where its head takes {fitting} and an intercept "
                f"of {vocabulary}: save or fit it anew"
            )


def _check_content(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], held_out: HeldOut | None) -> None:
    """Raise `ValueError` where the two files do not make an adapter together."""
    lacking = sorted({"format", "space", "rank", "head"} - set(config))
    if lacking:
        raise _damaged(folder, f"{CONFIG} lacks {lacking[0]!r}")
    if config["space"] not in get_args(Space):
        raise _damaged(folder, f"its space is {config['space']!r}, neither {' nor '.join(get_args(Space))}")
    if held_out is not None and not all(isinstance(value, int | float) for value in asdict(held_out).values()):
        raise _damaged(folder, f"held_out holds {asdict(held_out)}")
    names = set(tensors)
    if names - {"intercept"} != {"down", "up", "shift"}:
        raise _damaged(folder, f"{WEIGHTS} holds {', '.join(sorted(names)) or 'nothing'}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.double()).all()):
            raise _damaged(folder, f"{name!r} holds {tensor.dtype}, or numbers that are not finite")
    rank = tensors["down"].shape[-1] if tensors["down"].ndim else 0
    if config["rank"] != rank or tensors["down"].ndim != 2:
        raise _damaged(folder, f"its rank is {config['rank']!r} and 'down' is {list(tensors['down'].shape)}")


def _damaged(folder: Path, reason: str) -> ValueError:
    return ValueError(f"adapter {folder.name!r} is damaged ({reason}): save or fit it anew")
