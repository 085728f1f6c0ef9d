"""Times of calls, taken in turn.

A machine that slows down, slows all calls of a round alike, so that ratios of medians hold where
single times do not. Whoever measures sets the number of threads and says it.
"""

import time
from collections.abc import Callable, Mapping
from statistics import median


def median_seconds(calls: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Median seconds of each call over `rounds` rounds, each call once a round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    return {name: median(found[1:]) for name, found in seconds.items()}
