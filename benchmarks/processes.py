"""Moments of the lenses of all layers, read by one process and by two that share the texts.

    python benchmarks/processes.py --base models/port-llama

Processes of one thread each, joined by `torch.distributed` (gloo), as `torchrun` starts them. Each reads its share of
the texts in one pass for all layers and adds its sums to those of the others; nothing of the size of the number of
texts is held. Seconds are from the loaded model to the merged moments; `difference` is the largest one between any
moment and that of one process, relative to the largest entry of its kind.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import MIB, Row, peak, print_rows, row
from torch import distributed, multiprocessing

from chassis_utils.adapters.lens import read_moments
from chassis_utils.linalg.moments import Moments
from chassis_utils.lm.model import load
from chassis_utils.text import prompts


def read(process: int, count: int, base: str, samples: int, rounds: int, folder: str) -> None:
    """Read the share of one process; the first one stores the median of the rounds' seconds, and the sums."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/joined-{count}", rank=process, world_size=count)
    model = load(base, device="cpu")
    chosen = prompts.take("natural", "document", "train", samples)
    texts, folds = prompts.texts(chosen), prompts.fold_numbers(chosen)
    seconds = []
    for _ in range(rounds):
        distributed.barrier()
        begin = time.perf_counter()
        moments = read_moments(model, model, texts, folds)
        seconds.append(time.perf_counter() - begin)
    if process == 0:
        figures = {"seconds": median(seconds), "peak_mib": peak() / MIB, "moments": moments}
        torch.save(figures, Path(folder, str(count)))
    distributed.barrier()
    distributed.destroy_process_group()


def difference(ours: list[list[Moments]], theirs: list[list[Moments]]) -> float:
    """The largest difference of any moment, relative to the largest entry of its kind."""
    pairs = [(a, b) for layer in zip(ours, theirs, strict=True) for a, b in zip(*layer, strict=True)]
    kinds = ("n", "x_sum", "y_sum", "xx", "xy", "yy")
    off = [
        (getattr(a, kind) - getattr(b, kind)).abs().max() / getattr(b, kind).abs().max()
        for a, b in pairs
        for kind in kinds
    ]
    return float(torch.stack(off).max())


def measured(arguments: Sequence[str]) -> Iterator[Row]:
    """The rows, for these arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="models/port-llama")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    found: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2):
            shared = options.base, options.samples, options.rounds, folder
            multiprocessing.start_processes(read, (count, *shared), nprocs=count, start_method="forkserver")
            found[count] = torch.load(Path(folder, str(count)), weights_only=False)
    alone = found[1].pop("moments")
    for count, figures in found.items():
        off = difference(figures.pop("moments", alone), alone)
        keys = {"samples": options.samples, "threads": count, "difference": off}
        yield row(
            "processes", "1 process" if count == 1 else f"{count} processes", found[1]["seconds"], **figures, **keys
        )


if __name__ == "__main__":
    print_rows(measured)
