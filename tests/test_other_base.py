"""The notebooks run on a base that nobody here trained, without a change."""

from pathlib import Path

import pandas as pd
import papermill
import pytest

from chassis_utils.paths import ROOT
from chassis_utils.pipeline import Notebook

STORIES = ROOT.parent / "shared" / "models" / "stories260K"
SMALL = {"n_train": 400, "n_test": 40, "documents": 6}


@pytest.mark.skipif(not STORIES.is_dir(), reason="the shared checkpoint stories260K is not beside this repository")
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_on_another_base(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHASSIS_RESULTS", str(tmp_path))
    known = Notebook.read(path).parameters
    parameters = {name: value for name, value in SMALL.items() if name in known} | {"base": str(STORIES)}
    quiet = {"progress_bar": False, "extra_arguments": ["--IPKernelApp.log_level=40"]}
    papermill.execute_notebook(path, tmp_path / path.name, parameters, **quiet)
    tables = {file.stem: pd.read_csv(file) for file in (tmp_path / "tables").glob("*.csv")}
    assert tables
    for name, table in tables.items():
        if "kl" in table:
            last_layer = table[table.get("layer", 5) == 5] if name == "lens_kl" else table
            corrected = last_layer[last_layer["variant"] == "corrected"]
            assert corrected.groupby("split")["kl"].min().max() < 1e-6, name
