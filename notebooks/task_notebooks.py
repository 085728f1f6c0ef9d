"""The paper as tasks for pytask: one per notebook, and one that compiles the PDF.

`pytask` runs what has changed by content, `pytask --dry-run` says what, `pytask --explain` why.
The profile is the environment variable PROFILE.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

from pytask import PythonNode, mark, task

from chassis_utils.files import ROOT
from chassis_utils.paper.notebook import DEFAULT_PROFILE
from chassis_utils.paper.pipeline import compile_paper, run_notebook
from chassis_utils.paper.plan import COMMITTED, Step, plan

PROFILE = os.environ.get("PROFILE", DEFAULT_PROFILE)
STEPS = plan(ROOT, PROFILE)
# The notebooks of minutes start first, and those of about one or less last, so that all workers end at about the same
# time. 10 comes between, since it reads what 11 has fitted.
LONG = ("11", "24", "26", "28", "34", "41")
SHORT = ("00", "12", "20", "21", "22", "23", "25", "27", "30", "31", "40", "42", "43")
ORDER = dict.fromkeys(LONG, mark.try_first) | dict.fromkeys(SHORT, mark.try_last)


def sent_by_value(function: Callable[..., None]) -> Callable[..., None]:
    """Workers cannot import a task file, which pytask names by its path; what is of `__main__` they need not import."""
    function.__module__ = "__main__"
    return function


for current in STEPS:
    code = PythonNode(name="code", value=current.code, hash=True)
    parameters = PythonNode(name="parameters", value=json.dumps(current.parameters, sort_keys=True), hash=True)

    @task(
        name=current.notebook.stem,
        kwargs={
            "step": PythonNode(value=current),
            "depends_on": {"code": code, "parameters": parameters, "files": current.reads},
            "produces": current.writes,
        },
    )
    @ORDER.get(current.notebook.stem[:2], lambda function: function)
    @sent_by_value
    def _(step: Step, depends_on: dict[str, object], produces: list[Path]) -> None:
        run_notebook(step)


PAPER = ROOT / "paper"
if PROFILE in COMMITTED and (PAPER / "paper.typ").exists():
    written = {path for step in STEPS for path in step.writes[:-1]}
    stored = {
        path
        for pattern in ("paper/*.typ", "paper/*.bib", "paper/reported/*.*", "paper/tables/**/*.*", "figures/**/*.*")
        for path in ROOT.glob(pattern)
    }

    @task(name="paper", kwargs={"depends_on": sorted(written | stored), "produces": PAPER / "paper.pdf"})
    @sent_by_value
    def _(depends_on: list[Path], produces: Path) -> None:
        compile_paper(ROOT)
