"""How a run of pytask behaves here: checked before it starts, one state per profile, one line per task."""

import os
import time
from typing import Any

from pytask import ExecutionReport, PTask, TaskOutcome, console, hookimpl

from chassis_utils.files import BUILD, ROOT
from chassis_utils.paper.notebook import PlanError
from chassis_utils.paper.pipeline import DEFAULT_PROFILE, plan


@hookimpl(tryfirst=True)
def pytask_parse_config(config: dict[str, Any]) -> None:
    """Check the whole plan, and keep pytask's state in the profile's own build folder."""
    profile = os.environ.get("PROFILE", DEFAULT_PROFILE)
    try:
        plan(ROOT, profile)
    except PlanError as error:
        raise SystemExit(f"error: {error}") from None
    config["root"] = BUILD / profile
    if config["explain"]:
        config["n_workers"] = 1  # side by side, pytask-parallel would run what is only to be explained


@hookimpl
def pytask_post_parse(config: dict[str, Any]) -> None:
    """Give each notebook one thread when several run side by side, all cores when one does."""
    if config["n_workers"] > 1:
        os.environ["OMP_NUM_THREADS"] = "1"


@hookimpl(tryfirst=True)
def pytask_execute_task_log_start(task: PTask) -> None:
    """Note the time."""
    task.attributes["started"] = time.monotonic()


@hookimpl(tryfirst=True)
def pytask_execute_task_log_end(report: ExecutionReport) -> bool:
    """Print the task and its seconds, or the reason why it failed, in place of pytask's dots."""
    name = report.task.name.rpartition("::")[-1]
    seconds = time.monotonic() - report.task.attributes["started"]
    if report.outcome == TaskOutcome.SUCCESS:
        console.print(f"{name:<32}{seconds:5.0f} s", highlight=False)
    elif report.outcome == TaskOutcome.FAIL and report.exc_info:
        console.print(f"{name:<32}failed: {report.exc_info[1]}", markup=False, highlight=False, soft_wrap=True)
    return True
