"""When two results are the same: decimals within a tolerance, all else exactly.

Float32 sums differ between processors and thread counts, so decimals (a point or an exponent) may differ a little
where everything around them is the same. Integers are counts, labels and settings: they must match exactly, like all
other text (`label 7` is not `label 8`), and so must version numbers. White space may differ: a table's columns
move with the width of its numbers. What was measured with a clock is not compared.
"""

import math
import re

import numpy as np
import pandas as pd

RTOL = 2e-2  # relative; reordered float32 sums move the shown three digits by less
ATOL = 1e-6  # absolute; below it a divergence is rounding noise around zero
MEASURED = ("seconds", "tokens_per_s", "speedup", "ceiling", "share_of_ceiling")  # how columns of time begin
DECIMAL = re.compile(r"((?<![\w.])-?\d[\d,]*(?:\.\d+(?:e[-+]?\d+)?|e[-+]?\d+)(?![\w]|\.\d))")


def texts_agree(new: str, stored: str) -> bool:
    """Whether two texts are the same up to white space and small differences of their decimals."""
    new_parts, stored_parts = DECIMAL.split(new), DECIMAL.split(stored)  # text, decimal, text, ...
    return (
        len(new_parts) == len(stored_parts)
        and all(a.split() == b.split() for a, b in zip(new_parts[::2], stored_parts[::2], strict=True))
        and all(map(_close, new_parts[1::2], stored_parts[1::2]))
    )


def table_differences(new: pd.DataFrame, stored: pd.DataFrame) -> list[str]:
    """What disagrees between two tables, one line each; nothing for tables that say the same."""
    if list(new) != list(stored) or len(new) != len(stored):
        return [f"{len(new)} rows of {list(new)} instead of {len(stored)} rows of {list(stored)}"]
    differences = []
    for column in (name for name in map(str, stored) if not name.startswith(MEASURED)):
        equal = _equal(new[column], stored[column])
        if not equal.all():
            row = int(np.argmin(equal))
            count, values = int((~equal).sum()), f"{new[column][row]!r} instead of {stored[column][row]!r}"
            differences.append(f"column {column}, {count} of {len(equal)} rows, first row {row}: {values}")
    return differences


def _close(new: str, stored: str) -> bool:
    a, b = (float(number.replace(",", "")) for number in (new, stored))
    return math.isclose(a, b, rel_tol=RTOL, abs_tol=ATOL)


def _equal(new: pd.Series, stored: pd.Series) -> np.ndarray:
    if pd.api.types.is_float_dtype(stored) and pd.api.types.is_numeric_dtype(new):
        return np.isclose(new, stored, rtol=RTOL, atol=ATOL, equal_nan=True)
    return ((new == stored) | (new.isna() & stored.isna())).to_numpy()
