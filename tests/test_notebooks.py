"""Static checks of every notebook, each proved able to fail."""

import ast
import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output

from chassis_utils.files import ROOT
from chassis_utils.paper.notebook import Notebook, PlanError, numbered_notebooks
from chassis_utils.paper.plan import plan
from chassis_utils.paper.refresh import refresh

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RESULTS = numbered_notebooks(ROOT)  # the others are a map and a place to play: no part of a run of the paper
LONGEST, TYPICAL = 25, 6  # lines of a code cell: at most, and in the median
WORDLESS = 0.3  # share of code cells that may directly follow another
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<~})])/[a-z]\w*/[\w.-]+|\b[A-Z]:\\\w")
DATE = re.compile(r"\b20\d\d-[01]\d-[0-3]\d\b|\b[0-2]\d:[0-5]\d:[0-5]\d\b")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def problems(notebook: NotebookNode, result: bool = True) -> list[str]:
    """What keeps a notebook from being run, checked and read as the others are; empty for a good one.

    One that writes no result needs no parameters.
    """
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [
        *(_parameter_problems(cells) if result else []),
        *_cell_problems(cells),
        *(problem for cell in cells for output in cell.outputs for problem in _output_problems(output)),
        *_metadata_problems(notebook),
    ]


def _parameter_problems(cells: list[NotebookNode]) -> list[str]:
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        return [f"{len(tagged)} cells are tagged parameters"]
    lines = tagged[0].source.splitlines()
    ends = [lines[line.end_lineno - 1][line.end_col_offset :] for line in ast.parse(tagged[0].source).body]
    return [f"a parameter has no comment: {ends!r}"] if any("#" not in end for end in ends) else []


def _cell_problems(cells: list[NotebookNode]) -> list[str]:
    if not cells:
        return []
    found = []
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("cells were not run once each, in order")
    if not any(cell.outputs for cell in cells):
        found.append("no output is stored")
    lengths = [len(cell.source.splitlines()) for cell in cells]
    if max(lengths) > LONGEST or median(lengths) > TYPICAL:
        found.append(f"cells are long: {max(lengths)} lines at most, {median(lengths)} in the median")
    found += [f"magic line: {line}" for cell in cells for line in re.findall(r"(?m)^\s*([!%].*)", cell.source)]
    found += [f"absolute path: {cell.source}" for cell in cells if ABSOLUTE_PATH.search(cell.source)]
    return found


def _output_problems(output: NotebookNode) -> list[str]:
    data = {**output.get("data", {}), "text": output.get("text", "")}
    texts = [str(value) for kind, value in data.items() if not kind.startswith("image/")]
    found = [f"path in an output: {text}" for text in texts if ABSOLUTE_PATH.search(text)]
    found += [f"date in an output: {text}" for text in texts if DATE.search(text)]
    return found + (["an error is stored"] if output.output_type == "error" else [])


def _metadata_problems(notebook: NotebookNode) -> list[str]:
    left = {key for cell in notebook.cells for key in cell.metadata} - {"tags"}
    found = [f"metadata of a run in a cell: {sorted(left)}"] if left else []
    return found + (["metadata of a run in the notebook"] if notebook.metadata != METADATA else [])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook, version=4, version_minor=5)
    assert problems(notebook, result=path in RESULTS) == []


def test_a_result_begins_with_two_digits_and_nothing_else_is_run_for_the_paper() -> None:
    assert [path.stem for path in NOTEBOOKS if not re.match(r"\d\d_", path.stem)] == ["explore", "index"]
    assert [step.notebook for step in plan(ROOT, "micro")] == RESULTS == NOTEBOOKS[: len(RESULTS)]


def test_the_map_leads_to_every_notebook_and_nowhere_else() -> None:
    folder = ROOT / "notebooks"
    text = "\n".join(cell.source for cell in nbformat.read(folder / "index.ipynb", as_version=4).cells)
    places = re.findall(r"\]\((.*?)\)|(?:href|src)=\"(.*?)\"", text)
    named = {(folder / (link or attribute)).resolve() for link, attribute in places}
    assert [path for path in named if not path.is_file()] == []
    assert {path for path in named if path.suffix == ".ipynb"} == {*NOTEBOOKS} - {folder / "index.ipynb"}


def test_a_reader_gets_a_word_between_cells_of_code() -> None:
    kinds = [[cell.cell_type for cell in nbformat.read(path, as_version=4).cells] for path in NOTEBOOKS]
    pairs = [pair for row in kinds for pair in itertools.pairwise(row)]
    directly = sum(pair == ("code", "code") for pair in pairs)
    assert directly <= WORDLESS * sum(row.count("code") for row in kinds)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_parameters_are_typed_literals(path: Path) -> None:
    assert Notebook.read(path).parameters


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_measured_is_asked_whether_it_is_held_out(path: Path) -> None:
    code = Notebook.read(path).code
    if "Reference(" in code or "patched_row(" in code:
        assert "prompts.groups(" in code  # which refuses training prompts


