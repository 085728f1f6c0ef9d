"""How a run of pytask behaves here: checked before it starts, alone in its checkout, gone when it is interrupted."""

import json
import os
import signal
import sys
import time
from datetime import datetime
from types import FrameType
from typing import Any

import psutil
from filelock import FileLock, Timeout
from pytask import ExecutionReport, PTask, TaskOutcome, console, hookimpl
from pytask_parallel import ParallelBackend

from chassis_utils.files import BUILD, ROOT
from chassis_utils.paper.notebook import DEFAULT_PROFILE, PlanError
from chassis_utils.paper.pipeline import finish_moves
from chassis_utils.paper.plan import plan

WORKERS = 2  # notebooks side by side, unless `--n-workers` says otherwise
INTERRUPTED = 130  # the exit code of what SIGINT ended
PATIENCE = 2  # seconds that kernels get to end by themselves
LOCK = FileLock(BUILD / "run.lock", timeout=0)
HOLDER = BUILD / "run.json"  # who holds the lock


@hookimpl(tryfirst=True)
def pytask_parse_config(config: dict[str, Any]) -> None:
    """Check the whole plan, and keep pytask's state in the profile's own build folder."""
    profile = os.environ.get("PROFILE", DEFAULT_PROFILE)
    try:
        plan(ROOT, profile)
    except PlanError as error:
        raise SystemExit(f"error: {error}") from None
    config["root"] = BUILD / profile
    if not any(argument.startswith(("-n", "--n-workers")) for argument in sys.argv):
        config["n_workers"] = WORKERS
    if config["explain"]:
        config["n_workers"] = 1  # side by side, pytask-parallel would run what is only to be explained
    if config["command"] == "build" and not (config["explain"] or config["dry_run"]):
        _hold_the_checkout()
        try:
            finish_moves(ROOT)
        except OSError as error:
            raise SystemExit(f"error: {error}") from None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _end)


@hookimpl
def pytask_post_parse(config: dict[str, Any]) -> None:
    """Give each notebook one thread when several run side by side, all cores when one does; join a Dask cluster."""
    if config["n_workers"] > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    if config["parallel_backend"] == ParallelBackend.DASK and os.environ.get("DASK_SCHEDULER_ADDRESS"):
        from distributed import Client  # a second to import, for those alone who have a cluster

        Client()  # of the scheduler at that address; pytask-parallel takes the client that there is


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


def _hold_the_checkout() -> None:
    """Take the lock of this checkout until the process ends, or end with a sentence that says who has it."""
    BUILD.mkdir(exist_ok=True)
    try:
        LOCK.acquire()
    except Timeout:
        holder = json.loads(HOLDER.read_text(encoding="utf-8"))
        raise SystemExit(
            f"error: process {holder['process']} has been running the notebooks of this checkout since "
            f"{holder['since']}: wait until it ends, or stop it"
        ) from None
    since = datetime.now().isoformat(" ", "seconds")
    HOLDER.write_text(json.dumps({"process": os.getpid(), "since": since}), encoding="utf-8")


def _end(number: int, frame: FrameType | None) -> None:
    """Leave no worker and no kernel behind; what was finished stays, and the next run goes on from there."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        child.terminate()
    for child in psutil.wait_procs(children, timeout=PATIENCE)[1]:
        child.kill()
    sys.stderr.write("\ninterrupted: finished notebooks keep their results, run again to go on\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED)
