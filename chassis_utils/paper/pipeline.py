"""A step of the paper is run: a notebook in a folder of its own, and its results put in place.

They are moved into place when all of the notebook has succeeded, and only those that say something else than the
stored ones do: regenerating what has not changed leaves no difference. A list of what is to be moved is written first,
so that a move that was interrupted is ended before anyone reads (`finish_moves`). Nothing heavy is imported before a
step is executed.
"""

import json
import logging
import os
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from chassis_utils.files import write_atomically, write_together
from chassis_utils.paper import checksums
from chassis_utils.paper.plan import TABLE_SUFFIXES, Step

MOVING = ".moving"  # the ending of a list of what is to be moved, beside the staging folder
PAPER_DATE = 1_767_225_600  # 2026-01-01, so that equal content compiles to equal bytes
ROUNDING = 8.0  # of 255, root mean square over a picture: lines that rounding has moved, and chaotic ones redrawn
WHICH_RUN = ("content", "code", "versions")  # of the provenance: who made a result, not what it says


class StepFailed(RuntimeError):
    """A notebook did not finish: the cell, its source and its error."""


def run_notebook(step: Step) -> None:
    """Execute the notebook in its staging folder, then copy what says something new into place.

    Raises `StepFailed` and leaves the earlier results as they were when a cell fails or a declared result is missing,
    `OSError` when the results do not fit on the disk.
    """
    finish_moves(step.root)
    shutil.rmtree(step.staging, ignore_errors=True)
    executed = step.staged(step.writes[-1])
    executed.parent.mkdir(parents=True)
    os.environ["CHASSIS_RESULTS"] = str(step.staging)
    execute(step.notebook, executed, step.parameters)
    missing = [product.name for product in step.writes if not step.staged(product).exists()]
    if missing:
        raise StepFailed(f"the notebook ended without writing {', '.join(missing)}")
    products = [*_new_results(step), step.writes[-1]]
    places = {str(path.relative_to(step.root)): str(step.staged(path).relative_to(step.root)) for path in products}
    write_atomically(step.staging.with_suffix(MOVING), json.dumps(places))
    finish_moves(step.root)


def finish_moves(root: Path) -> None:
    """Copy into place what finished notebooks have listed; what a kill has interrupted is done again.

    Raises `OSError`, and leaves the earlier results, where there is no room; the next start tries again.
    """
    pattern = f"build/*/staging/*{MOVING}"
    if not any(root.glob(pattern)):
        return
    with FileLock(root / "build" / "move.lock"):
        for moving in sorted(root.glob(pattern)):
            places = {root / to: root / source for to, source in json.loads(moving.read_text(encoding="utf-8")).items()}
            for place in (*places, root / checksums.LIST):
                for left in place.parent.glob(f".{place.name}-*"):  # half written when a kill came
                    left.unlink()
            # what was staged stays, for `paper.check`
            write_together({to: source.read_bytes() for to, source in places.items()}, "make room and run again")
            checksums.record(root, places)
            moving.unlink()


def execute(notebook: Path, executed: Path, parameters: dict[str, Any]) -> None:
    """Run a notebook with papermill, in this process; `StepFailed` with the cell and its error."""
    import papermill  # seconds to import: only here, where a notebook really runs
    from papermill.exceptions import PapermillExecutionError

    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of each parameter that it cannot describe
    quiet = {"progress_bar": False, "record_timing": False, "extra_arguments": ["--IPKernelApp.log_level=50"]}
    try:
        papermill.execute_notebook(notebook, executed, parameters, coalesce_streams=True, **quiet)
    except PapermillExecutionError as error:
        cell = textwrap.indent(error.source, "    ")
        raise StepFailed(f"{error.ename}: {error.evalue}\n\n{cell}\n\n(cell [{error.exec_count}])") from None


def compile_paper(root: Path) -> None:
    """Compile `paper/paper.typ` to PDF: the same bytes from the same content on every machine."""
    import typst

    source = root / "paper" / "paper.typ"
    pdf = typst.compile(source, root=root, ignore_system_fonts=True, timestamp=PAPER_DATE)
    write_atomically(source.with_suffix(".pdf"), pdf)
    checksums.record(root, [path for pattern in checksums.PAPER for path in root.glob(pattern)])


def _new_results(step: Step) -> list[Path]:
    """The tables that say something else than the stored ones, and the figures that show something else.

    A figure shows the numbers of its notebook's tables: where they agree, a picture that the same code has drawn and
    that differs by what rounding moves is the same. What was measured with a clock is new with the picture of it. What
    was edited by hand (`paper.checksums`) is made new.
    """
    altered = {(step.root / name).with_suffix("") for name in checksums.altered(step.root)}
    results: dict[Path, list[Path]] = {}
    for product in step.writes[:-1]:
        results.setdefault(product.with_suffix(""), []).append(product)
    tables = {name for name, files in results.items() if name.with_suffix(".csv") in files}
    new = {name for name in tables if name in altered or not _same_table(step, name)}
    figures = (results.keys() - tables) & altered
    if new or not all(_says_the_same(step, name, but=("code", "versions")) for name in results):
        figures |= {name for name in results.keys() - tables if not _same_picture(step, name, tables_agree=not new)}
        new |= {name for name in tables if figures and _measured(step, name)}
    return [product for name in results if name in new or name in figures for product in results[name]]


def _same_table(step: Step, name: Path) -> bool:
    import pandas as pd

    from chassis_utils.paper.agreement import table_differences

    if not all(name.with_suffix(suffix).exists() for suffix in TABLE_SUFFIXES):
        return False
    stored = name.with_suffix(".csv")
    return _says_the_same(step, name) and not table_differences(pd.read_csv(step.staged(stored)), pd.read_csv(stored))


def _measured(step: Step, name: Path) -> bool:
    import pandas as pd

    from chassis_utils.paper.agreement import MEASURED

    return any(str(column).startswith(MEASURED) for column in pd.read_csv(step.staged(name.with_suffix(".csv"))))


def _same_picture(step: Step, name: Path, tables_agree: bool) -> bool:
    from matplotlib.pyplot import imread
    from matplotlib.testing.compare import calculate_rms

    stored = name.with_suffix(".png")
    if not (stored.exists() and _says_the_same(step, name)):
        return False
    pictures = [255 * imread(path) for path in (stored, step.staged(stored))]
    drawn_by = [_provenance(path.with_suffix(".json")).get("code") for path in (stored, step.staged(stored))]
    tolerance = ROUNDING if tables_agree and drawn_by[0] == drawn_by[1] else 0.0
    return bool(pictures[0].shape == pictures[1].shape and calculate_rms(*pictures) <= tolerance)


def _says_the_same(step: Step, name: Path, but: Sequence[str] = WHICH_RUN) -> bool:
    """Whether what stands beside a result is the same but for the run that made it."""
    ours, theirs = (_provenance(path) for path in (step.staged(name.with_suffix(".json")), name.with_suffix(".json")))
    return ours | dict.fromkeys(but) == theirs | dict.fromkeys(but)


def _provenance(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
