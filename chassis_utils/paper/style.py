"""How figures look: one calm theme, one colour for each method in the whole paper, and curves with error bars."""

from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from cycler import Cycler, cycler
from matplotlib.figure import Figure

SPLIT_TITLES = {  # split -> what it holds out, for the panels of figures
    "index": "same templates",
    "template": "held-out templates",
    "document": "held-out documents",
    "outside": "one prompt outside the templates",
}

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


def theme() -> None:
    """One calm look for all figures: white, light grid, colour-blind palette, 9-point letters."""
    plt.style.use(["default", THEME])  # whatever the reader's own settings are


# The curve of each method that stands in more than one figure; all others take what is left, in order.
METHODS = {
    "corrected": 0,
    "likely_columns": 1,
    "full_vocabulary": 2,
    "low_rank_aware": 2,
    "refined": 3,
    "as_reported": 4,
}


def variant_styles(variants: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How to draw each variant: a method looks the same in every figure."""
    names, looks = list(dict.fromkeys(variants)), list(CURVES)
    taken = {METHODS[name] for name in (*names, "corrected", "as_reported") if name in METHODS}
    spare = cycle(look for place, look in enumerate(looks) if place not in taken)
    return {name: looks[METHODS[name]] if name in METHODS else next(spare) for name in names}


def error_curves(
    axis: plt.Axes,
    rows: pd.DataFrame,
    x: str,
    styles: Mapping[str, Mapping[str, Any]],
    y: str = "kl",
    floor: float | None = None,
) -> None:
    """One curve of `y` against the column `x` for each variant that `styles` names, with its standard errors.

    Values below `floor` are drawn there. Variants without rows are left out.
    """
    for variant, look in styles.items():
        line = rows[rows["variant"].eq(variant)]
        heights, errors = line[y], line.get(f"{y}_se")
        if len(line):
            shown = heights if floor is None else heights.clip(floor)
            axis.errorbar(line[x], shown, errors, **look, label=variant.replace("_", " "))


def interval(rows: pd.DataFrame) -> pd.DataFrame:
    """How far below and above each share closed its interval reaches, as `errorbar` takes it."""
    return pd.DataFrame([rows["gap_closed"] - rows["gap_low"], rows["gap_high"] - rows["gap_closed"]]).astype(float)


def shared_legend(figure: Figure, axis: plt.Axes, columns: int = 3) -> None:
    """The legend of one panel, below all of them."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=columns)
