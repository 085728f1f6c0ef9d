"""What the paper claims of each table: checked on the committed ones, and on those of another base."""

from collections.abc import Callable

import pandas as pd

EXACT = 1e-6  # nats: below it an adapter is the expert up to rounding
CELL = ["split", "edit_kl"]


def _wide(table: pd.DataFrame, index: list[str], values: str = "kl") -> pd.DataFrame:
    """One column for each variant; an expert as drawn, without a size of edit, counts as size zero."""
    filled = table.assign(edit_kl=table["edit_kl"].fillna(0.0))
    return filled.pivot_table(index=index, columns="variant", values=values)


def exact_adapter(table: pd.DataFrame, rank: int) -> None:
    assert (table.loc[table["dtype"] == "float32", "kl"] < EXACT).all()


def hidden_alignment(table: pd.DataFrame, rank: int) -> None:
    corrected, reported = (table[table["variant"] == name] for name in ("corrected", "as_reported"))
    assert (corrected.loc[corrected["dimension"] >= rank, "kl"] < EXACT).all()
    eighth = reported[reported["dimension"] == reported["dimension"].max() // 8]
    assert (eighth["kl"] > eighth["base_kl"]).all()


def lens_kl(table: pd.DataFrame, rank: int) -> None:
    corrected = table[(table["variant"] == "corrected") & (table["depth"] == 1)]
    assert (corrected["kl"] < EXACT).all()


def rank_sweep(table: pd.DataFrame, rank: int) -> None:
    wide = _wide(table, [*CELL, "rank"])
    assert (wide["corrected"] <= wide["as_reported"]).all()
    ranks = wide.index.get_level_values("rank")
    assert (wide["as_reported"] / wide["corrected"])[ranks < rank].median() >= 2
    assert (wide["corrected"][ranks >= rank] < EXACT).all()


def expert_kinds(table: pd.DataFrame, rank: int) -> None:
    left = (table["kl"] / table["base_kl"]).groupby([table["variant"], table["split"]]).min()
    assert (left["linear"] < EXACT).all()
    assert left["bent", "document"] > 1e3 * left["linear", "document"]
    assert left["noisy", "document"] < 1.5 * left["floor", "document"]  # what the noise leaves, and little more


def multilayer_rank_sweep(table: pd.DataFrame, rank: int) -> None:
    wide = _wide(table, [*CELL, "layer", "rank"])
    assert (wide["as_reported"] > 2).all()
    share = wide["corrected"] / wide["as_reported"]
    assert (share.loc["index"] <= 0.1).all()
    assert (share < 1).mean() > 0.9  # on text unlike its own a small base reads little from its middle


def stacking(table: pd.DataFrame, rank: int) -> None:
    wide, error = (_wide(table, [*CELL, "ranks"], values) for values in ("kl", "kl_se"))
    best = wide.filter(like="alone").min(axis=1)
    assert (wide["corrected"] <= best + error["corrected"] + EXACT).all()
    study = wide[["corrected", "as_reported"]].dropna()  # as reported at the study's ranks alone
    assert len(study) and (study["corrected"] < study["as_reported"]).all()


def hidden_to_hidden(table: pd.DataFrame, rank: int) -> None:
    drawn = table[table["edit_kl"].isna() & (table["variant"] == "as_reported")]
    studied = drawn[drawn["rank"] <= drawn["rank"].max() / 8]  # ranks up to 256 of 2048, as in the study
    for _, line in studied.groupby("split"):
        assert line.sort_values("rank")["kl"].is_monotonic_increasing
    wide = _wide(table, [*CELL, "rank"])
    assert (wide["corrected"][wide.index.get_level_values("rank") >= rank] < EXACT).all()


def gradient_refinement(table: pd.DataFrame, rank: int) -> None:
    blown = table[table["variant"] == "full_vocabulary"].pivot_table(
        index="split", columns="rate", values="first_pass_kl"
    )
    steps = blown[[0.0001, 0.001, 0.01]].diff(axis=1).iloc[:, 1:]  # below, rounding of the start shows
    assert (steps > 0).all(axis=None)  # the larger the rate, the further from the exact start
    assert (blown[0.01] > 1e3 * blown[0.0001]).all()
    refined = table[table["variant"].isin(["corrected", "relative_adam"])]
    assert (refined["kl"] <= refined["start_kl"] * (1 + 1e-9)).mean() >= 0.9
    assert (refined["kl"] <= refined["start_kl"] + refined["kl_se"]).all()


def comparison(table: pd.DataFrame, rank: int) -> None:
    wide = table.pivot_table(index=["method", "split"], columns="variant", values="kl").dropna()
    assert (wide["corrected"] < wide["as_reported"]).all()
    assert (table.loc[table["method"] == "reduced rank", "kl"] < EXACT).all()


def stress_test(table: pd.DataFrame, rank: int) -> None:
    assert (table.loc[table["variant"].isin(["corrected", "transfer"]), "kl"] < EXACT).all()
    drawn = table[table["variant"] == "as_reported"]
    assert (drawn["base_kl"] < 1e-3).all()  # as drawn, the expert cannot be told from the base
    half = table[(table["family"] == "natural") & table["variant"].isin(["half_rank", "transfer_half"])]
    half = half[(half["expert_rank"] == rank) & (half["edit_kl"] == 0.5)].set_index("fitted_on")["kl"]
    assert half["natural"] < half[["math", "physics"]].min()


def fft_output_errors(table: pd.DataFrame, rank: int) -> None:
    assert (table["aware"] < table["average"]).all()


def fft_patching(table: pd.DataFrame, rank: int) -> None:
    wide = table[table["split"] == "document"].pivot_table(
        index=["where", "layers", "block_size"], columns="variant", values="kl"
    )
    wide = wide.dropna(subset="corrected")  # a deleted MLP has no block size
    assert len(wide) and (wide["corrected"] < wide[["as_reported", "low_rank"]].min(axis=1)).all()


def fft_calibration(table: pd.DataFrame, rank: int) -> None:
    fitted = table[(table["split"] == "document") & (table["start"] == "aware")]
    wide = fitted.pivot_table(index=["where", "layers", "block_size"], columns="variant", values=["kl", "kl_se"])
    assert (wide["kl", "corrected"] <= wide["kl", "uncalibrated"] + wide["kl_se", "uncalibrated"]).all()


def fft_results(table: pd.DataFrame, rank: int) -> None:
    assert (table.loc[table["layers"] == 0, "kl"] < EXACT).all()
    patched = table[table["layers"] > 0]
    assert len(patched) == 10 and (patched["corrected_kl"] < patched["kl"]).all()


def logit_bias(table: pd.DataFrame, rank: int) -> None:
    assert (table.loc[table["variant"] == "corrected", "kl"] < EXACT).all()
    assert (table.loc[table["variant"] == "as_reported", "gap_closed"] < 0.9).all()


def same_tokenizer_expert(table: pd.DataFrame, rank: int) -> None:
    best = table.pivot_table(index="family", columns="variant", values="kl", aggfunc="min")
    assert (best["logit_arithmetic"] <= best[["corrected", "refined"]].min(axis=1)).all()  # the bound
    assert best.loc["math", "corrected"] < 0.5 * best.loc["math", "as_reported"]


def text_bridge(table: pd.DataFrame, rank: int) -> None:
    kl = table.set_index("variant")["kl"]
    assert kl["rescored_target"] > table["base_kl"].iloc[0]  # reaching the target would be worse than nothing
    assert kl["corrected"] < kl[["as_reported", "closed_form"]].min()


def bridge_quality(table: pd.DataFrame, rank: int) -> None:
    distance = table.set_index("variant")["total_variation"]
    assert distance["byte_exact"] <= 0.25 * distance["stage_a"]
    assert distance["look_ahead_16"] <= 0.02


def bridge_adapter(table: pd.DataFrame, rank: int) -> None:
    best = table.groupby("variant")["kl"].min()
    on_the_true_target, on_strings = best[["corrected", "refined"]], best[["as_reported", "stage_b", "closed_form"]]
    assert on_the_true_target.max() < on_strings.min()


def semantic_bridge(table: pd.DataFrame, rank: int) -> None:
    best = table.groupby("variant")["kl"].min()
    assert best["one_step"] < best["distilled"] < best["adapter"]


def device_alongside(table: pd.DataFrame, rank: int) -> None:
    mixes = table[table["variant"].eq("mix_expert")].set_index(["split", "weight"])
    weight = mixes.loc["val", "bits_per_byte"].idxmin()
    there = mixes.loc[("test", weight)]
    assert 0 < weight < 1
    assert there["bits_saved"] > 2 * there["bits_saved_se"]  # better than the base
    alone = mixes.loc[("test", 1.0), "bits_saved"]  # the expert in its place; a base that knows nothing adds nothing
    assert there["bits_saved"] > alone - there["bits_saved_se"]


def prompted_expert(table: pd.DataFrame, rank: int) -> None:
    assert (table["kl"] <= table["base_kl"] + table["kl_se"]).all()  # the gate leaves nobody worse off


def trained_style(table: pd.DataFrame, rank: int) -> None:
    kl = table.set_index("variant")["kl"]
    assert kl["every_block"] <= kl["last_state"] + table["kl_se"].max()
    assert kl["last_state"] <= kl["untouched"] + table["kl_se"].max()


def depth(table: pd.DataFrame, rank: int) -> None:
    closed = table[table["variant"].eq("closed_form")]
    assert (closed["kl"] <= closed["base_kl"] + closed["kl_se"]).all()


def sibling_at_depth(table: pd.DataFrame, rank: int) -> None:
    closed = table[table["variant"].isin(["last_state", "steering", "every_block"])]
    for _, both in closed.groupby(["expert", "variant"]):  # the gate judges documents and sums together
        saved = ((both["base_kl"] - both["kl"]) * both["n_prompts"]).sum()
        assert saved >= -(both["kl_se"] * both["n_prompts"]).sum()


def port(table: pd.DataFrame, rank: int) -> None:
    assert (table.loc[table["variant"].isin(["synthetic", "bias"]), "kl"] < EXACT).all()


CLAIMS: dict[str, Callable[[pd.DataFrame, int], None]] = {
    claim.__name__: claim
    for claim in (
        *(exact_adapter, hidden_alignment, lens_kl, rank_sweep, expert_kinds, multilayer_rank_sweep, stacking),
        *(logit_bias, same_tokenizer_expert, port, device_alongside),
        *(prompted_expert, trained_style, depth, sibling_at_depth),
        *(text_bridge, bridge_quality, bridge_adapter, semantic_bridge),
        *(fft_output_errors, fft_patching, fft_calibration, fft_results),
        *(hidden_to_hidden, gradient_refinement, comparison, stress_test),
    )
}
