"""What a run of the paper consists of: one step per notebook, with all that it reads and writes.

A notebook declares itself (`paper.notebook`): typed parameters, the tables and figures it writes, the tables of other
notebooks and the checkpoints that it reads. A profile (`notebooks/profiles/*.yaml`) sets parameters and nothing else.
Whatever is wrong is one sentence, said before anything runs.

A step runs in a folder of its own; its results are moved into place when all of the notebook has succeeded, and only
those that say something else than the stored ones do: regenerating what has not changed leaves no difference. A list of
what is to be moved is written first, so that a move that was interrupted is ended before anyone reads
(`finish_moves`). Cost of a plan: milliseconds per notebook. Nothing heavy is imported before a step is executed.
"""

import json
import os
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from chassis_utils.files import write_atomically, write_together
from chassis_utils.paper import checksums
from chassis_utils.paper.notebook import DEFAULT_PROFILE, Notebook, PlanError, numbered_notebooks

TABLE_SUFFIXES = (".csv", ".tex", ".md", ".json")  # the last one is the provenance
FIGURE_SUFFIXES = (".pdf", ".png", ".json")
MOVING = ".moving"  # the ending of a list of what is to be moved, beside the staging folder
PAPER_DATE = 1_767_225_600  # 2026-01-01, so that equal content compiles to equal bytes
DEEPEST = 3  # of a profile: a mapping, lists in it, and lists in those
WHICH_RUN = ("content", "versions")  # of the provenance: who made a result, not what it says


class StepFailed(RuntimeError):
    """A notebook did not finish: the cell, its source and its error."""


@dataclass(frozen=True)
class Step:
    """One notebook under one profile."""

    notebook: Path
    code: str
    parameters: dict[str, Any]  # those that the profile sets
    reads: list[Path]  # modules, checkpoints, tables
    writes: list[Path]  # tables and figures, the executed notebook last
    staging: Path  # where they are written; what says something new is copied into place once all has succeeded

    @property
    def root(self) -> Path:
        """The repository."""
        return self.notebook.parent.parent

    def staged(self, product: Path) -> Path:
        """Where the notebook itself writes `product`."""
        return self.staging / product.parent.name / product.name


def plan(root: Path, profile: str) -> list[Step]:
    """The steps of a run, in the order of the notebooks' names.

    Raises `PlanError` for an unknown profile, an unknown or mistyped parameter, a file that two notebooks write, and
    a table that nobody writes.
    """
    notebooks = [Notebook.read(path) for path in numbered_notebooks(root)]
    values = read_profile(root / "notebooks" / "profiles", profile)
    known = sorted({name for notebook in notebooks for name in notebook.parameters})
    for name in values:
        if name not in known:
            raise PlanError(
                f"profile {profile!r} sets {name!r}, a parameter that no notebook has: "
                f"remove it or choose one of {', '.join(known)}"
            )
    if "profile" in known and values.get("profile", DEFAULT_PROFILE) != profile:
        raise PlanError(
            f"profile {profile!r} does not name itself, so its tables would pass for another's: "
            f"set `profile` to {profile} in its file"
        )
    steps = [_step(root, profile, notebook, values) for notebook in notebooks]
    writers: dict[Path, str] = {}
    for step in steps:
        for path in step.writes:
            if path in writers:
                raise PlanError(
                    f"{path.relative_to(root)} is written by {writers[path]} and by {step.notebook.name}: "
                    "give one of the two another name"
                )
            writers[path] = step.notebook.name
    for step in steps:
        for path in step.reads:
            if path not in writers and not path.exists():
                raise PlanError(
                    f"{step.notebook.name} reads {path.relative_to(root)}, which is not there "
                    "and which no notebook writes: check the name"
                )
    return steps


