"""The pipeline on a small project of its own: what is run again and when, and what is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import psutil
import pytest
from distributed import LocalCluster
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from chassis_utils.files import ROOT
from chassis_utils.paper import checksums
from chassis_utils.paper.notebook import PlanError
from chassis_utils.paper.pipeline import _new_results, compile_paper
from chassis_utils.paper.plan import Step, plan

REPORT = """
import json
import json
import os
from pathlib import Path

def save_table(value, name):
    folder = Path(os.environ["CHASSIS_RESULTS"]) / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    for end in (".csv", ".tex", ".md"):
        (folder / f"{name}{end}").write_text(str(value))
    (folder / f"{name}.json").write_text(json.dumps({"content": str(value)}))

def read_table(name):
    return (Path(__file__).parent.parent / "paper" / "tables" / f"{name}.csv").read_text()
"""
PAPER = ("__init__", "agreement", "checksums", "notebook", "pipeline", "plan")  # what running notebooks takes
MODULES = {"report": REPORT, "near": "from chassis_utils import far", "far": "VALUE = 1", "other": "VALUE = 1"}
FIRST = ["from chassis_utils import near, report", 'report.save_table(near.far.VALUE, "first")']
SECOND = [
    "from chassis_utils import report\nfrom chassis_utils.other import VALUE",
    'report.save_table(report.read_table("first") + str(VALUE), name="second")',
]
PARAMETERS = "size: int = 1  # how many\nshare: float = 0.5  # how much\nbase: str = 'models/small'  # which model"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Two notebooks on four modules: 00_first reaches near and far, 10_second other and the first one's table."""
    for name in ("task_notebooks.py", "pytask_hooks.py"):
        copy(ROOT / "notebooks" / name, tmp_path / "notebooks" / name)
    for name in ("__init__.py", "files.py", *(f"paper/{room}.py" for room in PAPER)):
        copy(ROOT / "chassis_utils" / name, tmp_path / "chassis_utils" / name)
    copy(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    for name, source in MODULES.items():
        (tmp_path / "chassis_utils" / f"{name}.py").write_text(source)
    set_profile(tmp_path, "{}")
    write_notebook(tmp_path, "00_first", FIRST)
    write_notebook(tmp_path, "10_second", SECOND)
    return tmp_path


def copy(source: Path, place: Path) -> None:
    """Copy a file, making its folder."""
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, place)


def set_profile(project: Path, text: str) -> None:
    """Write the micro profile."""
    path = project / "notebooks" / "profiles" / "micro.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def write_notebook(project: Path, name: str, sources: list[str], text: str = "Text.") -> None:
    """Write a notebook with the standard parameters cell."""
    parameters = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    cells = [new_markdown_cell(text), parameters, *map(new_code_cell, sources)]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), project / "notebooks" / f"{name}.ipynb")


def start(project: Path, *arguments: str, profile: str = "micro") -> subprocess.Popen[str]:
    """Start pytask in the project, one notebook at a time."""
    environment = os.environ | {"PYTHONPATH": str(project), "PROFILE": profile, "COLUMNS": "120"}
    command = [sys.executable, "-m", "pytask", "--n-workers", "1", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=project, env=environment, start_new_session=True, **streams)


def run(project: Path, *arguments: str, profile: str = "micro") -> str:
    """What a whole run prints."""
    return start(project, *arguments, profile=profile).communicate()[0]


def would_run(project: Path) -> set[str]:
    """The notebooks that a run would execute."""
    output = run(project, "--explain")
    return {name for name in ("00_first", "10_second") if f"::{name}" in output}


def table(project: Path, name: str) -> str:
    """A table's content."""
    return (project / "paper" / "tables" / f"{name}.csv").read_text()


def altered(project: Path) -> list[str]:
    """The results that are not what a run has put in place."""
    return [name for name in checksums.altered(project) if name.startswith("paper/")]


def append(path: Path, text: str) -> None:
    """Change a file."""
    path.write_text(path.read_text() + text)


def test_runs_on_a_cluster(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(project))  # of the workers
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", cluster.scheduler_address)
        assert "2  Succeeded" in run(project, "--parallel-backend", "dask", "--n-workers", "2")
    assert (table(project, "first"), table(project, "second")) == ("1", "11")
    assert would_run(project) == set()


