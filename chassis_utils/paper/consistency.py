"""Whether what is committed agrees with itself, without a run: a difference is an edit by hand, or half a set.

What stands beside a table follows from its CSV; what a notebook shows of a table are rows of that CSV; a picture in a
notebook is the file in `figures/`. Cost: milliseconds per file.
"""

import base64
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pandas as pd
from nbformat import NotebookNode

from chassis_utils.paper import tables
from chassis_utils.paper.agreement import texts_agree
from chassis_utils.paper.notebook import Notebook, numbered_notebooks

ROW, CELL = re.compile(r"<tr.*?>(.*?)</tr>", re.DOTALL), re.compile(r"<t[hd].*?>(.*?)</t[hd]>", re.DOTALL)


def disagreements(root: Path) -> list[str]:
    """What disagrees in all tables and notebooks of a repository, one line each."""
    shown = [line for path in numbered_notebooks(root) for line in notebook_disagreements(root, path)]
    return table_disagreements(root) + shown


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


def notebook_disagreements(root: Path, path: Path) -> list[str]:
    """Pictures that are not those in `figures/`, and rows of tables that are not those in `paper/tables/`."""
    found = []
    for cell in nbformat.read(path, as_version=4).cells:
        for name, output in pictures(path, cell):
            if base64.b64decode(output.data["image/png"]) != (root / "figures" / f"{name}.png").read_bytes():
                found.append(f"{path.name}: the picture in cell {cell.id} is not figures/{name}.png")
        for name, head, body in shown_tables(path, cell):
            stored = tables.readable(tables.read(root / "paper" / "tables" / f"{name}.csv"))
            wrong = [row[0] for row in body if set(head) <= set(stored) and not _is_row(row, stored[head])]
            found += [f"{path.name}: row {row} shown in cell {cell.id} is not that of {name}.csv" for row in wrong]
    return found


def pictures(path: Path, cell: NotebookNode) -> Iterator[tuple[str, NotebookNode]]:
    """The figures that a cell saves by name, and the outputs that show them."""
    if cell.cell_type == "code":
        shown = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        yield from zip(Notebook(path, [cell]).names_given_to("save_figure", 1), shown, strict=True)


def shown_tables(path: Path, cell: NotebookNode) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """The table that a cell saves, and what it shows: headers, and rows with their numbers in front.

    What it shows may be another frame, under other headers.
    """
    names = Notebook(path, [cell]).names_given_to("save_table", 1) if cell.cell_type == "code" else []
    for output in cell.outputs if names else []:
        rows = ROW.findall(output.get("data", {}).get("text/html", ""))
        if rows:
            head, *body = [[html.unescape(text).strip() for text in CELL.findall(row)] for row in rows]
            yield names[-1], head[1:], body


def _is_row(row: list[str], stored: pd.DataFrame) -> bool:
    number = int(row[0]) if row[0].isdecimal() else len(stored)
    return number < len(stored) and texts_agree(" | ".join(row[1:]), " | ".join(stored.iloc[number]))
