"""Whether the machine has the room that a step needs, asked before the step begins."""

import math
import shutil
from pathlib import Path

import psutil

SPARE = 1.2  # room asked for, times the size of what is stored or held


def require_memory(size: int, purpose: str, remedy: str) -> None:
    """Raise `MemoryError` unless `size` bytes and a reserve are available."""
    _require(size, psutil.virtual_memory().available, MemoryError, f"of memory for {purpose}", remedy)


def require_disk(size: int, folder: Path, purpose: str) -> None:
    """Raise `OSError` unless `size` bytes and a reserve are free where `folder` lies."""
    folder.mkdir(parents=True, exist_ok=True)
    free, remedy = shutil.disk_usage(folder).free, "remove build/cache or use fewer prompts"
    _require(size, free, OSError, f"of disk for {purpose}", remedy)


def _require(size: int, free: int, error: type[OSError | MemoryError], what: str, remedy: str) -> None:
    if free < size * SPARE:
        needed, there = (f"{math.ceil(amount / 2**20):,} MiB" for amount in (size * SPARE, free))
        raise error(f"{needed} {what} are needed, {there} are free: {remedy}")
