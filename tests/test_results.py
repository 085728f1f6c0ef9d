"""The committed tables say what the paper claims of them."""

import numpy as np
import pandas as pd
import pytest

from chassis_utils.paths import ROOT
from chassis_utils.report import EVALUATION_COLUMNS

TABLES = ROOT / "paper" / "tables"


def table(name: str) -> pd.DataFrame:
    return pd.read_csv(TABLES / f"{name}.csv")


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.csv")), ids=lambda path: path.stem)
def test_every_evaluation_carries_its_scale(path: pd.DataFrame) -> None:
    found = pd.read_csv(path)
    if "kl" in found:
        assert set(EVALUATION_COLUMNS) <= set(found)
        assert (found["kl"] >= 0).all() and (found["base_kl"] > 0).all()
        assert found.loc[found["n_prompts"] > 1, "kl_se"].notna().all()


def test_every_shipped_model_reads_the_corpus_at_one_and_a_half_bits_per_byte_or_less() -> None:
    base_and_expert = table("models").set_index("model").loc[["port-llama", "expert-phi"], "bits_per_byte"]
    assert (base_and_expert <= 1.5).all()


def test_the_exact_adapter_is_exact_in_single_precision() -> None:
    exact = table("exact_adapter")
    assert (exact.loc[exact["dtype"] == "float32", "kl"] < 1e-6).all()


def test_the_corrected_alignment_is_exact_at_the_experts_rank_where_squeezed_states_are_nats_away() -> None:
    alignment = table("hidden_alignment")
    corrected, reported = (alignment[alignment["variant"] == name] for name in ("corrected", "as_reported"))
    assert (corrected.loc[corrected["dimension"] >= 8, "kl"] < 1e-6).all()
    eighth = reported[reported["dimension"] == reported["dimension"].max() // 8]
    assert (eighth["kl"] > eighth["base_kl"]).all()


def test_corrected_lenses_are_nowhere_worse_and_clearly_better_on_what_is_held_out() -> None:
    lenses = table("lens_kl").pivot_table(index=["split", "layer"], columns="variant", values=["kl", "kl_se"])
    lenses = lenses.drop(index="outside")  # one prompt has no standard error
    gap = lenses["kl", "corrected"] - lenses["kl", "as_reported"]
    error = np.hypot(lenses["kl_se", "corrected"], lenses["kl_se", "as_reported"])  # of a difference of two means
    assert (gap <= error + 1e-9).all()
    ratio = (lenses["kl", "corrected"] / lenses["kl", "as_reported"]).groupby("split").median()
    assert ratio["template"] < 0.85
    assert ratio["document"] < 0.2
