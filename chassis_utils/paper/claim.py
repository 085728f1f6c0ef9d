"""What a claim of the paper is: a sentence, a table, the number that decides it, and a condition.

A table is that of one profile, and `rank` that of the synthetic expert there. Divergences are in nats; below `EXACT` an
adapter is the expert up to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

EXACT = 1e-6
Answer = tuple[Any, Any]  # the number, and whether the claim holds


@dataclass(frozen=True)
class Claim:
    """One sentence of the paper about one table."""

    sentence: str
    table: str
    measure: str  # what the number is
    question: Callable[[pd.DataFrame, int], Answer]

    def answer(self, rows: pd.DataFrame, rank: int) -> tuple[float, bool]:
        """The number that decides the claim on the table of one profile, and whether it holds there."""
        value, holds = self.question(rows, rank)
        return float(value), bool(holds)


_CLAIMS: dict[str, Claim] = {}  # by sentence


def claim(table: str, measure: str) -> Callable[[Callable[[pd.DataFrame, int], Answer]], None]:
    """Put the decorated question on the list; its docstring is the sentence that it decides."""

    def put(question: Callable[[pd.DataFrame, int], Answer]) -> None:
        sentence = (question.__doc__ or "").rstrip(".")
        _CLAIMS[sentence] = Claim(sentence, table, measure, question)

    return put


def claims() -> list[Claim]:
    """Those on the list."""
    return list(_CLAIMS.values())


def wide(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """KL, one column for each variant; an expert as drawn, without a size of edit, counts as size zero."""
    sized = table.assign(edit_kl=table["edit_kl"].fillna(0.0)) if "edit_kl" in table else table
    return sized.pivot_table(index=keys, columns="variant", values="kl")


def rounding(kl: float) -> bool:
    """Whether a KL, or an excess of one, is no more than rounding."""
    return kl < EXACT


def exact(rows: pd.DataFrame) -> Answer:
    """The largest KL of what is corrected, which should be rounding."""
    kl = rows.loc[rows["variant"].eq("corrected"), "kl"].max()
    return kl, rounding(kl)


def worse_than_nothing(rows: pd.DataFrame) -> Answer:
    """The least KL of what is as reported over that of the untouched base, which should be above one."""
    reported = rows[rows["variant"].eq("as_reported")]
    share = (reported["kl"] / reported["base_kl"]).min()
    return share, share > 1
