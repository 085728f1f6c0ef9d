"""When two results are the same: decimals within a tolerance, all else exactly.

Float32 sums differ between processors and thread counts, so decimals (a point or an exponent) may differ a little
where everything around them is the same. Integers are counts, labels and settings: they must match exactly, like all
other text (`label 7` is not `label 8`), and so must version numbers. White space may differ: a table's columns
move with the width of its numbers.

In tables, further: shares of prompts may differ by two prompts, near ties; the share of a gap closed is compared as
the divergence that is left; rows that a notebook marks `chaotic` (training that multiplies rounding errors) say an
order of magnitude of their divergences and nothing else; rows computed in 16 bits, whose roundings jump with the last
digit of a float32 sum, are compared more coarsely; what was measured with a clock is not compared, and neither are the
answers that a model wrote, in which one near tie changes all that follows.
"""

import math
import re

import numpy as np
import pandas as pd

RTOL = 1e-2  # relative; reordered float32 sums move the shown three digits by less
RTOL_16_BITS = 0.1  # of rows whose `dtype` has 16 bits
ATOL = 1e-9  # absolute, nats for a divergence: below it is rounding, and shown as below it (`paper.tables`)
# How columns begin that are not compared: those of time and memory, and of written answers.
MEASURED = ("seconds", "peak", "tokens_per_s", "speedup", "ceiling", "share_of_ceiling", "share_of_seconds", "answer_")
SHARES = ("top1", "top5_overlap", "token_agreement", "same_top1", "french")  # of prompts, or of their tokens
TIES = 2  # prompts that may fall otherwise
CHAOTIC = 10.0  # factor by which the divergence of a chaotic row may differ
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
    chaotic = stored["chaotic"].to_numpy(dtype=bool) if "chaotic" in stored else np.zeros(len(stored), dtype=bool)
    for column in (name for name in map(str, stored) if not name.startswith(MEASURED)):
        equal = np.where(chaotic, _same_order(new[column], stored[column]), _equal(column, new, stored))
        if not equal.all():
            row = int(np.argmin(equal))
            count, values = int((~equal).sum()), f"{new[column][row]!r} instead of {stored[column][row]!r}"
            differences.append(f"column {column}, {count} of {len(equal)} rows, first row {row}: {values}")
    return differences


def _close(new: str, stored: str) -> bool:
    a, b = (float(number.replace(",", "")) for number in (new, stored))
    return math.isclose(a, b, rel_tol=RTOL, abs_tol=ATOL)


def _equal(column: str, new: pd.DataFrame, stored: pd.DataFrame) -> np.ndarray:
    ours, theirs = new[column], stored[column]
    if not (pd.api.types.is_float_dtype(theirs) and pd.api.types.is_numeric_dtype(ours)):
        return ((ours == theirs) | (ours.isna() & theirs.isna())).to_numpy()
    if column in ("gap_closed", "gap_low", "gap_high"):  # what is left of it is a divergence
        unit = stored.get("base_kl", 1.0)
        ours, theirs = (1 - ours) * unit, (1 - theirs) * unit
    if column in SHARES and "n_prompts" in stored:
        near = (ours - theirs).abs().le(TIES / stored["n_prompts"])
        return (near | (ours.isna() & theirs.isna())).to_numpy()
    rtol = np.full(len(stored), RTOL)
    if "dtype" in stored:
        rtol[stored["dtype"].isin(["float16", "bfloat16"])] = RTOL_16_BITS
    return np.isclose(ours, theirs, rtol=rtol, atol=ATOL, equal_nan=True)


def _same_order(new: pd.Series, stored: pd.Series) -> np.ndarray:
    """For chaotic rows: divergences within a factor, settings exactly, other measures not compared."""
    if not (pd.api.types.is_float_dtype(stored) and pd.api.types.is_numeric_dtype(new)):
        return ((new == stored) | (new.isna() & stored.isna())).to_numpy()
    if not str(stored.name).endswith("kl"):
        return np.ones(len(stored), dtype=bool)
    ours, theirs = (np.log10(np.maximum(values.to_numpy(), ATOL)) for values in (new, stored))
    return np.isclose(ours, theirs, rtol=0, atol=np.log10(CHAOTIC), equal_nan=True)
