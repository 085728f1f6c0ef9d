"""How tables read: headers with units, three significant digits, as text, Markdown and LaTeX."""

import math
import re
from pathlib import Path

import pandas as pd

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
    "prose": "bits per byte, prose",
    "prose_se": "s.e. (bits), prose",
}
MISSING = "–"
FLOOR = 1e-9  # nats: divergences below it are rounding, and shown as below it
SHARE = "gap_closed"  # a share of a divergence: rounding of it is shown as 0


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """The table as text for readers: headers with units, three significant digits, scientific below 1e-3."""
    columns = {HEADERS.get(name, name.replace("_", " ")): _column(name, frame[name]) for name in map(str, frame)}
    return pd.DataFrame(columns, index=frame.index)


def derived(results: pd.DataFrame) -> dict[str, str]:
    """What readers get of a table, by the ending of its file: all that follows from its CSV."""
    return {".tex": latex(results), ".md": markdown(results)}


def headers(results: pd.DataFrame) -> dict[str, str]:
    """What readers see above each column."""
    return dict(zip(map(str, results), map(str, readable(results)), strict=True))


def read(path: Path) -> pd.DataFrame:
    """A table's CSV at full precision; a word such as None is a word, an empty cell a missing value."""
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


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


def _numeric(frame: pd.DataFrame) -> list[bool]:
    return [pd.api.types.is_numeric_dtype(frame[column]) for column in frame]


def _rows(frame: pd.DataFrame) -> list[list[str]]:
    """The header and the rows of the readable table."""
    shown = readable(frame)
    return [list(map(str, shown)), *(list(row) for row in shown.itertuples(index=False))]


def _column(name: str, values: pd.Series) -> list[str]:
    if name == SHARE:
        return _texts(values.where(values.abs().ge(FLOOR) | values.isna(), 0.0))
    if name not in ("kl", "kl_se") and not name.endswith("_kl"):
        return _texts(values)
    below = pd.to_numeric(values, errors="coerce").between(0, FLOOR, inclusive="left")
    return [f"< {FLOOR:g}" if tiny else text for tiny, text in zip(below, _texts(values), strict=True)]


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