@pytest.mark.parametrize("profile", ["micro", "real", "original"])
def test_profile_fits_the_notebooks(profile: str) -> None:
    if profile == "real" and not (ROOT / "build" / "models" / "gemma-3-270m" / "config.json").is_file():
        with pytest.raises(PlanError, match=r"'build/models/.*', run `make models` first"):
            plan(ROOT, profile)
    else:
        assert len(plan(ROOT, profile)) == len(RESULTS)


def good_notebook() -> NotebookNode:
    """A small notebook without problems."""
    cells = [
        new_code_cell("size: int = 1  # how many", execution_count=1, metadata={"tags": ["parameters"]}),
        new_code_cell("print(size)", execution_count=2, outputs=[new_output("stream", name="stdout", text="1\n")]),
    ]
    return new_notebook(cells=cells, metadata=METADATA)


def _set_source(source: str, cell: int = 1) -> Callable[[NotebookNode], None]:
    return lambda notebook: notebook.cells[cell].update(source=source)


def _set_output(text: str) -> Callable[[NotebookNode], None]:
    return lambda notebook: notebook.cells[1].outputs[0].update(text=text)


BAD = {
    "0 cells are tagged parameters": lambda notebook: notebook.cells[0].metadata.clear(),
    "a parameter has no comment": _set_source("size: int = 1  # how many\nrank: int = 2", cell=0),
    "cells were not run": lambda notebook: notebook.cells[1].update(execution_count=None),
    "no output is stored": lambda notebook: notebook.cells[1].update(outputs=[]),
    "magic line": _set_source("%matplotlib inline"),
    "magic line: !": _set_source("if size:\n    !ls"),
    "path in an output": _set_output("read /home/me/model"),
    "date in an output: on": _set_output("on 2026-01-31"),
    "date in an output: at": _set_output("at 12:34:56"),
    "an error is stored": lambda notebook: notebook.cells[1].outputs.append(new_output("error", ename="E", evalue="")),
    "cells are long: 26": _set_source("\n".join(["size"] * (LONGEST + 1))),
    "cells are long: 12": _set_source("\n".join(["size"] * 2 * TYPICAL)),
    "absolute path": _set_source("open('/home/me/model')"),
    "metadata of a run in a cell": lambda notebook: notebook.cells[1].metadata.update(execution={}),
    "metadata of a run in the notebook": lambda notebook: notebook.metadata.update(papermill={}),
}


def test_good_notebook_has_no_problem() -> None:
    assert problems(good_notebook()) == []


@pytest.mark.parametrize("problem", BAD)
def test_bad_notebook_is_found(problem: str) -> None:
    notebook = good_notebook()
    BAD[problem](notebook)
    assert any(found.startswith(problem) for found in problems(notebook))


@pytest.mark.parametrize("line", ["size = 1  # how many", "size: int = max(1, 2)  # how many"])
def test_untyped_or_computed_parameter_is_refused(line: str, tmp_path: Path) -> None:
    notebook = good_notebook()
    notebook.cells[0].source = line
    nbformat.write(notebook, tmp_path / "bad.ipynb")
    with pytest.raises(PlanError, match="size"):
        _ = Notebook.read(tmp_path / "bad.ipynb").parameters


def test_refresh_takes_outputs_from_the_run_and_nothing_else(tmp_path: Path) -> None:
    notebook, executed = good_notebook(), good_notebook()
    notebook.cells[1].outputs = []
    notebook.cells[1].metadata = {"execution": {}, "tags": ["kept"]}
    executed.cells.insert(1, new_code_cell("size = 2", metadata={"tags": ["injected-parameters"]}))
    executed.metadata["papermill"] = {}
    nbformat.write(notebook, tmp_path / "notebook.ipynb")
    nbformat.write(executed, tmp_path / "executed.ipynb")
    refresh(tmp_path / "notebook.ipynb", tmp_path / "executed.ipynb")
    refreshed = nbformat.read(tmp_path / "notebook.ipynb", as_version=4)
    assert problems(refreshed) == []
    assert [cell.id for cell in refreshed.cells] == [cell.id for cell in notebook.cells]
    assert refreshed.cells[1].metadata == {"tags": ["kept"]}


def test_tidying_drops_what_a_run_by_hand_leaves_and_keeps_outputs(tmp_path: Path) -> None:
    notebook, path = good_notebook(), tmp_path / "by_hand.ipynb"
    tidied, shown = nbformat.writes(notebook) + "\n", notebook.cells[1].outputs.copy()
    notebook.metadata["language_info"] = {"name": "python", "version": "3.11.9"}
    notebook.cells[1].metadata = {"execution": {"iopub.status.busy": "2026-01-31"}, "collapsed": True}
    view = new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {"model_id": "a"}})
    notebook.cells[1].outputs = [*shown, view]
    nbformat.write(notebook, path)
    for printed in (f"tidied {path}\n", ""):  # a second time there is nothing left to do
        command = [sys.executable, ROOT / "notebooks" / "tidy.py", path]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == printed
        assert path.read_text(encoding="utf-8") == tidied
