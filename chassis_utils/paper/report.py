"""Where a notebook's results go: every table and figure, with the content that made it.

A notebook calls `stamp` once, then `save_table` and `save_figure`. A table becomes CSV (full precision), LaTeX and
Markdown (rounded, units in the header); a figure becomes PDF and PNG. Both get a JSON file: the notebook, the hash of
the content that made them (code, parameters, inputs), models and versions, and what the paper needs besides (headers,
and a text for those who cannot see). Equal results give equal bytes: nothing holds a date, a host or an absolute
path.

Results go to the folder in `CHASSIS_RESULTS`; of a run by hand to `build/interactive/`, or, with other parameters
than the notebook's own, to a folder of their own below `build/`, and never over the committed ones.
"""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from IPython.core.getipython import get_ipython
from IPython.display import Image
from matplotlib.figure import Figure

from chassis_utils.files import BUILD, ROOT, write_together
from chassis_utils.paper import tables
from chassis_utils.paper.notebook import DEFAULT_PROFILE, MODEL_PARAMETERS, Notebook, PlanError, numbered_notebooks
from chassis_utils.paper.plan import COMMITTED, result_folders
from chassis_utils.paper.style import theme

VERSIONED = ("torch", "transformers", "numpy", "scipy")
INTERACTIVE_NAMES = ("In", "Out", "exit", "quit", "open", "get_ipython")  # that IPython puts into every notebook

_provenance: dict[str, Any] = {}  # set by `stamp`, written beside every result


def stamp(name: str, namespace: Mapping[str, Any]) -> None:
    """Remember what this run is, apply the theme and print one line, the same on every machine.

    `namespace` is the notebook's `globals()` right after its parameters and imports. Raises `PlanError` for a
    parameter that the notebook does not declare, or of another type.
    """
    from chassis_utils.lm.checkpoint import default_device  # torch takes seconds: tables can be read without

    theme()
    shell = get_ipython()
    if shell is not None:  # an error is its sentence; `%xmode Context` shows where it was raised
        shell.InteractiveTB.set_mode("Minimal")
    notebook = Notebook.read(ROOT / "notebooks" / f"{name}.ipynb")
    settings = _settings(notebook, namespace)
    profile = _label(notebook, settings)
    versions = {package: version(package).partition("+")[0] for package in VERSIONED}  # "+cpu" is the device's business
    _provenance.clear()
    _provenance.update(
        notebook=name,
        content=notebook.content(ROOT, settings),
        code=notebook.code_digest,
        profile=profile,
        parameters=_portable({key: value for key, value in settings.items() if key != "profile"}),
        models=_portable([settings[key] for key in MODEL_PARAMETERS if key in settings]),
        versions={"python": platform.python_version(), **versions},
        device=default_device(),
    )
    shown = (f"{package} {versions[package]}" for package in ("torch", "transformers"))
    print(" · ".join([name, f"profile {profile}", *shown]))