def test_a_notebook_whose_worker_dies_begins_anew_on_another(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dying = "import os, psutil\nfrom chassis_utils.files import ROOT\nonce = ROOT / 'died'"
    kill = "if not once.exists():\n    once.touch()\n    psutil.Process(os.getpid()).parent().kill()"
    write_notebook(project, "00_first", [*FIRST, dying, kill])
    monkeypatch.setenv("PYTHONPATH", str(project))
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", cluster.scheduler_address)
        assert "2  Succeeded" in run(project, "--parallel-backend", "dask", "--n-workers", "2")
    assert (project / "died").exists()


def test_runs_what_has_changed_and_keeps_the_last_good_results(project: Path) -> None:
    assert "2  Succeeded" in run(project)
    assert (table(project, "first"), table(project, "second")) == ("1", "11")
    assert would_run(project) == set()

    write_notebook(project, "00_first", FIRST, text="Another text.")
    assert would_run(project) == set()  # text is no code
    append(project / "chassis_utils" / "other.py", "\n")
    assert would_run(project) == {"10_second"}
    append(project / "chassis_utils" / "far.py", "\nVALUE = 2")
    assert would_run(project) == {"00_first", "10_second"}  # through near, and through the table

    write_notebook(project, "00_first", [*FIRST, "1 / 0"])
    output = run(project)
    assert "ZeroDivisionError: division by zero" in output
    assert "    1 / 0" in output
    assert (table(project, "first"), table(project, "second")) == ("1", "11")

    write_notebook(project, "00_first", FIRST)
    assert "2  Succeeded" in run(project)
    assert (table(project, "first"), table(project, "second")) == ("2", "21")


def test_interrupted_run_is_resumed(project: Path) -> None:
    marker = project / "reached"
    wait = f"import time\nfrom pathlib import Path\nPath('{marker}').touch()\ntime.sleep(60)"
    write_notebook(project, "10_second", [*SECOND, wait])
    process = start(project)
    while not marker.exists() and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert table(project, "first") == "1"
    assert not (project / "paper" / "tables" / "second.csv").exists()

    write_notebook(project, "10_second", SECOND)
    assert would_run(project) == {"10_second"}


WAIT = "import time\nfrom pathlib import Path\nPath({marker!r}).touch()\ntime.sleep(60)"


def waiting(project: Path) -> subprocess.Popen[str]:
    """A run whose second notebook has begun and does not end."""
    marker = project / "reached"
    write_notebook(project, "10_second", [*SECOND, WAIT.format(marker=str(marker))])
    process = start(project)
    while not marker.exists() and process.poll() is None:
        time.sleep(0.1)
    return process


KILLED = """
import os, signal, sys
from pathlib import Path
from chassis_utils.paper.pipeline import run_notebook
from chassis_utils.paper.plan import plan
move = os.replace
def move_and_die(source, place):
    move(source, place)
    if Path(place).name == "first.csv" and "staging" not in str(place):
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = move_and_die
run_notebook(plan(Path(sys.argv[1]), "micro")[0])
"""


def test_a_kill_between_two_files_and_an_edit_by_hand_are_made_good(project: Path) -> None:
    run(project)
    append(project / "chassis_utils" / "far.py", "\nVALUE = 2")
    command = [sys.executable, "-c", KILLED, str(project)]
    assert subprocess.run(command, cwd=project, env=os.environ | {"PYTHONPATH": str(project)}).returncode == -9
    folder = project / "paper" / "tables"
    texts = [(folder / f"first{end}").read_text() for end in (".csv", ".md")]
    assert texts == ["2", "1"]  # half a set
    assert altered(project) == ["paper/tables/first.csv"]

    write_notebook(project, "00_first", ["1 / 0", *FIRST])
    assert "ZeroDivisionError" in run(project)  # the set was whole before anything ran
    assert {(folder / f"first{end}").read_text() for end in (".csv", ".md", ".tex")} == {"2"}
    assert altered(project) == []
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]

    write_notebook(project, "00_first", FIRST)
    (folder / "first.md").write_text("3")  # an edit by hand is made good by the next run of the notebook
    assert altered(project) == ["paper/tables/first.md"]
    run(project)
    assert altered(project) == []
    assert (folder / "first.md").read_text() == "2"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_no_success_and_leaves_no_process(project: Path, number: signal.Signals) -> None:
    process = waiting(project)
    family = psutil.Process(process.pid).children(recursive=True)
    assert any("ipykernel" in " ".join(child.cmdline()) for child in family)
    process.send_signal(number)
    output, _ = process.communicate(timeout=5)
    assert process.returncode == 130
    assert output.endswith("interrupted: finished notebooks keep their results, run again to go on\n")
    assert "Succeeded" not in output
    assert not psutil.wait_procs(family, timeout=1)[1]
    assert table(project, "first") == "1"


def test_a_second_run_in_one_checkout_says_who_has_it(project: Path) -> None:
    first = waiting(project)
    assert re.fullmatch(
        rf"error: process {first.pid} has been running the notebooks of this checkout since [\d :-]+: wait .*\n",
        run(project),
    )
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=5)
    write_notebook(project, "10_second", SECOND)
    assert "1  Succeeded" in run(project)


