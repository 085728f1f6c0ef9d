"""Prompts that begin alike are read together, each part once, and give what each of them alone gives."""

from pathlib import Path

import pytest
import torch
from conftest import Build
from hypothesis import given
from hypothesis import strategies as st
from test_architectures import ALIKE, CONFIGS
from transformers import AutoConfig

from chassis_utils.lm import states, tree
from chassis_utils.lm.forward import layer_states
from chassis_utils.lm.model import LanguageModel, load
from chassis_utils.lm.states import collect
from chassis_utils.lm.tree import Tree

BRANCHES = [
    "",
    " Then it slept",
    " Then it slept on the mat until noon.",
    " The moon was full, and the cat",
    " The moon",
]
NESTED = [ALIKE[0] + branch for branch in BRANCHES]  # some begin others, and branches are long


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=8))
def test_every_beginning_is_one_node_and_every_prompt_a_path(rows: list[list[int]]) -> None:
    found = Tree.of(rows)
    assert len(found.tokens) == len({tuple(row[: k + 1]) for row in rows for k in range(len(row))})
    for row, path in zip(rows, found.nodes, strict=True):
        assert [found.tokens[node] for node in path] == row
        assert [found.parents[node] for node in path] == [-1, *path[:-1]]


@pytest.mark.parametrize("texts", [ALIKE, NESTED], ids=["alike", "nested"])
def test_a_node_has_the_states_of_its_prompt_alone(
    texts: list[str], tiny_llama_model: LanguageModel, stories: LanguageModel
) -> None:
    for model in (tiny_llama_model, stories):
        ids = model.encode(texts)
        together = Tree.of(ids)
        assert together.suits(model)
        with torch.inference_mode():
            found = torch.stack(together.states(model))
            for row, path in zip(ids, together.nodes, strict=True):
                alone = torch.stack(layer_states(model, torch.tensor([row]), use_cache=False))[:, 0]
                torch.testing.assert_close(found[:, path], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "suits"),
    {
        **dict.fromkeys(["llama", "qwen3", "gemma", "phi", "gpt_neox", "mixtral"], True),
        **dict.fromkeys(["mistral", "gemma3_text", "llama4_text"], False),  # their windows are shorter than the prompts
        **dict.fromkeys(["bloom", "mpt", "gpt2", "mamba", "rwkv", "jamba"], False),  # positions of their own, or none
    }.items(),
)
def test_only_models_that_take_positions_and_masks_read_trees(name: str, suits: bool, build: Build) -> None:
    model = load(str(build(AutoConfig.for_model(name, **CONFIGS[name]))), device="cpu")
    assert Tree.of(model.encode(ALIKE)).suits(model) == suits


def test_a_falcon_with_alibi_reads_prompts_one_by_one(build: Build) -> None:
    model = load(str(build(AutoConfig.for_model("falcon", **CONFIGS["falcon"], alibi=True))), device="cpu")
    assert not Tree.of(model.encode(ALIKE)).suits(model)


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "cohere2"])
def test_a_window_has_to_hold_the_longest_prompt(
    name: str, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = max(map(len, load("models/port-llama").encode(NESTED)))
    for window, suits in ((longest, True), (longest - 1, False)):
        config = AutoConfig.for_model(name, **CONFIGS[name] | {"sliding_window": window})
        model = load(str(build(config)), device="cpu")
        ids = model.encode(NESTED)
        assert Tree.of(ids).suits(model) == suits
        monkeypatch.setattr(states, "CACHE", tmp_path / str(window))
        places = [[0, len(row) // 2, len(row) - 1] for row in ids]
        alone = [
            torch.stack(layer_states(model, torch.tensor([row]), use_cache=False))[:, 0, here]
            for row, here in zip(ids, places, strict=True)
        ]
        torch.testing.assert_close(collect(model, NESTED, places), torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)


def test_prompts_that_share_little_are_not_read_together(
    tiny_llama_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not Tree.of(tiny_llama_model.encode(["One day a cat", "Go on", "What is 3 + 4?"])).suits(tiny_llama_model)
    monkeypatch.setattr(tree, "MOST_NODES", 10)
    assert not Tree.of(tiny_llama_model.encode(ALIKE)).suits(tiny_llama_model)
