"""Results are written whole, equal results give equal bytes, and nothing in them betrays the machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from chassis_utils.files import ROOT
from chassis_utils.paper import report, style, tables

PARAMETERS = {"base": "models/port-llama", "files": ["/somewhere/prompts.txt"], "rank": 4}


def a_notebook(more: str = "") -> dict[str, object]:
    """A notebook that declares `PARAMETERS`."""
    lines = [f"{name}: {type(value).__name__} = {value!r}  # it" for name, value in PARAMETERS.items()]
    cells = [{"source": ["\n".join(lines)], "metadata": {"tags": ["parameters"]}}, {"source": [more], "metadata": {}}]
    return {"cells": [cell | {"cell_type": "code"} for cell in cells]}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one notebook."""
    root = tmp_path / "project"
    (root / "notebooks").mkdir(parents=True)
    (root / "notebooks" / "20_test.ipynb").write_text(json.dumps(a_notebook()))
    monkeypatch.setattr(report, "ROOT", root)
    return root


@pytest.fixture(autouse=True)
def results(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stamped run whose results go to a folder of its own."""
    monkeypatch.setenv("CHASSIS_RESULTS", str(tmp_path))
    report.stamp("20_test", PARAMETERS)
    return tmp_path


def drawing() -> Figure:
    figure, axes = plt.subplots()
    axes.plot([0, 1, 4, 9], label="squares")
    axes.set_title("Größe, $x^2$")
    axes.legend()
    return figure


def test_the_same_figure_gives_the_same_bytes_in_another_process(results: Path) -> None:
    report.save_figure(drawing(), "here", alt="A parabola.")
    script = (
        "from test_report import PARAMETERS, drawing; from chassis_utils.paper import report; from pathlib import Path;"
        "report.ROOT = Path('project'); report.stamp('20_test', PARAMETERS);"
        "report.save_figure(drawing(), 'there', alt='')"
    )
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    later = {"PYTHONPATH": path, "SOURCE_DATE_EPOCH": "86400", "PYTHONHASHSEED": "7"}  # another clock, another order
    subprocess.run([sys.executable, "-c", script], env=os.environ | later, check=True, cwd=results)
    for kind in ("pdf", "png"):
        assert (results / f"figures/here.{kind}").read_bytes() == (results / f"figures/there.{kind}").read_bytes()


def test_a_saved_figure_is_closed_and_shown_with_its_description() -> None:
    figure = drawing()
    data, metadata = report.save_figure(figure, "squares", alt="A parabola.")._repr_png_()
    assert data
    assert metadata["alt"] == "A parabola."
    assert not plt.fignum_exists(figure.number)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_csv_keeps_every_digit(values: list[float]) -> None:
    frame = pd.DataFrame({"value": values, "name": "None"})
    report.save_table(frame, "digits")
    again = report._read(Path(os.environ["CHASSIS_RESULTS"]) / "tables" / "digits.csv", "")
    np.testing.assert_array_equal(again["value"], values)
    assert list(again["name"]) == ["None"] * len(values)  # a word, not a missing value
    assert list(again["profile"]) == ["micro"] * len(values)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.123"), (12.3456, "12.3"), (1234.56, "1,235"), (4.1234e-8, "4.12e-08"), (-0.99996, "-1.000")],
)
def test_measured_numbers_show_three_digits(value: float, text: str) -> None:
    assert list(tables.readable(pd.DataFrame({"kl": [value]}))["KL (nats)"]) == [text]


def test_settings_stay_as_typed_and_gaps_are_dashes() -> None:
    shown = tables.readable(pd.DataFrame({"ridge": [1e-5, 0.25, None], "layer": [0, 8, 12000]}))
    assert shown.to_numpy().tolist() == [["1e-05", "0"], ["0.25", "8"], ["–", "12,000"]]


def test_latex_escapes_text_and_sets_powers_of_ten() -> None:
    source = tables.latex(pd.DataFrame({"variant": ["as_reported", "50% & <s>"], "kl": [4.1234e-8, 2.3456]}))
    assert r"as\_reported & $4.12 \times 10^{-8}$ \\" in source
    assert r"50\% \& $<$s$>$ & 2.35 \\" in source
    assert source.startswith("\\begin{tabular}{lr}\n\\toprule\nvariant & KL (nats) \\\\")


def test_markdown_cells_cannot_break_the_table() -> None:
    lines = tables.markdown(pd.DataFrame({"piece": ["a|b", "<s>"], "n_prompts": [3, 512]})).splitlines()
    assert lines == ["| piece | n prompts |", "| :-- | --: |", r"| a\|b | 3 |", "| &lt;s> | 512 |"]


def test_a_kl_without_its_scale_is_refused(results: Path) -> None:
    with pytest.raises(ValueError, match="not variant, split, kl_se, base_kl, gap_closed"):
        report.save_table(pd.DataFrame({"kl": [0.1]}), "bare")
    assert not (results / "tables").exists()


def test_provenance_names_the_run_and_no_machine(results: Path) -> None:
    report.save_table(pd.DataFrame({"layer": [1]}), "small")
    text = (results / "tables" / "small.json").read_text(encoding="utf-8")
    source = json.loads(text)
    assert source["parameters"] == {"base": "models/port-llama", "files": ["prompts.txt"], "rank": 4}
    assert source["models"] == ["models/port-llama"]
    assert not [word for word in (str(ROOT), os.uname().nodename, "somewhere") if word in text]


def test_all_that_decides_a_result_decides_its_content(results: Path, project: Path) -> None:
    def content(**parameters: object) -> str:
        report.stamp("20_test", PARAMETERS | parameters)
        report.save_table(pd.DataFrame({"layer": [1]}), "small")
        return str(json.loads((results / "tables" / "small.json").read_text())["content"])

    first = content()
    assert content(base="models/port-llama", files=PARAMETERS["files"]) == first != content(rank=5)
    (project / "notebooks" / "20_test.ipynb").write_text(json.dumps(a_notebook("1 + 1")))
    assert content() != first
    (project / "notebooks" / "20_test.ipynb").write_text(json.dumps(a_notebook()))
    (project / "constraints.txt").write_text("torch==1")
    assert content() != first


def test_an_interrupted_or_failed_write_leaves_the_former_table(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.save_table(pd.DataFrame({"layer": [1]}), "small")
    before = {path: path.read_bytes() for path in (results / "tables").iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"tables/small.csv could not be written \(No space left on device\): make room"):
        report.save_table(pd.DataFrame({"layer": [2]}), "small")
    assert {path: path.read_bytes() for path in (results / "tables").iterdir()} == before


def test_a_missing_table_names_the_notebook_to_run(project: Path) -> None:
    cell = {"cell_type": "code", "metadata": {}, "source": ['report.save_table(models, "models")']}
    (project / "notebooks" / "00_models.ipynb").write_text(json.dumps({"cells": [cell]}))
    with pytest.raises(FileNotFoundError, match=r"paper/tables/models.csv is missing.*run notebook 00_models first"):
        report.read_table("models")
    with pytest.raises(FileNotFoundError, match="no notebook writes it"):
        report.read_table("modles")


def test_a_missing_reported_table_lists_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "ROOT", ROOT)
    assert len(report.read_reported("lens_kl")) == 23
    with pytest.raises(FileNotFoundError, match=r"paper/reported/lenses.csv is missing among .*lens_kl"):
        report.read_reported("lenses")


def test_results_need_a_stamp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_provenance", {})
    with pytest.raises(RuntimeError, match=r"report\.stamp"):
        report.save_table(pd.DataFrame({"layer": [1]}), "small")


def test_variants_keep_their_look_and_differ_without_colour() -> None:
    styles = style.variant_styles(["as_reported", "ridge chosen", "edit", "own folds", "corrected"])
    assert styles["corrected"] == style.variant_styles(["corrected"])["corrected"]
    beside_others = style.variant_styles(["low_rank", "low_rank_aware", "corrected"])
    assert beside_others["low_rank_aware"] == style.variant_styles(["low_rank_aware"])["low_rank_aware"]
    assert len({(look["marker"], str(look["linestyle"])) for look in styles.values()}) == 5
    assert [name for name, look in styles.items() if look["color"] == style.BLUE] == ["corrected"]
    assert [name for name, look in styles.items() if look["color"] == style.VERMILION] == ["as_reported"]


def test_the_stamp_is_the_same_on_every_machine(capsys: pytest.CaptureFixture[str]) -> None:
    report.stamp("20_test", PARAMETERS)
    line = capsys.readouterr().out
    assert line.startswith("20_test · profile micro · torch 2.") and "+" not in line
    assert line.count("\n") == 1


def test_reading_results_needs_no_torch() -> None:
    script = "import chassis_utils.paper.report, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
