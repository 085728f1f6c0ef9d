"""`make refresh`: the outputs of the last run stored in the notebooks.

Sources, texts and cell ids stay as they are; outputs are replaced where they show something else than the stored ones
(`paper.check.same_outputs`), pictures are those in `figures/`, and execution metadata is dropped.
"""

import base64
from pathlib import Path

import nbformat

from chassis_utils.files import BUILD, ROOT, write_atomically
from chassis_utils.paper import checksums
from chassis_utils.paper.check import code_cells, same_outputs
from chassis_utils.paper.consistency import pictures
from chassis_utils.paper.notebook import DEFAULT_PROFILE, numbered_notebooks
from chassis_utils.paper.pipeline import finish_moves

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
LANGUAGE = {"kernelspec": KERNEL, "language_info": {"name": "python"}}


def refresh(path: Path, executed: Path) -> None:
    """Copy the new outputs of `executed` to the notebook at `path`; `ValueError` for a run of other code."""
    notebook, run = nbformat.read(path, as_version=4), nbformat.read(executed, as_version=4)
    outputs_stay = all(map(same_outputs, code_cells(run), code_cells(notebook)))
    for count, (cell, done) in enumerate(zip(code_cells(notebook), code_cells(run), strict=True), start=1):
        if cell.source != done.source:
            raise ValueError(f"{path.name} has changed since it was run: run `make paper` and refresh again")
        cell.execution_count = count
        if not outputs_stay:
            cell.outputs = done.outputs
        for name, output in pictures(path, cell):
            figure = (path.parent.parent / "figures" / f"{name}.png").read_bytes()
            output.data["image/png"] = base64.b64encode(figure).decode()
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
    tidy(notebook)
    write_atomically(path, nbformat.writes(notebook) + "\n")


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Drop the metadata of a run, and the views of widgets, whose state is not stored."""
    for cell in code_cells(notebook):
        cell.outputs = [o for o in cell.outputs if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
    notebook.metadata = LANGUAGE


if __name__ == "__main__":
    finish_moves(ROOT)
    for source in numbered_notebooks(ROOT):
        refresh(source, BUILD / DEFAULT_PROFILE / "notebooks" / source.name)
    checksums.record(ROOT, numbered_notebooks(ROOT))
