"""Times of calls, taken in turn.

A machine that slows down, slows all calls of a round alike, so that ratios of medians hold where
single times do not. A call in turn with others finds the caches cold, as a layer does in a model;
of several in a row all but the first find them warm. Whoever measures sets the number of threads and says it.
"""

import time
from collections.abc import Callable, Mapping
from statistics import median


def median_seconds(calls: Mapping[str, Callable[[], object]], rounds: int = 7, repeat: int = 1) -> dict[str, float]:
    """Median seconds of a call over `rounds` rounds, `repeat` in a row each round; the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(repeat):
                call()
            seconds[name].append((time.perf_counter() - begin) / repeat)
    return {name: median(times[1:]) for name, times in seconds.items()}
