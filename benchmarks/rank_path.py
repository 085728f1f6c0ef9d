"""Adapters of every rank from one decomposition, against one solve of the study's kind.

    python benchmarks/rank_path.py --width 2048 --vocabulary 32000 --samples 4096

`one solve` is what the study does for a single map: Gram matrix, products with the logits of all samples, and one
system of d unknowns against V columns, in float32. `one rank` is reduced-rank regression in hidden coordinates, in
float64, asked for one rank; `every rank` the same, and the adapters of all ranks made from it. All begin at the same
states and end at weights that can be applied.
"""

import argparse
from collections.abc import Iterator, Sequence

import torch
from lenses import World
from measure import Row, print_rows, row
from scripts import ridge

from chassis_utils.as_reported.adapters import RIDGE
from chassis_utils.linalg.moments import Moments
from chassis_utils.linalg.regression import reduced_rank, vocabulary_metric
from chassis_utils.timing import median_seconds


def measured(arguments: Sequence[str]) -> Iterator[Row]:
    """The rows, for these arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"width": 2048, "vocabulary": 32000, "samples": 4096, "threads": 1, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    world = World(options.width, options.vocabulary, options.samples, layers=2)
    h, target, head = world.states(1), world.target(), world.head
    logits, metric = head(target), vocabulary_metric(head.weight, head.mean_probabilities(target))

    def path(ranks: list[int]) -> object:
        solved = reduced_rank(Moments.of(h, target - h), RIDGE, metric)
        return [(solved.left[:, :rank], solved.right[:, :rank], solved.at(rank).bias) for rank in ranks]

    every = sorted({min(world.width, 2**k) for k in range(world.width.bit_length() + 1)})
    calls = {
        "one solve": lambda: ridge(h, logits),
        "one rank": lambda: path(every[-1:]),
        "every rank": lambda: path(every),
    }
    seconds = median_seconds(calls, options.rounds)
    sizes = {"width": world.width, "vocabulary": world.vocabulary, "samples": world.samples}
    for peer, taken in seconds.items():
        yield row("rank path", peer, seconds["one solve"], seconds=taken, threads=options.threads, **sizes)


if __name__ == "__main__":
    print_rows(measured)
