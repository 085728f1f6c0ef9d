"""Keeps runs by hand out of the history: `python notebooks/tidy.py notebooks/*.ipynb`, and a hook of pre-commit.

Code, text and outputs stay. Times of a run, versions of the kernel, folded cells and views of widgets are dropped.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat

from chassis_utils.files import write_atomically
from chassis_utils.paper.refresh import tidy


def main(names: Sequence[str]) -> None:
    """Tidy these notebooks, and say which of them have changed by it."""
    for path in map(Path, names):
        stored = path.read_text(encoding="utf-8")
        notebook = nbformat.reads(stored, as_version=4)
        tidy(notebook)
        tidied = nbformat.writes(notebook) + "\n"
        if tidied != stored:
            write_atomically(path, tidied)
            print(f"tidied {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
