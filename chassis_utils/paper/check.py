"""`make check`: what the last run of the notebooks says, against what is committed, table by table.

Each table is the same, within the tolerance of `paper.agreement`, or its first row that moved is shown; the printed
outputs of the notebooks are compared by the rule that nbval follows, without running them once more. What is committed
is compared with the list of its checksums, and with itself (`paper.consistency`). Exits with an error where anything
disagrees.
"""

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import nbformat
import pandas as pd
from nbformat import NotebookNode

from chassis_utils.files import BUILD, ROOT
from chassis_utils.paper import checksums
from chassis_utils.paper.agreement import table_differences, texts_agree
from chassis_utils.paper.consistency import table_disagreements
from chassis_utils.paper.notebook import DEFAULT_PROFILE, numbered_notebooks
from chassis_utils.paper.pipeline import finish_moves
from chassis_utils.paper.plan import Step, plan

IGNORED = "nbval-ignore-output"  # the tag of cells that show measured times
TEXTS = ("text/plain", "text/html", "text/markdown", "text/latex")


def main() -> None:
    """Compare all that the last run made, and what is committed with itself."""
    finish_moves(ROOT)
    profile = os.environ.get("PROFILE", DEFAULT_PROFILE)
    lines = [line for step in plan(ROOT, profile) for line in _tables(step)]
    executed = BUILD / profile / "notebooks"
    stored = numbered_notebooks(ROOT) if profile == DEFAULT_PROFILE else []  # of other profiles no outputs are
    for path in stored:
        differences = output_differences(executed / path.name, path)
        lines += [(path.name, "outputs " + ("moved: " + "; ".join(differences) if differences else "agree"))]
    lines += [(name, "moved: it is not what a run has put in place") for name in checksums.altered(ROOT)]
    # of tables alone: pictures of times may have been drawn anew by the run
    lines += [("committed results", f"moved: {line}") for line in table_disagreements(ROOT)]
    for name, verdict in lines:
        print(f"{name:<34}{verdict}")
    moved = sum("moved" in verdict for _, verdict in lines)
    if moved:
        sys.exit(f"{moved} of {len(lines)} comparisons with what is committed moved by more than the tolerance")


def output_differences(new: Path, stored: Path) -> list[str]:
    """What the outputs of a run disagree in with the stored ones, one line each."""
    if not new.exists():
        return ["it was not run: run `make paper`"]
    ours, theirs = (code_cells(nbformat.read(path, as_version=4)) for path in (new, stored))
    if [cell.source for cell in ours] != [cell.source for cell in theirs]:
        return ["the run is of other code than the notebook's: run `make paper`"]
    differences = []
    for one, other in zip(ours, theirs, strict=True):
        if IGNORED not in other["metadata"].get("tags", []) and not same_outputs(one, other):
            differences.append(f"{other['id']} shows {shown(one)} instead of {shown(other)}"[:2000])
    return differences


def same_outputs(new: NotebookNode, stored: NotebookNode) -> bool:
    """Whether two cells show the same: decimals within the tolerance, pictures by presence."""
    texts, expected = shown(new), shown(stored)
    same = [kind for kind, _ in texts] == [kind for kind, _ in expected]
    return same and all(texts_agree(a, b) for (_, a), (_, b) in zip(texts, expected, strict=True))


def shown(cell: NotebookNode) -> list[tuple[str, str]]:
    """What a cell shows, by kind; of pictures that they are there. Lines printed together may come in pieces."""
    parts: list[tuple[str, str]] = []
    for output in cell["outputs"]:
        if "text" in output:
            kind, text = output["name"], output["text"]
            if parts and parts[-1][0] == kind:
                text = parts.pop()[1] + text
            parts.append((kind, text))
        parts += [(kind, data if kind in TEXTS else "") for kind, data in output.get("data", {}).items()]
    return parts


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells that the author wrote, without the one that papermill injects."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in cells if "injected-parameters" not in cell.metadata.get("tags", [])]


def _tables(step: Step) -> list[tuple[str, str]]:
    """A line for each table of a notebook."""
    lines = []
    for product in (path for path in step.writes if path.suffix == ".csv"):
        committed = _committed(product.relative_to(ROOT).as_posix())
        if not step.staged(product).exists() or committed is None:
            missing = "committed" if committed is None else "made by a run"
            lines.append((product.name, f"moved: it is not {missing}"))
            continue
        new, stored = pd.read_csv(step.staged(product)), pd.read_csv(StringIO(committed))
        differences = table_differences(new, stored)
        same = "same" if new.equals(stored) else "within tolerance"
        lines.append((product.name, "moved: " + "; ".join(differences) if differences else same))
    return lines


def _committed(path: str) -> str | None:
    command = ["git", "show", f"HEAD:{path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


if __name__ == "__main__":
    main()
