"""nbval with tolerance: decimals may differ a little where the text around them is the same.

Decimals (a point or an exponent) are results, and float32 sums differ between processors and
thread counts. Integers are counts, labels and settings: they must match exactly, like all other
text (`label 7` is not `label 8`), and so must version numbers. White space may differ: a table's
columns move with the width of its numbers. Figures are compared by presence.
"""

import math
import re
from typing import Any

from nbval.plugin import IPyNbCell

RTOL = 2e-2  # relative; reordered float32 sums move the shown three digits by less
ATOL = 1e-6  # absolute; below it a divergence is rounding noise around zero
DECIMAL = re.compile(r"((?<![\w.])-?\d[\d,]*(?:\.\d+(?:e[-+]?\d+)?|e[-+]?\d+)(?![\w]|\.\d))")

compare_exactly = IPyNbCell.compare_outputs


def agree(new: str, stored: str) -> bool:
    """Whether two texts are the same up to white space and small differences of their decimals."""
    new_parts, stored_parts = DECIMAL.split(new), DECIMAL.split(stored)  # text, decimal, text, ...
    return (
        len(new_parts) == len(stored_parts)
        and all(a.split() == b.split() for a, b in zip(new_parts[::2], stored_parts[::2], strict=True))
        and all(map(_close, new_parts[1::2], stored_parts[1::2]))
    )


def snap(new: Any, stored: Any) -> Any:
    """`new`, with every text replaced by the stored one that it agrees with."""
    if isinstance(new, str) and isinstance(stored, str):
        return stored if agree(new, stored) else new
    if isinstance(new, dict) and isinstance(stored, dict):
        return type(new)({key: snap(value, stored.get(key)) for key, value in new.items()})
    return new


def compare_outputs(cell: IPyNbCell, test: list[Any], ref: list[Any], skip_compare: Any = None) -> bool:
    """Compare as nbval does, warnings left out and close decimals snapped to the stored ones."""
    new, stored = ([output for output in outputs if output.get("name") != "stderr"] for outputs in (test, ref))
    snapped = [snap(*pair) for pair in zip(new, stored, strict=False)]
    return compare_exactly(cell, snapped + new[len(stored) :], stored, skip_compare)


def _close(new: str, stored: str) -> bool:
    a, b = (float(number.replace(",", "")) for number in (new, stored))
    return math.isclose(a, b, rel_tol=RTOL, abs_tol=ATOL)


IPyNbCell.compare_outputs = compare_outputs
