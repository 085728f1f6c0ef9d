"""The comparison of regenerated tables passes on rounding and fails on what has changed."""

import pandas as pd
import pytest

from chassis_utils.paper.agreement import table_differences as differences

STORED = pd.DataFrame({"variant": ["a", None], "rank": [1, 2], "kl": [0.5, float("nan")], "seconds": [1.0, 2.0]})


@pytest.mark.parametrize(
    "change", [{}, {"kl": [0.501, float("nan")]}, {"seconds": [9.0, 9.0]}], ids=["nothing", "rounding", "time"]
)
def test_equal_tables_pass(change: dict[str, list[object]]) -> None:
    assert differences(STORED.assign(**change), STORED) == []


@pytest.mark.parametrize(
    "change",
    [
        {"kl": [0.6, float("nan")]},
        {"kl": [0.5, 0.5]},
        {"kl": ["0.5", "none"]},
        {"rank": [1, 3]},
        {"variant": ["b", None]},
        {"more": 1},
    ],
    ids=lambda change: str(change),
)
def test_changed_table_fails(change: dict[str, list[object]]) -> None:
    assert len(differences(STORED.assign(**change), STORED)) == 1


def test_missing_row_fails() -> None:
    assert len(differences(STORED[:1], STORED)) == 1
