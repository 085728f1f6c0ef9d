"""What notebooks show of their tables and figures, against the files: a difference is an edit by hand, or half a set.

What a notebook shows of a table are rows of its CSV; a picture in a notebook is the file in `figures/`.
"""

import base64
import html
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pandas as pd
from nbformat import NotebookNode

from chassis_utils.paper import tables
from chassis_utils.paper.agreement import texts_agree
from chassis_utils.paper.consistency import pictures, table_disagreements
from chassis_utils.paper.notebook import Notebook, numbered_notebooks

ROW, CELL = re.compile(r"<tr.*?>(.*?)</tr>", re.DOTALL), re.compile(r"<t[hd].*?>(.*?)</t[hd]>", re.DOTALL)


def disagreements(root: Path) -> list[str]:
    """What disagrees in all tables and notebooks of a repository, one line each."""
    shown = [line for path in numbered_notebooks(root) for line in notebook_disagreements(root, path)]
    return table_disagreements(root) + shown


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
