"""The claims of the paper, as questions to its tables (`paper.claim`)."""

import math

import pandas as pd

from chassis_utils.paper.claim import CLAIMS, EXACT, Answer, claim, exact, wide, worse_than_nothing

ALL = CLAIMS  # filled below


def _documents(rows: pd.DataFrame) -> pd.DataFrame:
    """Compressed layers on held-out documents, one column for each kind."""
    return wide(rows[rows["split"].eq("document")], ["where", "layers", "block_size"])


@claim("an adapter with the expert's factors is the expert", "exact_adapter", "largest KL")
def _(rows: pd.DataFrame, rank: int) -> Answer:
    return exact(rows[rows["dtype"].eq("float32")])


@claim(
    "regressing squeezed states is worse than no adapter",
    "hidden_alignment",
    "least KL over base KL, an eighth of the width",
)
def _(rows: pd.DataFrame, rank: int) -> Answer:
    return worse_than_nothing(rows[rows["dimension"].eq(rows["dimension"].max() // 8)])


@claim(
    "below the expert's rank the corrected regression beats method A",
    "rank_sweep",
    "median KL as reported over corrected",
)
def _(rows: pd.DataFrame, rank: int) -> Answer:
    kl = wide(rows, ["split", "edit_kl", "rank"])
    low = kl.index.get_level_values("rank") < rank
    ratio = (kl["as_reported"] / kl["corrected"])[low]
    return ratio.median(), ratio.min() >= 1


@claim("from the expert's rank on the regression is exact", "rank_sweep", "largest KL")
def _(rows: pd.DataFrame, rank: int) -> Answer:
    return exact(rows[rows["rank"].ge(rank)])


@claim(
    "the lens from the embeddings has learned its templates",
    "lens_kl",
    "its KL on documents over that on its templates",
)
def _(rows: pd.DataFrame, rank: int) -> Answer:
    kl = rows[rows["variant"].eq("as_reported") & rows["layer"].eq(0)].set_index("split")["kl"]
    return kl["document"] / kl["index"], kl["document"] > 10 * kl["index"]


@claim(
    "a corrected lens from the embeddings reads documents better than a constant",
    "lens_kl",
    "its KL over the constant's",
)
def _(rows: pd.DataFrame, rank: int) -> Answer:
    kl = rows[rows["layer"].eq(0) & rows["split"].eq("document")].set_index("variant")["kl"]
    return kl["corrected"] / kl["constant"], kl["corrected"] < kl["constant"]


@claim("a middle lens as reported is far worse than no adapter", "multilayer_rank_sweep", "least KL over base KL")
def _(rows: pd.DataFrame, rank: int) -> Answer:
    return worse_than_nothing(rows)


@claim(
    "the edit read from a middle layer helps on documents",
    "multilayer_rank_sweep",
    "best KL over base KL, in the edit that favours it least",
)
def _(rows: pd.DataFrame, rank: int) -> Answer:
    here = rows[rows["variant"].eq("edit_read_here") & rows["split"].eq("document")]
    share = (here["kl"] / here["base_kl"]).groupby(here["edit_kl"]).min().max()
    return share, share < 1


@claim(
    "for an edit of the last state one adapter is as good as a stack of its rank",
    "stacking",
    "largest excess of its KL over the stack's, nats",
)
def _(rows: pd.DataFrame, rank: int) -> Answer:
    kl = wide(rows, ["split", "edit_kl", "ranks"])
    excess = (kl["single_of_total_rank"] - kl["corrected"]).max()
    return excess, excess < EXACT


@claim("the stack as reported is worse than no adapter", "stacking", "least KL over base KL")
def _(rows: pd.DataFrame, rank: int) -> Answer:
    return worse_than_nothing(rows)


@claim(
    "as reported, a map between states gets worse with rank",
    "hidden_to_hidden",
    "least factor of the KL from the smallest rank to an eighth of the width",
)
def _(rows: pd.DataFrame, rank: int) -> Answer:
    drawn = rows[rows["edit_kl"].isna() & rows["variant"].eq("as_reported")]
    kl = drawn[drawn["rank"].le(drawn["rank"].max() / 8)].pivot_table(index="rank", columns="split", values="kl")
    factor = (kl.iloc[-1] / kl.iloc[0]).min()
    return factor, factor > 1


@claim("regressing the edit is exact from the expert's rank on", "hidden_to_hidden", "largest KL")
def _(rows: pd.DataFrame, rank: int) -> Answer:
    return exact(rows[rows["rank"].ge(rank)])


@claim(
    "Adam at the study's rate throws its start away in the first pass",
    "gradient_refinement",
    "least KL after the pass over the start's, as a power of ten",
)
def _(rows: pd.DataFrame, rank: int) -> Answer:
    blown = rows[rows["variant"].eq("full_vocabulary") & rows["rate"].eq(0.01)]
    factor = (blown["first_pass_kl"] / blown["start_kl"]).min()
    return 10.0 ** round(math.log10(factor)), factor > 100  # such a step multiplies rounding errors


@claim("Gauss-Newton steps leave nobody worse off", "gradient_refinement", "largest KL over the start's")
def _(rows: pd.DataFrame, rank: int) -> Answer:
    steps = rows[rows["variant"].eq("corrected")]
    return (steps["kl"] / steps["start_kl"]).max(), (steps["kl"] <= steps["start_kl"] + steps["kl_se"]).all()


@claim(
    "fitted on one template an adapter carries less to real text than fitted on real text",
    "stress_test",
    "least KL of the former over the latter's, half rank",
)
def _(rows: pd.DataFrame, rank: int) -> Answer:
    half = rows[rows["family"].eq("natural") & rows["variant"].isin(["half_rank", "transfer_half"])]
    kl = half[half["expert_rank"].eq(rank) & half["edit_kl"].eq(0.5)].set_index("fitted_on")["kl"]
    factor = kl[["math", "physics"]].min() / kl["natural"]
    return factor, factor > 1


@claim("an intercept alone follows a constant shift", "logit_bias", "largest KL")
def _(rows: pd.DataFrame, rank: int) -> Answer:
    return exact(rows)


@claim("method A follows a constant shift nowhere", "logit_bias", "largest gap closed")
def _(rows: pd.DataFrame, rank: int) -> Answer:
    share = rows.loc[rows["variant"].eq("as_reported"), "gap_closed"].max()
    return share, share < 0.5


@claim(
    "an adapter follows a trained sibling on questions",
    "same_tokenizer_expert",
    "gap closed, math and reasoning, the lesser",
)
def _(rows: pd.DataFrame, rank: int) -> Answer:
    share = rows[rows["variant"].eq("corrected")].groupby("family")["gap_closed"].max()
    return share[["math", "reasoning"]].min(), share[["math", "reasoning"]].min() > 0.5


@claim("on real text it follows the sibling by half at most", "same_tokenizer_expert", "gap closed")
def _(rows: pd.DataFrame, rank: int) -> Answer:
    corrected = rows[rows["variant"].eq("corrected") & rows["family"].eq("natural")]
    return corrected["gap_closed"].max(), corrected["gap_closed"].max() < 0.5


@claim("the gate leaves nobody worse off", "same_tokenizer_expert", "least gap closed, in standard errors")
def _(rows: pd.DataFrame, rank: int) -> Answer:
    gated = rows[rows["variant"].eq("gated")]
    ahead = ((gated["base_kl"] - gated["kl"]) / gated["kl_se"]).min()
    return ahead, ahead > -1


@claim(
    "edits in every block follow a prompted expert further than one of the last state",
    "prompted_expert",
    "least factor between their KL",
)
def _(rows: pd.DataFrame, rank: int) -> Answer:
    kl = wide(rows, ["expert"])
    factor = (kl["last_state"] / kl["every_block"]).min()
    return factor, factor > 1


@claim(
    "a text bridge that hits its target is worse than no adapter",
    "text_bridge",
    "KL of the rescored target over base KL",
)
def _(rows: pd.DataFrame, rank: int) -> Answer:
    target = rows[rows["variant"].eq("rescored_target")].iloc[0]
    return target["kl"] / target["base_kl"], target["kl"] > target["base_kl"]


@claim(
    "a bridge by bytes is closer than one by strings", "bridge_quality", "total variation of stage A over that of bytes"
)
def _(rows: pd.DataFrame, rank: int) -> Answer:
    distance = rows.set_index("variant")["total_variation"]
    return distance["stage_a"] / distance["byte_exact"], distance["stage_a"] > distance["byte_exact"]


@claim(
    "an adapter of the base's own state follows a bridged expert by a fifth at most",
    "bridge_adapter",
    "largest gap closed",
)
def _(rows: pd.DataFrame, rank: int) -> Answer:
    share = rows.loc[rows["variant"].isin(["corrected", "refined", "gated"]), "gap_closed"].max()
    return share, share < 0.2


@claim("a map that reads the expert's state is closer than any of the base's", "semantic_bridge", "its KL over theirs")
def _(rows: pd.DataFrame, rank: int) -> Answer:
    kl = rows.groupby("variant")["kl"].min()
    share = kl["distilled"] / kl[["adapter", "gated"]].min()
    return share, share < 1


@claim(
    "the base with the expert of another tokenizer beside it predicts text better than either",
    "device_alongside",
    "bits per byte saved over the better one, in standard errors",
)
def _(rows: pd.DataFrame, rank: int) -> Answer:
    mixes = rows[rows["variant"].eq("mix_expert")]
    chosen = mixes[mixes["split"].eq("val")].sort_values("bits_per_byte")["weight"].iloc[0]
    mix = mixes[mixes["split"].eq("test") & mixes["weight"].eq(chosen)].iloc[0]
    own = rows[rows["variant"].eq("own_tokens")].iloc[0]
    ahead = (mix["bits_saved"] - max(0.0, own["bits_saved"])) / mix["bits_saved_se"]
    return ahead, ahead > 0


@claim(
    "a layer averaged to circulant blocks is as good as deleted",
    "fft_patching",
    "median KL over that without the layers",
)
def _(rows: pd.DataFrame, rank: int) -> Answer:
    averaged = rows[rows["variant"].eq("as_reported") & rows["split"].eq("document")]
    share = (averaged["kl"] / averaged["base_kl"]).median()
    return share, 0.8 < share < 1.25


@claim("least squares at each frequency is closer than averaging", "fft_patching", "largest KL over the averaged one's")
def _(rows: pd.DataFrame, rank: int) -> Answer:
    kl = _documents(rows).dropna(subset="corrected")
    return (kl["corrected"] / kl["as_reported"]).max(), (kl["corrected"] < kl["as_reported"]).all()


@claim("circulant blocks beat low rank of equal size more often than not", "fft_patching", "share of places and sizes")
def _(rows: pd.DataFrame, rank: int) -> Answer:
    kl = _documents(rows).dropna(subset=["corrected", "low_rank_aware"])
    share = (kl["corrected"] < kl["low_rank_aware"]).mean()
    return share, share > 0.5
