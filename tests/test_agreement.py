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


EVALUATION = pd.DataFrame(
    {
        "variant": ["exact", "trained", "trained"],
        "kl": [2e-13, 0.0073, 0.5],
        "gap_closed": [1.0, 0.9808, 2.0e-5],
        "top1": [1.0, 0.9, 0.4],
        "n_prompts": [512, 512, 512],
        "chaotic": [False, True, False],
    }
)
ALIKE = {
    "below the floor": ("kl", 0, 8e-11),
    "an order of magnitude of a chaotic row": ("kl", 1, 0.0031),
    "the share that such a row closes": ("gap_closed", 1, 0.5),
    "a share closed, as what is left": ("gap_closed", 2, 3.0e-4),
    "two prompts of a near tie": ("top1", 2, 0.4 + 2 / 512),
}
MOVED = {
    "above the floor": ("kl", 0, 2e-9),
    "more than an order of magnitude": ("kl", 1, 0.08),
    "two percent": ("kl", 2, 0.51),
    "a third prompt": ("top1", 2, 0.4 + 3 / 512),
    "another variant": ("variant", 1, "exact"),
    "no longer chaotic": ("chaotic", 1, False),
}


def test_a_share_that_no_row_has_is_the_same_where_neither_has_it() -> None:
    shares = EVALUATION.assign(top1=[1.0, 0.9, None])
    assert differences(shares, shares) == []
    assert len(differences(EVALUATION, shares)) == len(differences(shares, EVALUATION)) == 1


HALF = pd.DataFrame({"dtype": ["float32", "float16"], "kl": [2e-6, 2e-6]})


def test_a_share_closed_is_compared_as_the_divergence_left() -> None:
    almost = pd.DataFrame({"base_kl": [0.005], "gap_closed": [1 - 1.6e-7]})  # 8e-10 nats are left: rounding
    assert differences(almost.assign(gap_closed=[1 - 1.9e-7]), almost) == []
    assert len(differences(almost.assign(gap_closed=[1 - 4e-7]), almost)) == 1
    assert len(differences(almost.assign(base_kl=[5.0], gap_closed=[1 - 1.9e-7]), almost.assign(base_kl=[5.0]))) == 1


def test_roundings_to_16_bits_pass_in_their_own_rows() -> None:
    assert differences(HALF.assign(kl=[2e-6, 2.1e-6]), HALF) == []
    assert len(differences(HALF.assign(kl=[2.1e-6, 2e-6]), HALF)) == 1
    assert len(differences(HALF.assign(kl=[2e-6, 2.3e-6]), HALF)) == 1


def test_answers_that_a_model_wrote_are_not_compared_but_the_questions_are() -> None:
    written = pd.DataFrame({"question": ["Why?"], "answer_edited": ["Arr, matey"]})
    assert differences(written.assign(answer_edited=["Arr, me hearty"]), written) == []
    assert len(differences(written.assign(question=["Who?"]), written)) == 1


def changed(column: str, row: int, value: object) -> pd.DataFrame:
    values = EVALUATION[column].tolist()
    values[row] = value
    return EVALUATION.assign(**{column: values})


@pytest.mark.parametrize("case", ALIKE)
def test_what_another_processor_may_change_passes(case: str) -> None:
    assert differences(changed(*ALIKE[case]), EVALUATION) == []


@pytest.mark.parametrize("case", MOVED)
def test_what_it_may_not_change_fails(case: str) -> None:
    assert len(differences(changed(*MOVED[case]), EVALUATION)) == 1
