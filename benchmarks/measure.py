"""What the benchmarks share: a call in a process of its own, and rows on standard output.

A process of its own begins without what another peer has left in memory, so its peak is that peer's alone. Rows are
printed as JSON, one a line; notebook 70 runs every script of this folder and puts the rows into one table.
"""

import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch

MIB = 2**20


@dataclass
class Clock:
    """Seconds spent inside `with clock.running()`: what is measured, and not what it is measured on."""

    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count this block."""
        begin = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begin


def apart(peer: Callable[..., Mapping[str, Any]], threads: int, *arguments: Any) -> dict[str, Any]:
    """The figures that `peer` returns from a fresh process of so many threads, and `peak_mib`.

    The peak is that of the process above what it held when the call began (the interpreter and its libraries).
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measured, peer, threads, arguments).result()


def _measured(peer: Callable[..., Mapping[str, Any]], threads: int, arguments: tuple[Any, ...]) -> dict[str, Any]:
    torch.set_num_threads(threads)
    before = psutil.Process().memory_info().rss
    figures = peer(*arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB, on Linux
    return {**figures, "peak_mib": (peak - before) / MIB}


def report(benchmark: str, peer: str, against: float | None = None, **figures: Any) -> None:
    """Print one row; `against` are the seconds of the peer that this one is compared with."""
    row = {"benchmark": benchmark, "peer": peer, **figures}
    if against is not None:
        row["speedup"] = against / figures["seconds"]
    print(json.dumps(row), flush=True)