def test_mistake_in_a_profile_is_one_sentence_before_anything_runs(project: Path) -> None:
    assert run(project, profile="pape").splitlines() == [
        "error: profile 'pape' is unknown: choose one of micro, or add pape.yaml beside them"
    ]
    assert not (project / "build").exists()


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("sise: 2", "sets 'sise', a parameter that no notebook has: remove it or choose one of base, share, size"),
        ("size: two", "sets 'size' to 'two', but 00_first.ipynb declares it as int: give a value of that type"),
        ("size: true", "sets 'size' to True, but 00_first.ipynb declares it as int"),
        ("share: high", "sets 'share' to 'high', but 00_first.ipynb declares it as float"),
        ("[size, 2]", "a profile is a mapping of parameters to values"),
    ],
)
def test_mistaken_parameter_is_refused(project: Path, profile: str, message: str) -> None:
    set_profile(project, profile)
    with pytest.raises(PlanError, match=message):
        plan(project, "micro")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('report.save_table(1, "first")', "first.csv is written by 00_first.ipynb and by 10_second.ipynb"),
        ("report.save_table(1, base)", r"the name in `report.save_table\(1, base\)` is computed"),
        ('report.read_table("frist")', "10_second.ipynb reads paper/tables/frist.csv, which is not there"),
        ("%matplotlib inline", "'%matplotlib inline' is not Python"),
    ],
)
def test_mistake_in_a_notebook_is_refused(project: Path, source: str, message: str) -> None:
    write_notebook(project, "10_second", [*SECOND[:1], source])
    with pytest.raises(PlanError, match=message):
        plan(project, "micro")


def test_profile_sets_parameters_and_checkpoints_are_inputs(project: Path) -> None:
    checkpoint = project / "models" / "large" / "model.safetensors"
    copy(project / "pyproject.toml", checkpoint)
    set_profile(project, "base: models/large\nshare: 1")
    first, _ = plan(project, "micro")
    assert first.parameters == {"base": "models/large", "share": 1}
    assert checkpoint in first.reads


def test_a_profile_sets_parameters_of_one_notebook_under_its_name(project: Path) -> None:
    set_profile(project, "share: 0.25\n00_first: {size: 3, share: 0.75}")
    first, second = plan(project, "micro")
    assert first.parameters == {"size": 3, "share": 0.75}
    assert second.parameters == {"share": 0.25}
    for wrong, message in {
        "{sise: 3}": "sets 'sise', a parameter that 00_first",
        "3": "to 3: give its parameters",
    }.items():
        set_profile(project, f"00_first: {wrong}")
        with pytest.raises(PlanError, match=message):
            plan(project, "micro")


def test_other_profiles_never_touch_the_committed_results(project: Path) -> None:
    (project / "notebooks" / "profiles" / "own.yaml").write_text("size: 2")
    writes = [path for step in plan(project, "own") for path in step.writes]
    assert all(path.is_relative_to(project / "build" / "own") for path in writes)


def test_the_results_on_real_models_stand_beside_the_others(project: Path) -> None:
    (project / "notebooks" / "profiles" / "real.yaml").write_text("size: 2")
    step = plan(project, "real")[0]
    table, executed = step.writes[0], step.writes[-1]
    assert table == project / "paper" / "tables" / "real" / "first.csv"
    assert step.staged(table) == step.staging / "tables" / "first.csv"
    assert executed == project / "build" / "real" / "notebooks" / "00_first.ipynb"


def test_a_checkpoint_that_is_made_on_demand_is_asked_for(project: Path) -> None:
    set_profile(project, "base: build/models/large")
    with pytest.raises(PlanError, match="needs the checkpoint 'build/models/large', run `make models` first"):
        plan(project, "micro")


def test_a_picture_that_rounding_alone_has_moved_stays(tmp_path: Path) -> None:
    figures = tmp_path / "figures"
    step = Step(
        notebook=tmp_path / "notebooks" / "00_first.ipynb",
        code="",
        parameters={},
        reads=[],
        writes=[figures / f"first{end}" for end in (".pdf", ".png", ".json")] + [tmp_path / "00_first.ipynb"],
        folders={figures: "figures"},
        staging=tmp_path / "staging",
    )

    def draw(folder: Path, highest: float, content: str, code: str = "same") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        figure, axis = plt.subplots()
        axis.plot([0, 1, highest], marker="o")
        for end in ("pdf", "png"):
            figure.savefig(folder / f"first.{end}")
        plt.close(figure)
        (folder / "first.json").write_text(json.dumps({"content": content, "code": code}))

    draw(figures, 2.0, "before")
    checksums.record(tmp_path, figures.iterdir())
    draw(step.staging / "figures", 2.0 * (1 + 1e-4), "after")
    assert _new_results(step) == []
    draw(step.staging / "figures", 2.0 * (1 + 1e-4), "after", code="other")
    assert _new_results(step) == step.writes[:-1]
    draw(step.staging / "figures", 3.0, "after")
    assert _new_results(step) == step.writes[:-1]


def test_paper_compiles_to_equal_bytes(tmp_path: Path) -> None:
    copy(ROOT / "pyproject.toml", tmp_path / "paper" / "data.toml")
    (tmp_path / "paper" / "paper.typ").write_text('= Title\n#toml("data.toml").project.name')
    compile_paper(tmp_path)
    first = (tmp_path / "paper" / "paper.pdf").read_bytes()
    compile_paper(tmp_path)
    assert (tmp_path / "paper" / "paper.pdf").read_bytes() == first
