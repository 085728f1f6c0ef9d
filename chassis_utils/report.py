"""Where results are written: every table and figure, with its provenance, and the look of both.

A notebook calls `stamp` once, then `save_table` and `save_figure`. A table becomes CSV
(full precision), LaTeX and Markdown (rounded, units in the header); a figure becomes PDF
and PNG. Both get a JSON file: the notebook, commit, parameters, models and versions that
made them, and what the paper needs besides (headers, and a text for those who cannot see).
Equal results give equal bytes: nothing holds a date, a host or an absolute path.
Results go to the folder in `CHASSIS_RESULTS`, else to `build/interactive/`.
"""

import hashlib
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from cycler import Cycler, cycler
from IPython.display import Image
from matplotlib.figure import Figure

from chassis_utils.paths import BUILD, ROOT, write_atomically

EVALUATION_COLUMNS = (
    *("profile", "variant", "split", "kl", "kl_se", "base_kl"),
    *("gap_closed", "top1", "top5_overlap", "n_prompts"),
)
HEADERS = {  # column -> what a reader sees; other columns only lose their underscores
    "kl": "KL (nats)",
    "kl_se": "s.e. (nats)",
    "base_kl": "base KL (nats)",
    "edit_kl": "edit KL (nats)",
    "top1": "top-1",
    "top5_overlap": "top-5 overlap",
    "n_prompts": "n prompts",
    "ridge": "ridge λ",
    "depth": "depth (share of layers)",
    "tokens_seen": "tokens seen",
    "bits_per_byte": "bits per byte",
    "bits_per_byte_se": "s.e. (bits)",
    "bits_per_byte_unseen_paragraphs": "bits per byte, unseen paragraphs",
}
SPLIT_TITLES = {  # split -> what it holds out, for the panels of figures
    "index": "same templates",
    "template": "held-out templates",
    "document": "held-out documents",
    "outside": "one prompt outside the templates",
}
VERSIONED = ("torch", "transformers", "numpy", "scipy")
GENERATED = ("paper/tables", "paper/paper.pdf", "figures")  # their changes are results, not causes
MISSING = "–"

# Okabe and Ito's colours, safe for the colour-blind, ordered so that neighbours differ in
# grey; markers and dashes tell curves apart where grey does not.
BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"
CURVES: Cycler[str, Any] = (
    cycler(color=[BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY])
    + cycler(marker=["o", "s", "^", "D", "v", "P"])
    + cycler(linestyle=["-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (7, 2)), (0, (2, 2))])
)
REPORTED = {"color": "0.45", "linestyle": (0, (3, 2)), "marker": "", "linewidth": 1.3}  # an earlier study's figures
THEME: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "0.3",
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.prop_cycle": CURVES,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "figure.constrained_layout.use": True,
    "figure.dpi": 96,
    "figure.figsize": (6.3, 3.2),  # inches: the paper's text width, so that 9 points print as 9 points
    "font.family": "DejaVu Sans",  # shipped with matplotlib: the same letters everywhere
    "font.size": 9,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "pdf.fonttype": 42,
    "savefig.dpi": 192,  # twice the screen's, shown at half size
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}

_provenance: dict[str, Any] = {}  # set by `stamp`, written beside every result


def stamp(
    notebook: str, *, profile: str, parameters: dict[str, object], models: Sequence[str] = (), device: str = "cpu"
) -> None:
    """Remember what this run is, apply the theme and print one line, the same on every machine."""
    theme()
    settings = _portable(parameters)
    versions = {name: version(name).partition("+")[0] for name in VERSIONED}  # "+cpu" is the device's business
    _provenance.update(
        notebook=notebook,
        commit=_commit(),
        profile=profile,
        parameters=settings,
        parameters_hash=hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12],
        models=_portable(models),
        versions={"python": platform.python_version(), **versions},
        device=device,
    )
    shown = (f"{name} {versions[name]}" for name in ("torch", "transformers"))
    print(" · ".join([notebook, f"profile {profile}", *shown]))


def save_table(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """Write `tables/<name>` as CSV, LaTeX, Markdown and provenance; return the rounded table to show.

    The stamped profile becomes the first column. A table with a `kl` column is an evaluation
    and must have all of `EVALUATION_COLUMNS`: a KL means nothing without its scale.
    """
    source = _stamped()
    results = frame.drop(columns="profile", errors="ignore")
    whole = results.copy()
    whole.insert(0, "profile", source["profile"])
    lacking = [column for column in EVALUATION_COLUMNS if column not in whole]
    if "kl" in whole and lacking:
        raise ValueError(f"table {name!r} has a column kl but not {', '.join(lacking)}: add what gives it its scale")
    _write(f"tables/{name}.csv", whole.to_csv(index=False, lineterminator="\n"))
    _write(f"tables/{name}.tex", latex(results))
    _write(f"tables/{name}.md", markdown(results))
    shown = readable(results)
    _write(f"tables/{name}.json", _json(source | {"headers": dict(zip(results, shown, strict=True))}))
    return shown


def save_figure(figure: Figure, name: str, alt: str) -> Image:
    """Write `figures/<name>` as PDF, PNG and provenance, close the figure and return the picture to show.

    `alt` says in one sentence what the picture shows, for readers who cannot see it.
    """
    source = _stamped()
    png = _picture(figure, "png", {"Software": None})
    _write(f"figures/{name}.pdf", _picture(figure, "pdf", {"Creator": None, "Producer": None, "CreationDate": None}))
    _write(f"figures/{name}.png", png)
    _write(f"figures/{name}.json", _json(source | {"alt": alt}))
    plt.close(figure)
    return Image(png, format="png", retina=True, alt=alt)


def read_table(name: str) -> pd.DataFrame:
    """A table that an earlier notebook wrote in the stamped profile, at full precision."""
    profile = _stamped()["profile"]
    folder = ROOT / "paper" if profile == "micro" else BUILD / profile
    writers = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb")) if _writes(path, name)]
    remedy = f"run notebook {writers[0]} first" if writers else "no notebook writes it, check the name"
    return _read(folder / "tables" / f"{name}.csv", f"with profile {profile!r}: {remedy}")


def read_reported(name: str) -> pd.DataFrame:
    """A table of what the earlier studies reported."""
    known = sorted(path.stem for path in (ROOT / "paper" / "reported").glob("*.csv"))
    return _read(ROOT / "paper" / "reported" / f"{name}.csv", f"among the reported tables: {', '.join(known)}")


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """The table as text for readers: headers with units, three significant digits, scientific below 1e-3."""
    columns = {HEADERS.get(name, name.replace("_", " ")): _texts(frame[name]) for name in map(str, frame)}
    return pd.DataFrame(columns, index=frame.index)


def markdown(frame: pd.DataFrame) -> str:
    """The readable table in Markdown, numbers to the right."""
    head, *body = [[cell.replace("|", r"\|").replace("<", "&lt;") for cell in row] for row in _rows(frame)]
    rule = ["--:" if right else ":--" for right in _numeric(frame)]
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, rule, *body])