def save_table(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """Write `tables/<name>` as CSV, LaTeX, Markdown and provenance; return the rounded table to show.

    The stamped profile becomes the first column. A table with a `kl` column is an evaluation and must have all of
    `EVALUATION_COLUMNS`: a KL means nothing without its scale.
    """
    source = _stamped()
    results = frame.drop(columns="profile", errors="ignore")
    whole = results.copy()
    whole.insert(0, "profile", source["profile"])
    lacking = [column for column in tables.EVALUATION_COLUMNS if column not in whole]
    if "kl" in whole and lacking:
        raise ValueError(f"table {name!r} has a column kl but not {', '.join(lacking)}: add what gives it its scale")
    csv, provenance = whole.to_csv(index=False, lineterminator="\n"), source | {"headers": tables.headers(results)}
    files = {".csv": csv, **tables.derived(results), ".json": _json(provenance)}
    _write({f"tables/{name}{end}": content for end, content in files.items()})
    return tables.readable(results)


def save_figure(figure: Figure, name: str, alt: str) -> Image:
    """Write `figures/<name>` as PDF, PNG and provenance, close the figure and return the picture to show.

    `alt` says in one sentence what the picture shows, for readers who cannot see it.
    """
    source = _stamped()
    png = _picture(figure, "png", {"Software": None})
    pdf = _picture(figure, "pdf", {"Creator": None, "Producer": None, "CreationDate": None})
    files: dict[str, str | bytes] = {".pdf": pdf, ".png": png, ".json": _json(source | {"alt": alt})}
    _write({f"figures/{name}{end}": content for end, content in files.items()})
    plt.close(figure)
    return Image(png, format="png", retina=True, alt=alt)


def read_table(name: str) -> pd.DataFrame:
    """A table that an earlier notebook wrote in the stamped profile, at full precision."""
    profile = _stamped()["profile"]
    folder, _ = result_folders(ROOT, profile)
    notebooks = map(Notebook.read, numbered_notebooks(ROOT))
    writers = [notebook.path.stem for notebook in notebooks if name in notebook.names_given_to("save_table", 1)]
    remedy = f"run notebook {writers[0]} first" if writers else "no notebook writes it, check the name"
    return _read(folder / f"{name}.csv", f"with profile {profile!r}: {remedy}")


def read_committed(name: str) -> pd.DataFrame:
    """A table in all profiles whose results are in the repository, one under the other; the first column says which."""
    folders = {profile: result_folders(ROOT, profile)[0] for profile in COMMITTED}
    remedy = "with profile {0!r}: run `make paper PROFILE={0}` first"
    return pd.concat([_read(folder / f"{name}.csv", remedy.format(profile)) for profile, folder in folders.items()])


def read_reported(name: str) -> pd.DataFrame:
    """A table of what the earlier studies reported."""
    known = sorted(path.stem for path in (ROOT / "paper" / "reported").glob("*.csv"))
    return _read(ROOT / "paper" / "reported" / f"{name}.csv", f"among the reported tables: {', '.join(known)}")


def _settings(notebook: Notebook, namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The value of each declared parameter; a plain value under any other name is a mistyped one."""
    plain = {
        name: value
        for name, value in namespace.items()
        if isinstance(value, bool | int | float | str | list | dict | None) and not name.startswith("_")
    }
    given = {name: value for name, value in plain.items() if name not in INTERACTIVE_NAMES}
    notebook.check(given, "this run")
    missing = [name for name in notebook.parameters if name not in given]
    if missing:
        raise PlanError(f"parameter {missing[0]!r} of {notebook.path.name} has no value: run its parameters cell first")
    return {name: given[name] for name in notebook.parameters}


def _label(notebook: Notebook, settings: Mapping[str, Any]) -> str:
    """The profile of the run; other values than the committed profile's make it a run of its own."""
    changed = {name: value for name, value in settings.items() if value != notebook.defaults[name]}
    if settings.get("profile", DEFAULT_PROFILE) != DEFAULT_PROFILE or not changed:
        return settings.get("profile", DEFAULT_PROFILE)
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
    return f"own-{digest[:8]}"


def _stamped() -> dict[str, Any]:
    if not _provenance:
        raise RuntimeError("results need their provenance: call report.stamp(...) at the top of the notebook")
    return _provenance


def _portable(value: object) -> Any:
    """`value` for JSON, absolute paths cut down to what means something on another machine."""
    if isinstance(value, dict):
        return {str(key): _portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(item) for item in value]
    if isinstance(value, str | Path) and Path(value).is_absolute():
        path = Path(value)
        return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    return value if isinstance(value, bool | int | float | None) else str(value)


def _write(files: Mapping[str, str | bytes]) -> None:
    profile = _stamped()["profile"]
    by_hand = BUILD / ("interactive" if profile == DEFAULT_PROFILE else profile)
    folder = Path(os.environ.get("CHASSIS_RESULTS") or by_hand)
    remedy = "make room, or name a writable results folder in CHASSIS_RESULTS"
    write_together({folder / place: content for place, content in files.items()}, remedy)


def _picture(figure: Figure, kind: str, metadata: dict[str, None]) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format=kind, metadata=metadata, bbox_inches=None)
    return buffer.getvalue()


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _read(path: Path, remedy: str) -> pd.DataFrame:
    if not path.exists():
        raise FileNotFoundError(f"table {path.relative_to(ROOT).as_posix()} is missing {remedy}")
    return tables.read(path)
