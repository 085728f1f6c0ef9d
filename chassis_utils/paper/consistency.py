"""Whether what is committed agrees with itself, without a run: a difference is an edit by hand, or half a set.

What stands beside a table follows from its CSV, and a picture in a notebook is a file in `figures/`. Cost: milliseconds
per file.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from nbformat import NotebookNode

from chassis_utils.paper import tables
from chassis_utils.paper.notebook import Notebook


def table_disagreements(root: Path) -> list[str]:
    """The files beside the tables' CSVs that are not what these give."""
    return [line for csv in sorted((root / "paper" / "tables").rglob("*.csv")) for line in _not_of(csv)]


def _not_of(csv: Path) -> list[str]:
    results = tables.read(csv).drop(columns="profile")
    expected = tables.derived(results)
    found = [end for end, text in expected.items() if csv.with_suffix(end).read_text(encoding="utf-8") != text]
    provenance = json.loads(csv.with_suffix(".json").read_text(encoding="utf-8"))
    found += [".json"] if provenance["headers"] != tables.headers(results) else []
    return [f"{csv.stem}{end} does not follow from {csv.name}" for end in found]


def pictures(path: Path, cell: NotebookNode) -> Iterator[tuple[str, NotebookNode]]:
    """The figures that a cell saves by name, and the outputs that show them."""
    if cell.cell_type == "code":
        shown = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        yield from zip(Notebook(path, [cell]).names_given_to("save_figure", 1), shown, strict=True)
