"""What a run of the paper consists of: one step per notebook, with all that it reads and writes.

A notebook declares itself (`paper.notebook`): typed parameters, the tables and figures it writes, the tables of other
notebooks and the checkpoints that it reads. A profile (`notebooks/profiles/*.yaml`) sets parameters of all notebooks
or, under a notebook's name, of that one alone. Whatever is wrong is one sentence, said before anything runs. Cost:
milliseconds per notebook, and nothing heavy is imported.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from chassis_utils.paper.notebook import DEFAULT_PROFILE, MODEL_PARAMETERS, Notebook, PlanError, numbered_notebooks

COMMITTED = (DEFAULT_PROFILE, "real")  # the profiles whose results are in the repository
TABLE_SUFFIXES = (".csv", ".tex", ".md", ".json")  # the last one is the provenance
FIGURE_SUFFIXES = (".pdf", ".png", ".json")
FETCHED = "build/models/"  # where `make models` puts checkpoints
DEEPEST = 3  # of a profile: a mapping, lists in it, and lists in those


@dataclass(frozen=True)
class Step:
    """One notebook under one profile."""

    notebook: Path
    code: str
    parameters: dict[str, Any]  # those that the profile sets
    reads: list[Path]  # modules, checkpoints, tables
    writes: list[Path]  # tables and figures, the executed notebook last
    folders: dict[Path, str]  # where they belong -> the name of that folder in `staging`
    staging: Path  # where they are written; what says something new is copied into place once all has succeeded

    @property
    def root(self) -> Path:
        """The repository."""
        return self.notebook.parent.parent

    def staged(self, product: Path) -> Path:
        """Where the notebook itself writes `product`."""
        return self.staging / self.folders[product.parent] / product.name


def plan(root: Path, profile: str) -> list[Step]:
    """The steps of a run, in the order of the notebooks' names.

    Raises `PlanError` for an unknown profile, an unknown or mistyped parameter, a file that two notebooks write, and
    a table that nobody writes.
    """
    notebooks = [Notebook.read(path) for path in numbered_notebooks(root)]
    values = read_profile(root / "notebooks" / "profiles", profile)
    own = {name: values.pop(name) for name in [each.path.stem for each in notebooks] if name in values}
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
    steps = [_step(root, profile, notebook, values, own.get(notebook.path.stem, {})) for notebook in notebooks]
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


def result_folders(root: Path, profile: str) -> tuple[Path, Path]:
    """Where the tables and the figures of a profile belong: in the repository, or below `build/`."""
    if profile not in COMMITTED:
        return root / "build" / profile / "tables", root / "build" / profile / "figures"
    own = "" if profile == DEFAULT_PROFILE else profile
    return root / "paper" / "tables" / own, root / "figures" / own


def _step(root: Path, profile: str, notebook: Notebook, values: dict[str, Any], own: Any) -> Step:
    if not isinstance(own, dict):
        raise PlanError(
            f"profile {profile!r} sets {notebook.path.stem!r} to {own!r:.200}: give its parameters by name, with values"
        )
    chosen = {name: value for name, value in values.items() if name in notebook.parameters} | own
    notebook.check(chosen, f"profile {profile!r}")
    for name in (name for name in MODEL_PARAMETERS if str(chosen.get(name, "")).startswith(FETCHED)):
        if not (root / chosen[name] / "config.json").is_file():
            raise PlanError(f"profile {profile!r} needs the checkpoint {chosen[name]!r}, run `make models` first")
    build = root / "build" / profile
    tables, figures = result_folders(root, profile)
    saved = (("save_table", tables, TABLE_SUFFIXES), ("save_figure", figures, FIGURE_SUFFIXES))
    written = [
        to / f"{name}{end}" for save, to, ends in saved for name in notebook.names_given_to(save, 1) for end in ends
    ]
    sources = [("read_table", tables), ("read_reported", root / "paper" / "reported")]
    sources += [("read_committed", result_folders(root, committed)[0]) for committed in COMMITTED]
    read = [folder / f"{name}.csv" for reader, folder in sources for name in notebook.names_given_to(reader, 0)]
    return Step(
        notebook=notebook.path,
        code=notebook.code,
        parameters=chosen,
        reads=[*notebook.inputs(root, notebook.defaults | chosen), *sorted(set(read) - set(written))],
        writes=[*written, build / "notebooks" / notebook.path.name],
        folders={tables: "tables", figures: "figures", build / "notebooks": "notebooks"},
        staging=build / "staging" / notebook.path.stem,
    )
