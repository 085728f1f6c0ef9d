"""Compare the outputs of the notebooks that papermill has run with the committed ones, by the rule that nbval follows.

`make paper` has just executed every notebook; running each of them once more to compare its outputs would double the
checks' time. Cells whose outputs are measured times are tagged `nbval-ignore-output`, as for nbval itself.
"""

import runpy
import sys
from pathlib import Path

import nbformat

from chassis_utils.files import BUILD, ROOT

code_cells = runpy.run_path(str(ROOT / "notebooks" / "refresh.py"))["code_cells"]
agree = runpy.run_path(str(ROOT / "notebooks" / "conftest.py"))["agree"]  # `conftest` is the name of two modules
IGNORED = "nbval-ignore-output"
TEXTS = ("text/plain", "text/html", "text/markdown", "text/latex")


def shown(cell: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """What a cell shows, by kind; of pictures that they are there. Lines printed together may come in pieces."""
    found: list[tuple[str, str]] = []
    for output in cell["outputs"]:
        if "text" in output:
            kind, text = output["name"], output["text"]
            if found and found[-1][0] == kind:
                text = found.pop()[1] + text
            found.append((kind, text))
        found += [(kind, data if kind in TEXTS else "") for kind, data in output.get("data", {}).items()]
    return found


def differences(new: Path, stored: Path) -> list[str]:
    """What disagrees, one line each."""
    ours, theirs = (code_cells(nbformat.read(path, as_version=4)) for path in (new, stored))
    if [cell.source for cell in ours] != [cell.source for cell in theirs]:
        return [f"{stored.name}: the run is of other code than the notebook's: run `make paper`"]
    found = []
    for one, other in zip(ours, theirs, strict=True):
        if IGNORED in other["metadata"].get("tags", []):
            continue
        texts, expected = shown(one), shown(other)
        same = [kind for kind, _ in texts] == [kind for kind, _ in expected]
        if not same or not all(agree(a, b) for (_, a), (_, b) in zip(texts, expected, strict=True)):
            found.append(f"{stored.name}: {other['id']} shows {texts} instead of {expected}"[:2000])
    return found


def main() -> None:
    """Compare every notebook."""
    stored = sorted((ROOT / "notebooks").glob("*.ipynb"))
    failures = [line for path in stored for line in differences(BUILD / "micro" / "notebooks" / path.name, path)]
    print(f"outputs of {len(stored)} notebooks compared with the committed ones")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
