"""The lenses of all layers: a transcription of the CHASSIS study's script against the closed form of this package.

    python benchmarks/lenses.py --width 2048 --vocabulary 32000 --samples 4096 --layers 23

Both see the same states, drawn with the spectrum of a language model's (eigenvalues falling as k^-1.5), and the same
synthetic expert; the forward passes, which the study's scripts make anew for each step, are left out, to the scripts'
advantage. The script solves a d x d system against all columns of the vocabulary, in float32, from stored logits; the
package solves it against the d coordinates of the expert's state, in float64, from moments. `chosen` is the package's
default, with the penalty of each layer chosen on five folds. Seconds are those of fitting; KL is the mean over the
layers on samples that no fit saw. With `--growth` the rows say instead what is left of the seconds when each size is
halved in turn, beside what the number of multiplications foretells (`script_work`, `closed_form_work`).
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from measure import Clock, Row, apart, print_rows, row
from scripts import ridge
from torch import Tensor

from chassis_utils.adapters.lens import fit_lens, lens_moments
from chassis_utils.as_reported.adapters import RIDGE
from chassis_utils.lm.model import Head
from chassis_utils.metrics import kl_divergence

DECAY = 0.75  # of the states' standard deviations with the number of their coordinate
RANK, EDIT = 64, 0.02  # of the synthetic expert: its rank, and the size of its entries
TESTED = 512  # samples that no lens is fitted to
FOLDS = 5
ROWS = 64  # whose logits are held at a time


@dataclass(frozen=True)
class World:
    """States of every layer of an imagined model, its head, and an expert; the sizes alone decide them."""

    width: int
    vocabulary: int
    samples: int
    layers: int  # the embeddings count as one

    @cached_property
    def head(self) -> Head:
        """Logits of a spread that language models have."""
        rows = torch.randn(self.vocabulary, self.width, generator=_seeded(0))
        return Head(rows.mul_(3 / float(self._scales.norm())))

    @cached_property
    def _scales(self) -> Tensor:
        scales = torch.arange(1, self.width + 1) ** -DECAY
        return scales * (self.width / scales.square().sum()).sqrt()

    def states(self, layer: int, test: bool = False) -> Tensor:
        """States [n, width] of one layer: the last ones, seen the less the earlier the layer."""
        count, share = TESTED if test else self.samples, (layer + 1) / self.layers
        last, own = (torch.randn(count, self.width, generator=_seeded(2 * k + test + 1)) for k in (0, layer + 1))
        return (share**0.5 * last + (1 - share) ** 0.5 * own) * self._scales

    def target(self, test: bool = False) -> Tensor:
        """The expert's last states: the base's, edited."""
        h = self.states(self.layers - 1, test)
        u, v = torch.randn(2, self.width, min(RANK, self.width), generator=_seeded(10**6)) * EDIT
        return h + (h @ u) @ v.T


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def script(world: World) -> Mapping[str, Any]:
    """The study's: states of all layers and logits of all samples held, float32, one solve for each layer."""
    states = [world.states(layer) for layer in range(world.layers)]
    logits = world.head(world.target())
    clock, divergences = Clock(), []
    for layer, h in enumerate(states):
        with clock.running():
            weight, bias = ridge(h, logits)
        divergences.append(_held_out_kl(world, layer, partial(torch.addmm, bias, mat2=weight)))
    return {"seconds": clock.seconds, "held_out_kl": sum(divergences) / len(divergences)}


def closed_form(world: World, penalty: float | None) -> Mapping[str, Any]:
    """The package's: one layer at a time, its states forgotten once its moments are known."""
    target = world.target()
    folds = [k % FOLDS for k in range(world.samples)] if penalty is None else [0] * world.samples
    clock, divergences, yy = Clock(), [], None
    for layer in range(world.layers):
        h = world.states(layer)
        with clock.running():
            moments = lens_moments(h, target, folds, yy=yy)
            del h
            lens = fit_lens(moments, penalty=penalty)
        yy = [part.yy for part in moments]  # the targets are those of every layer
        del moments
        divergences.append(_held_out_kl(world, layer, partial(lens.logits, head=world.head)))
    return {"seconds": clock.seconds, "held_out_kl": sum(divergences) / len(divergences)}


def _held_out_kl(world: World, layer: int, logits: Callable[[Tensor], Tensor]) -> float:
    """The mean over the samples that no lens is fitted to, a few at a time, whose states `logits` reads."""
    pairs = zip(world.target(test=True).split(ROWS), world.states(layer, test=True).split(ROWS), strict=True)
    found = [kl_divergence(world.head(wanted), logits(h)) for wanted, h in pairs]
    return float(torch.cat(found).mean())


def script_work(world: World) -> float:
    """Multiplications of the script: Gram matrix, products with all columns, decomposition, solution."""
    n, d, v = world.samples, world.width, world.vocabulary
    return world.layers * (n * d**2 + n * d * v + d**3 / 3 + d**2 * v)


def closed_form_work(world: World) -> float:
    """Those of the package: half a Gram matrix, products with the targets, Cholesky, solution; once, the targets'."""
    n, d = world.samples, world.width
    return world.layers * (n * d**2 / 2 + n * d**2 + d**3 / 6 + d**3) + n * d**2 / 2


def growth(world: World, threads: int) -> Iterator[Row]:
    """The rows of each size halved in turn: shares of the seconds, and of the multiplications, at the given sizes."""
    peers = {"study's script": (script, (), script_work), "closed form": (closed_form, (RIDGE,), closed_form_work)}
    for peer, (call, more, work) in peers.items():
        whole = apart(call, threads, world, *more)["seconds"]
        for name, value in asdict(world).items():
            half = replace(world, **{name: max(2, value // 2)})
            seconds = apart(call, threads, half, *more)["seconds"]
            shares = {"share_of_seconds": seconds / whole, "share_of_work": work(half) / work(world)}
            yield row("growth", peer, seconds=seconds, halved=name, **asdict(half), threads=threads, **shares)


def compare(world: World, threads: int, chosen: bool) -> Iterator[Row]:
    """The rows of one size."""
    sizes = {**asdict(world), "threads": threads}
    theirs = apart(script, threads, world)
    yield row("lenses", "study's script", theirs["seconds"], **sizes, **theirs)
    for peer, penalty in {"closed form": RIDGE, "closed form, penalty chosen": None}.items():
        if penalty is not None or chosen:
            yield row("lenses", peer, theirs["seconds"], **sizes, **apart(closed_form, threads, world, penalty))


def measured(arguments: Sequence[str]) -> Iterator[Row]:
    """The rows, for these arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"width": 2048, "vocabulary": 32000, "samples": 4096, "layers": 23, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--growth", action="store_true", help="instead, how seconds fall as each size is halved")
    parser.add_argument("--fixed", action="store_true", help="without choosing penalties")
    given = vars(parser.parse_args(arguments))
    halved, fixed, threads = given.pop("growth"), given.pop("fixed"), given.pop("threads")
    world = World(**given)
    yield from growth(world, threads) if halved else compare(world, threads, chosen=not fixed)


if __name__ == "__main__":
    print_rows(measured)
