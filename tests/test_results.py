"""The committed tables say what the paper claims of them, and nothing that is committed was edited by hand."""

import itertools
import re

import numpy as np
import pandas as pd
import pytest
from claims import CLAIMS
from prose import literal_numbers
from shown import disagreements

from chassis_utils.files import ROOT
from chassis_utils.paper.checksums import altered
from chassis_utils.paper.tables import EVALUATION_COLUMNS

TABLES = ROOT / "paper" / "tables"
EXPERT_RANK = 8  # on the shipped base of width 256


def table(name: str) -> pd.DataFrame:
    return pd.read_csv(TABLES / f"{name}.csv")


def test_every_result_is_as_a_run_has_put_it_in_place() -> None:
    assert altered(ROOT) == []


def test_tables_notebooks_and_figures_agree() -> None:
    assert disagreements(ROOT) == []


@pytest.mark.parametrize("name", ["paper", "details", "quantities"])
def test_every_measured_number_of_the_paper_comes_from_a_table(name: str) -> None:
    assert literal_numbers((ROOT / "paper" / f"{name}.typ").read_text(encoding="utf-8")) == []


def test_the_abstract_takes_its_numbers_from_the_verdicts() -> None:
    source = (ROOT / "paper" / "paper.typ").read_text(encoding="utf-8")
    abstract = source[source.index("*Abstract.*") : source.index("= Introduction")].partition("\n]")[0]
    assert set(re.findall(r"#([\w-]+)", abstract)) == {"verdict"}
    claims = set(table("verdicts")["claim"])
    assert set(re.findall(r'#verdict\("([^"]+)"', abstract)) <= claims


def test_every_figure_and_table_of_the_paper_is_referred_to() -> None:
    source = "".join((ROOT / "paper" / f"{name}.typ").read_text(encoding="utf-8") for name in ("paper", "details"))
    labels = re.findall(r"^(?:\)|.*\])\s*<([\w-]+)>$", source, re.MULTILINE)
    assert len(labels) > 40
    assert [label for label in labels if not re.search(rf"@{label}\b(?!-)", source)] == []


@pytest.mark.parametrize("path", sorted(TABLES.rglob("*.csv")), ids=lambda path: path.stem)
def test_every_evaluation_carries_its_scale(path: pd.DataFrame) -> None:
    found = pd.read_csv(path)
    if "kl" in found:
        assert set(EVALUATION_COLUMNS) <= set(found)
        assert (found["kl"] >= 0).all() and (found["base_kl"] > 0).all()
        assert found.loc[found["n_prompts"] > 1, "kl_se"].notna().all()


def test_every_shipped_model_reads_the_corpus_at_one_and_a_half_bits_per_byte_or_less() -> None:
    base_and_expert = table("models").set_index("model").loc[["port-llama", "expert-phi"], "bits_per_byte"]
    assert (base_and_expert <= 1.5).all()


@pytest.mark.parametrize("name", CLAIMS)
def test_the_claims_hold_on_the_committed_table(name: str) -> None:
    CLAIMS[name](table(name), EXPERT_RANK)


def test_every_claim_holds_on_the_shipped_models_and_what_differs_on_real_ones_has_a_reason() -> None:
    verdicts = table("verdicts")
    assert verdicts["holds_on_micro"].all()
    assert (verdicts["reason"].notna() == (verdicts["holds_on_micro"] != verdicts["holds_on_real"])).all()


def test_more_edits_follow_a_prompted_expert_further() -> None:
    closed = table("prompted_expert").pivot_table(index="expert", columns="variant", values="gap_closed")
    variants = ["steering_vector", "last_state", "four_blocks", "every_block"]
    for fewer, more in itertools.pairwise(variants):
        assert (closed[more] > closed[fewer]).all()


def test_middle_layers_as_reported_are_ten_times_worse_than_corrected_in_every_cell() -> None:
    keys = ["split", "edit_kl", "layer", "rank"]
    wide = table("multilayer_rank_sweep").pivot_table(index=keys, columns="variant", values="kl")
    assert (wide["corrected"] <= 0.1 * wide["as_reported"]).all()


def test_corrected_lenses_are_nowhere_worse_and_clearly_better_on_what_is_held_out() -> None:
    lenses = table("lens_kl").pivot_table(index=["split", "layer"], columns="variant", values=["kl", "kl_se"])
    lenses = lenses.drop(index="outside")  # one prompt has no standard error
    gap = lenses["kl", "corrected"] - lenses["kl", "as_reported"]
    error = np.hypot(lenses["kl_se", "corrected"], lenses["kl_se", "as_reported"])  # of a difference of two means
    assert (gap <= error + 1e-9).all()
    ratio = (lenses["kl", "corrected"] / lenses["kl", "as_reported"]).groupby("split").median()
    assert ratio["template"] < 0.85
    assert ratio["document"] < 0.2
