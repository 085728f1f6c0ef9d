"""nbval fails on what has changed and passes on what differs by rounding: a real notebook through real pytest."""

import shutil
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from chassis_utils.files import ROOT

HTML = "from IPython.display import HTML, display\ndisplay(HTML('<td>{}</td>'))"
CELLS = {  # case: (source, what it showed when it was stored, whether the check passes)
    "close decimal": ("print('kl 0.1234 nats')", "kl 0.1235 nats\n", True),
    "close decimal and moved columns": ("print('a   9.99 b')", "a 10.01 b\n", True),
    "noise around zero": ("print('4.1e-10')", "-3.0e-11\n", True),
    "thousands": ("print('1,234.5')", "1,235.5\n", True),
    "other decimal": ("print('kl 0.1234 nats')", "kl 0.1434 nats\n", False),
    "other sign": ("print('-0.5')", "0.5\n", False),
    "other label": ("print('label 7')", "label 8\n", False),
    "other version": ("print('torch 2.13.0')", "torch 2.13.1\n", False),
    "other text": ("print('0.5 corrected')", "0.5 reported\n", False),
    "one number more": ("print('0.5 0.6')", "0.5\n", False),
    "missing output": ("pass", "0.5\n", False),
    "new output": ("print('0.5')", None, False),
    "a warning is no output": ("import sys\nprint('careful', file=sys.stderr)\nprint('0.51')", "0.511\n", True),
    "close decimal in a table": (HTML.format("0.1234"), HTML.format("0.1235"), True),
    "other decimal in a table": (HTML.format("0.1234"), HTML.format("0.1434"), False),
}


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bool]:
    """Case -> whether nbval passed its cell."""
    folder = tmp_path_factory.mktemp("notebooks")
    shutil.copy(ROOT / "notebooks" / "conftest.py", folder)
    cells = [new_code_cell(source, execution_count=1, outputs=stored(text)) for source, text, _ in CELLS.values()]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "cases.ipynb")
    command = [sys.executable, "-m", "pytest", "--nbval", "-rA", "-p", "no:cacheprovider", "cases.ipynb"]
    output = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout
    results = {case: f"PASSED cases.ipynb::Cell {n}\n" in output for n, case in enumerate(CELLS)}
    differing = [f"Cell {n}: Cell outputs differ" in output for n in range(len(CELLS))]
    assert differing == [not result for result in results.values()], output  # no cell failed for another reason
    return results


def stored(text: str | None) -> list[nbformat.NotebookNode]:
    """The stored outputs: a printed line, or the HTML that `text` displays."""
    if text is None:
        return []
    if not text.startswith("from IPython"):
        return [new_output("stream", name="stdout", text=text)]
    html = text.split("'")[1]
    return [new_output("display_data", {"text/html": html, "text/plain": "<IPython.core.display.HTML object>"})]


@pytest.mark.parametrize("case", CELLS)
def test_changed_outputs_fail_and_rounding_passes(case: str, passed: dict[str, bool]) -> None:
    assert passed[case] == CELLS[case][2]