def read_profile(folder: Path, profile: str) -> dict[str, Any]:
    """The parameters that a profile sets."""
    path = folder / f"{profile}.yaml"
    if not os.path.isfile(path):  # unlike Path's, false for a name that is too long
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise PlanError(f"profile {profile!r} is unknown: choose one of {known}, or add {profile}.yaml beside them")
    try:
        values = _plain_yaml(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # a date of month 13 is a ValueError
        reason = " ".join(str(error).split())[:300]
        raise PlanError(
            f"{path.name} cannot be read ({reason}): write UTF-8 lines of a name, a colon and a value"
        ) from None
    if not isinstance(values, dict):
        raise PlanError(f"{path.name} holds {values!r:.200}: a profile is a mapping of parameters to values, write one")
    return values


def _plain_yaml(text: str) -> Any:
    """What YAML says; `ValueError` where it has a name twice, or anchors, tags or a depth that no parameter needs."""
    depth = 0
    for event in yaml.parse(text):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST or getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise ValueError("it has an anchor, an alias, a tag or lists in lists in lists")
    root = yaml.compose(text, yaml.SafeLoader)
    names = [key.value for key, _ in root.value] if isinstance(root, yaml.MappingNode) else []
    twice = [name for k, name in enumerate(names) if name in names[:k]]
    if twice:
        raise ValueError(f"it sets {twice[0]!r} twice")
    return yaml.safe_load(text)


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
    """The tables that say something else than the stored ones, and the figures where a table or the code is new.

    A figure shows the numbers of its notebook's tables: from the same content, with tables that agree, it is the same.
    What was edited by hand (`paper.checksums`) is made new.
    """
    altered = {(step.root / name).with_suffix("") for name in checksums.altered(step.root)}
    results: dict[Path, list[Path]] = {}
    for product in step.writes[:-1]:
        results.setdefault(product.with_suffix(""), []).append(product)
    tables = {name for name, files in results.items() if name.with_suffix(".csv") in files}
    new = {name for name in tables if name in altered or not _same_table(step, name)}
    same_run = all(_same_content(step, name) for name in results) and not new
    figures = set() if same_run else {name for name in results.keys() - tables if not _same_picture(step, name)}
    figures |= (results.keys() - tables) & altered
    return [product for name in results if name in new or name in figures for product in results[name]]


def _same_table(step: Step, name: Path) -> bool:
    import pandas as pd

    from chassis_utils.paper.agreement import table_differences

    if not all(name.with_suffix(suffix).exists() for suffix in TABLE_SUFFIXES):
        return False
    stored = name.with_suffix(".csv")
    return _says_the_same(step, name) and not table_differences(pd.read_csv(step.staged(stored)), pd.read_csv(stored))


def _same_picture(step: Step, name: Path) -> bool:
    picture = name.with_suffix(".png")
    same = picture.exists() and picture.read_bytes() == step.staged(picture).read_bytes()
    return same and _says_the_same(step, name)


def _says_the_same(step: Step, name: Path) -> bool:
    """Whether what stands beside a result is the same but for the run that made it."""
    ours, theirs = (_provenance(path) for path in (step.staged(name.with_suffix(".json")), name.with_suffix(".json")))
    return {**ours, **dict.fromkeys(WHICH_RUN)} == {**theirs, **dict.fromkeys(WHICH_RUN)}


def _same_content(step: Step, name: Path) -> bool:
    ours, theirs = (_provenance(path) for path in (step.staged(name.with_suffix(".json")), name.with_suffix(".json")))
    return ours.get("content") == theirs.get("content") and _says_the_same(step, name)


def _provenance(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _step(root: Path, profile: str, notebook: Notebook, values: dict[str, Any]) -> Step:
    chosen = {name: value for name, value in values.items() if name in notebook.parameters}
    notebook.check(chosen, f"profile {profile!r}")
    build = root / "build" / profile
    tables, figures = build / "tables", build / "figures"
    if profile == DEFAULT_PROFILE:
        tables, figures = root / "paper" / "tables", root / "figures"
    written = [tables / f"{name}{end}" for name in notebook.names_given_to("save_table", 1) for end in TABLE_SUFFIXES]
    written += [
        figures / f"{name}{end}" for name in notebook.names_given_to("save_figure", 1) for end in FIGURE_SUFFIXES
    ]
    read = [tables / f"{name}.csv" for name in notebook.names_given_to("read_table", 0)]
    read += [root / "paper" / "reported" / f"{name}.csv" for name in notebook.names_given_to("read_reported", 0)]
    return Step(
        notebook=notebook.path,
        code=notebook.code,
        parameters=chosen,
        reads=[*notebook.inputs(root, notebook.defaults | chosen), *sorted(set(read) - set(written))],
        writes=[*written, build / "notebooks" / notebook.path.name],
        staging=build / "staging" / notebook.path.stem,
    )
