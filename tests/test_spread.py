"""A base that memory does not hold is read from the disk block by block, and gives the same to the bit."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from chassis_utils import Port, extract, fit, load, replacements
from chassis_utils.adapters.depth import fit_sibling
from chassis_utils.adapters.lens import read_moments
from chassis_utils.adapters.lora import train_lora
from chassis_utils.files import MODELS
from chassis_utils.lm import states
from chassis_utils.lm.checkpoint import fingerprint
from chassis_utils.lm.model import LanguageModel

MEMORY = 20 * 2**20  # bytes, of the 35 MiB that the shipped base takes
SUMS = [f"What is {i} + {i + 3}? It is {2 * i + 3}." for i in range(60)]


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with too little memory for the base, as psutil would tell."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=MEMORY))


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return load("models/port-llama")


@pytest.fixture(scope="module")
def spread() -> Iterator[LanguageModel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=MEMORY))
        model = load("models/port-llama", device="auto")
    yield model


def test_some_blocks_stay_on_the_disk_until_they_are_needed(base: LanguageModel, spread: LanguageModel) -> None:
    assert set(spread.network.hf_device_map.values()) == {"cpu", "disk"}
    assert any(weight.is_meta for weight in spread.blocks[-1].parameters())
    assert not any(weight.is_meta for weight in spread.blocks[0].parameters())
    assert spread.head.fingerprint == base.head.fingerprint and spread.fingerprint == base.fingerprint


def test_states_and_moments_are_those_of_the_base_in_memory(
    base: LanguageModel, spread: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    for name, model in (("memory", base), ("disk", spread)):
        monkeypatch.setattr(states, "CACHE", tmp_path / name)  # which would know the states of the other
        read.append((states.collect(model, SUMS), read_moments(model, model, SUMS, [0] * len(SUMS))))
    (ours, moments), (theirs, others) = read
    assert torch.equal(ours, theirs)
    assert all(torch.equal(a.xy, b.xy) for (a,), (b,) in zip(moments, others, strict=True))


def test_adapters_are_fitted_plugged_in_and_unplugged(
    base: LanguageModel, spread: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sibling, answers = load("models/sibling-math"), []
    ids = torch.tensor(base.encode(SUMS[:1]))
    for name, model in (("memory", base), ("disk", spread)):
        monkeypatch.setattr(states, "CACHE", tmp_path / name)
        port = Port(model)
        port.plug("last", fit(model, sibling, SUMS, rank=4))
        port.plug("deep", fit_sibling(model, sibling, SUMS, rank=4))
        answers.append([port.generate("What is 4 + 7?", use, 8) for use in ("last", "deep")])
        port.unplug("last"), port.unplug("deep")
        with torch.inference_mode():
            assert torch.equal(model.network(ids).logits, base.network(ids).logits)
    assert answers[0] == answers[1] != [base.greedy("What is 4 + 7?", 8)] * 2


@pytest.mark.parametrize(
    "changing",
    [
        lambda base: extract(base, base, SUMS, 4),
        lambda base: next(train_lora(base, base.encode(SUMS), [], 4)),
        lambda base: replacements(base, [0], 8, how="average"),
    ],
    ids=["extraction", "LoRA", "circulant"],
)
def test_what_has_to_read_all_weights_says_so(
    spread: LanguageModel, changing: Callable[[LanguageModel], object]
) -> None:
    with pytest.raises(ValueError, match=r"needs all weights in memory, and some are on the disk: load it on one dev"):
        changing(spread)


def test_without_it_the_refusal_names_it(little: None) -> None:
    with pytest.raises(MemoryError, match=r"MiB of memory for the weights of .* are free: use device='auto'"):
        load("models/port-llama")


def test_a_lora_is_not_added_to_weights_that_are_spread(little: None) -> None:
    before = fingerprint(MODELS / "port-llama")
    with pytest.raises(ValueError, match=r"is a LoRA, which weights that are spread do not take: name a device"):
        load("models/port-llama-french", device="auto")
    assert fingerprint(MODELS / "port-llama") == before  # peft would write into its file
