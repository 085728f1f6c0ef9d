"""Calibration moves the replacements alone, never ends above its start, and survives an interruption to the bit."""

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from chassis_utils.circulant.calibrate import Settings, _rates, _Run, calibrate
from chassis_utils.circulant.compare import Teacher, compare, summarise
from chassis_utils.circulant.patch import patch
from chassis_utils.circulant.replace import replacements
from chassis_utils.lm.model import LanguageModel
from chassis_utils.metrics import kl_divergence

WORDS = ("cats", "dogs", "rain", "music", "trees")
TRAIN = [f"What is {i} + {i + 1}? Tell me about {word}." for i, word in enumerate(WORDS)]
HELD_OUT = ["What is 9 + 10?", "Tell me about the sea and the rain.", "Dogs"]
BLOCK = 4
QUICK = Settings(steps=12, batch=3, rate=0.05, check_every=4)


def averaged(model: LanguageModel) -> dict[str, nn.Module]:
    """Both layers by averaging: always the same start."""
    return replacements(model, [0, 1], BLOCK, "average")


def values(found: dict[str, nn.Module]) -> list[Tensor]:
    return [parameter.detach().clone() for module in found.values() for parameter in module.parameters()]


def held_out_kl(model: LanguageModel, found: dict[str, nn.Module]) -> float:
    return float(compare(Teacher(model, HELD_OUT, True), found)["kl"].mean())