def latex(frame: pd.DataFrame) -> str:
    """The readable table as a LaTeX `tabular` (package booktabs)."""
    columns = "".join("r" if right else "l" for right in _numeric(frame))
    head, *body = [" & ".join(map(_escape, row)) + r" \\" for row in _rows(frame)]
    rules = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
    return "\n".join([*rules, r"\end{tabular}", ""])


def theme() -> None:
    """One calm look for all figures: white, light grid, colour-blind palette, 9-point letters."""
    plt.style.use(["default", THEME])  # whatever the reader's own settings are


def variant_styles(variants: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How to draw each variant: `as_reported` and `corrected` look the same in every figure."""
    fixed: dict[str, dict[str, Any]] = {
        "as_reported": {"color": VERMILION, "marker": "v", "linestyle": (0, (5, 1.5))},
        "corrected": {"color": BLUE, "marker": "o", "linestyle": "-"},
    }
    spare = (style for style in CURVES if style["color"] not in (VERMILION, BLUE))
    return {name: fixed[name] if name in fixed else next(spare) for name in dict.fromkeys(variants)}


def _stamped() -> dict[str, Any]:
    if not _provenance:
        raise RuntimeError("results need their provenance: call report.stamp(...) at the top of the notebook")
    return _provenance


def _commit() -> str:
    """Short hash of the commit, `+changes` where anything but results differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]  # notebooks run side by side
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        changes = git("status", "--porcelain", "--", ".", *(f":!{path}" for path in GENERATED))
    except (OSError, subprocess.CalledProcessError):  # an archive without its history, or no git
        return "unknown"
    return f"{commit}+changes" if changes else commit


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


def _write(place: str, content: str | bytes) -> None:
    folder = Path(os.environ.get("CHASSIS_RESULTS") or BUILD / "interactive")
    try:
        write_atomically(folder / place, content)
    except OSError as error:
        raise OSError(
            f"{place} could not be written ({error.strerror}): make room, or name a writable results folder in "
            "CHASSIS_RESULTS; the former file is unchanged"
        ) from error


def _picture(figure: Figure, kind: str, metadata: dict[str, None]) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format=kind, metadata=metadata, bbox_inches=None)
    return buffer.getvalue()


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _writes(notebook: Path, table: str) -> bool:
    return re.search(rf'save_table\(.*\\"{re.escape(table)}\\"', notebook.read_text(encoding="utf-8")) is not None


def _read(path: Path, remedy: str) -> pd.DataFrame:
    if not path.exists():
        raise FileNotFoundError(f"table {path.relative_to(ROOT).as_posix()} is missing {remedy}")
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def _numeric(frame: pd.DataFrame) -> list[bool]:
    return [pd.api.types.is_numeric_dtype(frame[column]) for column in frame]


def _rows(frame: pd.DataFrame) -> list[list[str]]:
    """The header and the rows of the readable table."""
    shown = readable(frame)
    return [list(map(str, shown)), *(list(row) for row in shown.itertuples(index=False))]


def _texts(values: pd.Series) -> list[str]:
    """One column as text; where all values are short, as settings are, they stay as they were typed."""
    if not pd.api.types.is_float_dtype(values):
        whole = pd.api.types.is_integer_dtype(values)
        return [MISSING if pd.isna(value) else f"{value:,}" if whole else str(value) for value in values]
    typed = all(float(f"{value:.3g}") == value for value in values.dropna())
    return [MISSING if math.isnan(value) else f"{value:g}" if typed else _rounded(value) for value in values]


def _rounded(value: float) -> str:
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    if abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _escape(text: str) -> str:
    """LaTeX for `text`; `4.12e-08` becomes a power of ten."""
    if power := re.fullmatch(r"(-?[\d.]+)e([+-]\d+)", text):
        return rf"${power[1]} \times 10^{{{int(power[2])}}}$"
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: rf"\{character}" for character in "&%$#_{}"} | {"<": r"$<$", ">": r"$>$", "λ": r"$\lambda$"}
    return "".join(special.get(character, character) for character in text).replace(MISSING, "--")
