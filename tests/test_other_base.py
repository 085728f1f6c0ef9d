"""The notebooks run on a base that nobody here trained, without a change, and the paper's orderings hold there."""

import shutil
from pathlib import Path

import pandas as pd
import papermill
import pytest
from claims import CLAIMS

from chassis_utils.files import BUILD, ROOT
from chassis_utils.paper.notebook import Notebook, numbered_notebooks

STORIES = ROOT.parent / "shared" / "models" / "stories260K"
RANK = 2  # of the expert on a base of width 64
SMALL = {"n_train": 400, "n_test": 40, "documents": 6, "edits": [0.1, 0.5], "seeds": [0], "passes": 5, "few_passes": 3}
SMALL |= {
    "n_fit": 60,
    "n_val": 12,
    "steps": 8,
    "study_steps": 6,
    "long_steps": 6,
    "width": 128,
    "inner": 344,
    "rounds": 2,
    "on_study": "--samples 128 --tested 32",
    "on_processes": "--samples 128 --rounds 1",
}
BASE = {"base": str(STORIES), "fft_base": str(STORIES)}
SIBLING = {"sibling": str(STORIES.parent / "llama2xs"), "n_train": 800}  # questions enough to hold some out of a third
TRAINED = {"trained": str(STORIES.parent / "llama2xs")}
NOTEBOOKS = numbered_notebooks(ROOT)
PROFILE = "test-stories260k"  # results go where a profile's do, so that one notebook finds another's tables


@pytest.fixture(scope="module")
def results() -> Path:
    """An empty folder of results."""
    folder = BUILD / PROFILE
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@pytest.mark.skipif(not STORIES.is_dir(), reason="the shared checkpoint stories260K is not beside this repository")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_on_another_base(path: Path, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHASSIS_RESULTS", str(results))
    notebook = Notebook.read(path)
    small = SMALL | BASE | TRAINED | (SIBLING if "sibling" in notebook.parameters else {})
    parameters = {name: value for name, value in small.items() if name in notebook.parameters}
    quiet = {"progress_bar": False, "extra_arguments": ["--IPKernelApp.log_level=40"]}
    papermill.execute_notebook(path, results / path.name, parameters | {"profile": PROFILE}, **quiet)
    for name in notebook.names_given_to("save_table", 1):
        table = pd.read_csv(results / "tables" / f"{name}.csv")
        assert len(table)
        if "kl" in table or name in CLAIMS:
            CLAIMS[name](table, RANK)
