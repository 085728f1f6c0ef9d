"""Store the outputs of the last micro run in the notebooks: `make refresh` runs this after the pipeline.

Sources, texts and cell ids stay as they are; outputs are replaced and execution metadata is dropped.
"""

from pathlib import Path

import nbformat
from nbformat import NotebookNode

from chassis_utils.files import BUILD, ROOT, write_atomically
from chassis_utils.paper.pipeline import DEFAULT_PROFILE

LANGUAGE = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def refresh(path: Path, executed: Path) -> None:
    """Copy the outputs of `executed` to the notebook at `path`."""
    notebook, run = nbformat.read(path, as_version=4), nbformat.read(executed, as_version=4)
    pairs = zip(code_cells(notebook), code_cells(run), strict=True)
    for count, (cell, done) in enumerate(pairs, start=1):
        if cell.source != done.source:
            raise ValueError(f"{path.name} has changed since it was run: run `make paper` and refresh again")
        cell.execution_count, cell.outputs = count, done.outputs
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
    notebook.metadata = LANGUAGE
    write_atomically(path, nbformat.writes(notebook) + "\n")


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells that the author wrote, without the one that papermill injects."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in cells if "injected-parameters" not in cell.metadata.get("tags", [])]


if __name__ == "__main__":
    for source in sorted((ROOT / "notebooks").glob("*.ipynb")):
        refresh(source, BUILD / DEFAULT_PROFILE / "notebooks" / source.name)