@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("name", ["tiny_llama_model", "tiny_phi"])
def test_it_lowers_the_held_out_kl_to_what_it_reports(
    name: str, every_token: bool, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    found = averaged(model)
    history = calibrate(model, found, TRAIN, HELD_OUT, Settings(40, 3, 0.05, every_token=every_token, patience=8))
    assert list(history.columns) == ["step", "train_kl", "held_out_kl"]
    assert history["held_out_kl"].min() < 0.9 * history["held_out_kl"][0]
    after = compare(Teacher(model, HELD_OUT, True), found)
    kl = (
        (after["kl_every_token"] * after["tokens"]).sum() / after["tokens"].sum() if every_token else after["kl"].mean()
    )
    assert kl == pytest.approx(history["held_out_kl"].min(), rel=1e-4)


@pytest.mark.parametrize("rate", [0.05, 30.0])
def test_it_never_ends_above_its_start(tiny_llama_model: LanguageModel, rate: float) -> None:
    found = averaged(tiny_llama_model)
    before = held_out_kl(tiny_llama_model, found)
    history = calibrate(tiny_llama_model, found, TRAIN, HELD_OUT, Settings(6, 3, rate, check_every=1, patience=2))
    assert held_out_kl(tiny_llama_model, found) <= before * (1 + 1e-9)
    if rate > 1:
        assert len(history) == 3 and history["held_out_kl"].argmin() == 0  # stopped early


def test_without_patience_the_last_state_stays(tiny_llama_model: LanguageModel) -> None:
    found = averaged(tiny_llama_model)
    history = calibrate(tiny_llama_model, found, TRAIN, HELD_OUT, Settings(6, 3, 30.0, patience=None))
    assert history["step"].tolist() == [0, 6]
    assert held_out_kl(tiny_llama_model, found) == pytest.approx(history["held_out_kl"][1], rel=1e-4)
    assert history["held_out_kl"][1] > history["held_out_kl"][0]


def test_the_replacements_alone_change(tiny_llama_model: LanguageModel) -> None:
    network = tiny_llama_model.network
    modules, before = list(network.modules()), {name: v.clone() for name, v in network.state_dict().items()}
    found = averaged(tiny_llama_model)
    start = values(found)
    calibrate(tiny_llama_model, found, TRAIN, HELD_OUT, QUICK)
    assert all(a is b for a, b in zip(modules, network.modules(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in network.parameters())
    assert not any(torch.equal(one, other) for one, other in zip(start, values(found), strict=True))


@pytest.mark.parametrize("block", [2, 8])
def test_a_step_is_a_share_of_each_parameter_or_absolute(tiny_phi: LanguageModel, block: int) -> None:
    for absolute in (False, True):
        found = replacements(tiny_phi, [0], block, "average")
        start = values(found)
        one = Settings(1, 3, 1e-2, absolute=absolute, patience=None)
        calibrate(tiny_phi, found, TRAIN, HELD_OUT, one)
        for before, after in zip(start, values(found), strict=True):
            size = 1.0 if absolute else float(before.square().mean().sqrt())
            assert float((after - before).abs().median()) == pytest.approx(1e-2 * size, rel=0.05)  # Adam's first


def test_a_bias_of_zeros_can_be_moved() -> None:
    own = dict(nn.Linear(8, 8).named_parameters())
    with torch.no_grad():
        own["bias"].zero_()
    rates = _rates(own, Settings(rate=0.1))
    assert rates["bias"] == rates["weight"] > 0


@pytest.mark.parametrize("failing", [2, 5, 9])
def test_an_interrupted_run_leaves_the_layers_as_they_were_and_another_gives_the_same_result(
    tiny_llama_model: LanguageModel, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = averaged(tiny_llama_model)
    history = calibrate(tiny_llama_model, whole, TRAIN, HELD_OUT, QUICK)
    count, original = 0, Teacher.loss
    interrupted = averaged(tiny_llama_model)
    start = values(interrupted)

    def loss(*arguments: object) -> Tensor:
        nonlocal count
        count += 1
        if count == failing:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Teacher, "loss", loss)
        with pytest.raises(KeyboardInterrupt):
            calibrate(tiny_llama_model, interrupted, TRAIN, HELD_OUT, QUICK)
    assert all(torch.equal(a, b) for a, b in zip(values(interrupted), start, strict=True))
    again = calibrate(tiny_llama_model, interrupted, TRAIN, HELD_OUT, QUICK)
    pd.testing.assert_frame_equal(again, history, check_exact=True)
    assert all(torch.equal(a, b) for a, b in zip(values(interrupted), values(whole), strict=True))


def test_an_interruption_takes_the_patch_off(tiny_llama_model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = list(tiny_llama_model.network.modules())

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_Run, "descend", interrupt)
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_llama_model, averaged(tiny_llama_model), TRAIN, HELD_OUT, QUICK)
    assert all(a is b for a, b in zip(modules, tiny_llama_model.network.modules(), strict=True))


def test_prompts_and_their_teachers_are_the_same_to_a_run(tiny_llama_model: LanguageModel) -> None:
    one, other = averaged(tiny_llama_model), averaged(tiny_llama_model)
    shared = [Teacher(tiny_llama_model, texts, QUICK.every_token) for texts in (TRAIN, HELD_OUT)]
    history = calibrate(tiny_llama_model, one, TRAIN, HELD_OUT, QUICK)
    pd.testing.assert_frame_equal(calibrate(tiny_llama_model, other, *shared, QUICK), history, check_exact=True)
    assert all(torch.equal(a, b) for a, b in zip(values(one), values(other), strict=True))


def test_what_cannot_be_calibrated_says_why(tiny_llama_model: LanguageModel) -> None:
    model = tiny_llama_model
    with pytest.raises(ValueError, match=r"prompt 'Dogs' is both trained on and held out"):
        calibrate(model, averaged(model), [*TRAIN, "Dogs"], HELD_OUT)
    with pytest.raises(ValueError, match=r"rate 0\.0 is not above zero"):
        Settings(rate=0.0)
    with pytest.raises(ValueError, match="nothing to calibrate"):
        calibrate(model, replacements(model, [0], BLOCK, "zero"), TRAIN, HELD_OUT)
    with pytest.raises(ValueError, match="every_token is False here and True of the teacher given"):
        calibrate(model, averaged(model), Teacher(model, TRAIN, True), HELD_OUT, QUICK)
    with pytest.raises(ValueError, match="the loss is nan after step 1: lower the rate"):
        calibrate(model, averaged(model), TRAIN, HELD_OUT, Settings(3, 3, 1e30, absolute=True))


def test_compare_is_each_prompt_by_itself(tiny_llama_model: LanguageModel) -> None:
    found = averaged(tiny_llama_model)
    frame = compare(Teacher(tiny_llama_model, HELD_OUT, True), found)
    for text, (_, row) in zip(HELD_OUT, frame.iterrows(), strict=True):
        ids = torch.tensor(tiny_llama_model.encode([text]))
        with torch.no_grad():
            teacher = tiny_llama_model.network(ids).logits[0]
            with patch(tiny_llama_model.network, found):
                student = tiny_llama_model.network(ids).logits[0]
        kl = kl_divergence(teacher, student)
        assert row["kl"] == pytest.approx(float(kl[-1]), rel=1e-4)
        assert row["kl_every_token"] == pytest.approx(float(kl.mean()), rel=1e-4)
        assert row["l2"] == pytest.approx(float((teacher[-1] - student[-1]).norm()), rel=1e-4)
        assert row["tokens"] == ids.shape[1]
        assert row["agreeing"] == sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(teacher, student, strict=True))
        order, other = (list(z[-1].argsort(descending=True)) for z in (teacher, student))
        assert (row["next"], row["patched_next"]) == (order[0], other[0])
        assert row["next_in_top5"] == (order[0] in other[:5])
        assert row["patched_next_in_top5"] == (other[0] in order[:5])
        assert row["top1"] == (order[0] == other[0])


def test_an_unchanged_network_agrees_everywhere(tiny_llama_model: LanguageModel) -> None:
    figures = summarise(compare(Teacher(tiny_llama_model, HELD_OUT, True), {}))
    tokens = sum(map(len, tiny_llama_model.encode(HELD_OUT)))
    assert figures["kl_mean"] == figures["l2_mean"] == figures["per_text_agreement_std"] == 0
    assert figures["top1_match"] == figures["next_in_top5"] == figures["n_prompts"] == 3
    assert figures["token_agreement"] == figures["token_total"] == tokens
    assert figures["cosine_mean"] == pytest.approx(1) and figures["top5_overlap_mean"] == 1
