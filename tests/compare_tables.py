"""Compare the tables of the working tree with the committed ones; exit with an error where they disagree.

Same columns, same text, same integers; decimals within a tolerance, because float32 sums differ
between processors and thread counts. Columns of measured time are not compared.
"""

import subprocess
import sys
from io import StringIO

import numpy as np
import pandas as pd

from chassis_utils.files import ROOT

RTOL, ATOL = 2e-2, 1e-6  # as in notebooks/conftest.py
MEASURED = ("seconds", "tokens_per_s", "speedup", "ceiling", "share_of_ceiling")  # how columns of time begin


def differences(new: pd.DataFrame, stored: pd.DataFrame) -> list[str]:
    """What disagrees, one line each."""
    if list(new) != list(stored) or len(new) != len(stored):
        return [f"{len(new)} rows of {list(new)} instead of {len(stored)} rows of {list(stored)}"]
    found = []
    for column in (name for name in stored if not name.startswith(MEASURED)):
        equal = _equal(new[column], stored[column])
        if not equal.all():
            row = int(np.argmin(equal))
            count, values = int((~equal).sum()), f"{new[column][row]!r} instead of {stored[column][row]!r}"
            found.append(f"column {column}, {count} of {len(equal)} rows, first row {row}: {values}")
    return found


def _equal(new: pd.Series, stored: pd.Series) -> np.ndarray:
    if pd.api.types.is_float_dtype(stored) and pd.api.types.is_numeric_dtype(new):
        return np.isclose(new, stored, rtol=RTOL, atol=ATOL, equal_nan=True)
    return ((new == stored) | (new.isna() & stored.isna())).to_numpy()


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Compare every committed table."""
    names = [name for name in _git("ls-tree", "--name-only", "HEAD", "paper/tables/").split() if name.endswith(".csv")]
    if not names:
        sys.exit("no committed tables to compare with: commit paper/tables")
    failures = []
    for name in names:
        new, stored = pd.read_csv(ROOT / name), pd.read_csv(StringIO(_git("show", f"HEAD:{name}")))
        failures += [f"{name}: {difference}" for difference in differences(new, stored)]
    print(f"{len(names)} tables compared with the committed ones (rtol {RTOL}, atol {ATOL})")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
