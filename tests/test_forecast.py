"""The forecast counts what a run computes, and what other models would make of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chassis_utils.files import ROOT
from chassis_utils.lm.model import load
from chassis_utils.paper.plan import PlanError, plan

FORECAST = ROOT / "paper" / "forecast"
sys.path.insert(0, str(FORECAST))
import cost  # noqa: E402
import forecast  # noqa: E402

PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
import counting
import torch
from chassis_utils import collect, load
from chassis_utils.linalg.moments import Moments
from chassis_utils.linalg.regression import vocabulary_metric
model = load("models/port-llama")
counting.COUNTS.clear()
ids = torch.tensor([[5, 6, 7, 8, 9]])
with torch.inference_mode():
    h = model.body(ids).last_hidden_state[0]
model.head(h).log_softmax(-1)
Moments.of(h, h)
torch.linalg.eigh(torch.eye(10))
torch.linalg.svd(torch.ones(10, 30))
torch.ones(10, 20) @ torch.ones(20, 300)
torch.cholesky_solve(torch.ones(10, 300), torch.eye(10))
vocabulary_metric(model.head.weight, torch.ones(4096, dtype=torch.float64) / 4096)
counting.write({to!r})
"""
LLAMA, PHI = cost.Model.of("models/port-llama"), cost.Model.of("models/expert-phi")


def test_each_kind_of_work_is_counted(tmp_path: Path) -> None:
    to = tmp_path / "counts.json"
    subprocess.run([sys.executable, "-c", PROGRAM.format(folder=str(FORECAST), to=str(to))], cwd=ROOT, check=True)
    counts = json.loads(to.read_text())
    d, v = 256, 4096
    assert counts.pop("seconds") > 0
    assert counts == {
        "pass LlamaDecoderLayer 4": 5 * 8,
        "calls of blocks": 8,
        "head torch.float32 4 4096": 5,
        "logits 4096": 5 * v,
        "moments": (1 / 2 + 1 + 1 / 2) * 5 * d**2,
        "most moments": 3 * d**2,
        "metric": v * d**2 / 2,
        "cubes": 7 * 10**3,
        "product": 10 * 20 * 300,
        "solve": 17 * 10 * 10 * 30 + 10 * 10 * 300,
    }


TRAINED = """
import sys
sys.path.insert(0, {folder!r})
import counting
import torch
from chassis_utils import load
network = load("models/port-llama").network
counting.COUNTS.clear()
network.model.layers[{layer}].requires_grad_(True)
network(torch.tensor([[5, 6, 7, 8]])).logits.sum().backward()
counting.write({to!r})
"""


@pytest.mark.parametrize("layer", [0, 6])
def test_passes_back_are_counted_where_there_are_any(tmp_path: Path, layer: int) -> None:
    to = tmp_path / "counts.json"
    program = TRAINED.format(folder=str(FORECAST), to=str(to), layer=layer)
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    counts, above = json.loads(to.read_text()), 8 - layer - 1
    back = 2 + above  # to the weights of the trained block and to its inputs, and through those above it
    assert counts["pass LlamaDecoderLayer 4"] == 4 * (8 + back)


def test_sizes_are_those_of_the_network() -> None:
    model = load("models/port-llama")
    assert (LLAMA.depth, LLAMA.width, LLAMA.vocabulary) == (model.depth, model.width, len(model.head.weight))
    assert LLAMA.block == sum(parameter.numel() for parameter in model.blocks[0].parameters())


@pytest.mark.parametrize(
    ("name", "billions"), [("TinyLlama", 1.1), ("phi-2", 2.78), ("Llama-2-7b", 6.74)]
)  # as their authors count them
def test_published_models_have_as_many_weights_as_their_names_say(name: str, billions: float) -> None:
    for model in (model for key, model in cost.PUBLISHED.items() if name in key):
        assert model.weights == pytest.approx(1e9 * billions, rel=0.01)


def test_more_tokens_and_wider_models_take_longer() -> None:
    wide = cost.Model(cost.llama(1024, 2816, 4, 16, 16), 3.0)
    assert cost.seconds(wide, "pass", 32) > 4 * cost.seconds(LLAMA, "pass", 32)
    assert cost.seconds(wide, "float64", 32) > cost.seconds(LLAMA, "float64", 32)
    assert cost.seconds(LLAMA, "pass", 1) > 2 * cost.seconds(LLAMA, "pass", 256)


WIDE = cost.Model(cost.llama(512, 1024, 16, 8, 8), LLAMA.bytes_per_token / 2)  # twice as many tokens


def test_work_grows_with_the_model_as_its_formulas_say() -> None:
    counts = {"pass LlamaDecoderLayer 64": 1.0, "pass PhiDecoderLayer 64": 2.0, "head torch.float64 8 5120": 9.0}
    counts |= {"logits 4096": 11.0, "moments": 3.0, "cubes": 5.0, "metric": 7.0, "seconds": 1.0, "most states": 1.0}
    counts |= {"product": 13.0, "solve": 17.0}
    work = forecast.work_of(counts, {"base": WIDE, "expert": PHI}, {"base": LLAMA, "expert": PHI}, False)
    more = WIDE.vocabulary / 4096
    assert work == {
        ("base", "pass", 64): 2.0 * 16 / 8,
        ("expert", "pass", 64): 2.0,
        ("expert", "float64", 8): 9.0,
        ("base", "logits", 32): forecast.OTHER_METRICS * more * 11,
        ("base", "square", 512): pytest.approx(4 * 3 + 8 * 5 + more * (4 * 7 + 2 * 13 + 4 * 17)),
    }


def test_work_at_every_layer_grows_with_the_depth() -> None:
    for layers, more in ((False, 1), (True, 17 / 9)):
        work = forecast.work_of({"cubes": 7.0}, {"base": WIDE}, {"base": LLAMA}, layers)
        assert work == {("base", "square", 512): pytest.approx(more * 8 * 7)}
    assert set(forecast.EACH_LAYER) <= {step.notebook.stem for step in plan(ROOT, "original")}


def test_operations_are_two_for_each_weight_that_is_multiplied() -> None:
    work = {
        ("base", "pass", 8): 3.0,
        ("base", "float64", 8): 5.0,
        ("base", "square", 512): 7.0,
        ("base", "logits", 32): 9.0,
    }
    assert forecast.operations({"base": LLAMA}, work) == 2 * (3 * LLAMA.block + 5 * 4096 * 256 + 7)


def test_a_notebook_is_rehearsed_once_and_forecast_for_larger_models(tmp_path: Path) -> None:
    (step,) = [step for step in plan(ROOT, "original") if step.notebook.stem.startswith("30_")]
    row = forecast.forecast(step, tmp_path)
    assert row["hours"] * 3600 > 5 * row["rehearsal_s"]
    assert 4 < row["memory_gib"] < 10  # TinyLlama in float32, and its head once more in float64
    before = {path: path.stat().st_mtime for path in tmp_path.glob("30_*")}
    assert forecast.forecast(step, tmp_path)["rehearsal_s"] == row["rehearsal_s"]
    assert {path: path.stat().st_mtime for path in tmp_path.glob("30_*")} == before


def test_a_profile_that_is_not_there_is_one_sentence() -> None:
    done = subprocess.run(
        [sys.executable, FORECAST / "forecast.py", "--profile", "nothing"],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "120"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: profile 'nothing' is unknown: choose one of micro, original, real")


def test_a_model_that_cannot_be_reached_is_one_sentence() -> None:
    with pytest.raises(PlanError, match="model 'no/such' is neither a folder nor a hub model that can be reached"):
        cost.Model.of("no/such")
