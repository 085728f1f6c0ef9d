"""What the benchmarks share: a call in a process of its own, the clock, and the form of a row.

A process of its own begins without what another peer has left in memory, so its peak is that peer's alone. Each script
of this folder is a command that prints its rows as JSON, one a line; notebook 51 puts those of all into one table.
"""

import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch

MIB = 2**20
Row = dict[str, Any]


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


def apart(peer: Callable[..., Mapping[str, Any]], threads: int, *arguments: Any) -> Row:
    """The figures that `peer` returns from a fresh process of so many threads, and `peak_mib`.

    The peak is that of the process above what it held when the call began (the interpreter and its libraries).
    """
    context = multiprocessing.get_context("forkserver")  # imports once what all of its children need
    context.set_forkserver_preload(["torch", "chassis_utils.adapters.fit", "chassis_utils.text.prompts"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measured, peer, threads, arguments).result()


def _measured(peer: Callable[..., Mapping[str, Any]], threads: int, arguments: tuple[Any, ...]) -> Row:
    torch.set_num_threads(threads)
    before = psutil.Process().memory_info().rss
    figures = peer(*arguments)
    return {**figures, "peak_mib": (peak() - before) / MIB}


def peak() -> int:
    """The most bytes that this process has held (the system counts KiB on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def row(benchmark: str, peer: str, against: float | None = None, **figures: Any) -> Row:
    """One row of the table; `against` are the seconds of the peer that this one is compared with."""
    ratio = {} if against is None else {"speedup": against / figures["seconds"]}
    return {"benchmark": benchmark, "peer": peer, **figures, **ratio}


def print_rows(measured: Callable[[Sequence[str]], Iterator[Row]]) -> None:
    """Print the rows of a script as they come."""
    for found in measured(sys.argv[1:]):
        print(json.dumps(found), flush=True)
