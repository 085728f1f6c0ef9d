"""How figures look: one calm theme, one colour for each method in the whole paper, and curves with error bars."""

from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from cycler import Cycler, cycler
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

Look = Mapping[str, Any]  # how a curve is drawn

SPLIT_TITLES = {  # split -> what it holds out, for the panels of figures
    "index": "same templates",
    "template": "held-out templates",
    "document": "held-out documents",
    "outside": "one prompt outside the templates",
}

# Okabe and Ito's colours, safe for the colour-blind; markers and dashes tell curves apart where grey does not.
BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"

# What is no method (prompts, rates, sizes) is drawn in greys, from dark to light.
CURVES: Cycler[str, Any] = (
    cycler(color=["0.1", "0.45", "0.65", "0.3", "0.55", "0.75"])
    + cycler(marker=["o", "s", "^", "D", "v", "P"])
    + cycler(linestyle=["-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (7, 2)), (0, (2, 2))])
)

REPORTED = {"color": "0.45", "linestyle": (0, (3, 2)), "marker": "", "linewidth": 1.3}  # an earlier study's figures

HALO = [withStroke(linewidth=2.5, foreground="white")]  # around letters on lines

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


# Colour, and place among `CURVES`, of methods that stand in several figures. Blue is this paper's and sky a variant of
# it, vermilion what was reported and orange that with one thing changed, green low rank in weights, purple LoRA.
METHODS = {
    **{"corrected": (BLUE, 0), "corrected_bent": (SKY, 3), "edit_read_here": (SKY, 3), "adapter": (BLUE, 0)},
    **{"as_reported": (VERMILION, 4), "likely_columns": (ORANGE, 1), "full_vocabulary": (ORANGE, 2)},
    **{"low_rank": (GREEN, 1), "low_rank_aware": (GREEN, 2), "lora": (PURPLE, 3), "refined": (SKY, 5)},
}


def variant_styles(variants: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How to draw each variant: a method looks the same in every figure; what `METHODS` does not name is orange."""
    names, looks = list(dict.fromkeys(variants)), list(CURVES)
    spare = iter(place for place in (1, 2, 3, 5, 0, 4) if (ORANGE, place) not in map(METHODS.get, names))
    chosen = {name: METHODS[name] if name in METHODS else (ORANGE, next(spare)) for name in names}
    return {name: looks[place] | {"color": color} for name, (color, place) in chosen.items()}


def error_curves(
    axis: plt.Axes, rows: pd.DataFrame, x: str, styles: Mapping[str, Look], y: str = "kl", floor: float | None = None
) -> None:
    """One curve of `y` against the column `x` for each variant that `styles` names, with its standard errors.

    Values below `floor` are drawn there. Variants without rows are left out.
    """
    for variant, look in styles.items():
        line = rows[rows["variant"].eq(variant)]
        if len(line):
            heights = line[y] if floor is None else line[y].clip(floor)
            axis.errorbar(line[x], heights, line.get(f"{y}_se"), **look, label=variant.replace("_", " "))


def name(axis: plt.Axes, text: str, place: tuple[float, float], color: str, shift: tuple = (6, 0), **more: Any) -> None:
    """A name beside a curve, in the place of a legend: in its colour, darkened to be read, `shift` points away."""
    look: dict[str, Any] = {"color": [0.75 * part for part in to_rgb(color)], "fontsize": 8, "va": "center"} | more
    axis.annotate(text, place, shift, textcoords="offset points", path_effects=HALO, **look)


def interval(rows: pd.DataFrame) -> pd.DataFrame:
    """How far below and above each share closed its interval reaches, as `errorbar` takes it."""
    return pd.DataFrame([rows["gap_closed"] - rows["gap_low"], rows["gap_high"] - rows["gap_closed"]]).astype(float)


def shared_legend(figure: Figure, axis: plt.Axes, columns: int = 3) -> None:
    """The legend of one panel, below all of them."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=columns)
