"""The low-rank part of what training changed: exact where the change has that rank, nearest on the inputs where not."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from chassis_utils.adapters.extraction import extract
from chassis_utils.lm.forward import token_logits
from chassis_utils.lm.model import LanguageModel
from chassis_utils.metrics import kl_divergence

TEXTS = ["What is 3 + 4?", "Explain entropy", "Go on then", "The array has", "def area(", "A prompt of several words"]
PLACES = ("q_proj", "down_proj")


def changed(base: LanguageModel, rank: int) -> LanguageModel:
    """The base with a random change of that rank in two layers of every block."""
    network, generator = copy.deepcopy(base.network), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if any(place in name for place in PLACES):
                down, up = torch.randn(2, max(weight.shape), rank, generator=generator)
                weight.add_(0.3 * up[: weight.shape[0]] @ down[: weight.shape[1]].T / rank)
    return replace(base, network=network, fingerprint="changed")


def test_a_change_of_that_rank_is_found_and_read_by_peft(tiny_llama_model: LanguageModel, tmp_path: Path) -> None:
    base = tiny_llama_model
    sibling, rows = changed(base, 2), base.encode(TEXTS)
    found = extract(base, sibling, TEXTS, rank=2)
    wanted = token_logits(sibling, rows, every_token=True)
    assert kl_divergence(wanted, token_logits(base, rows, every_token=True)).mean() > 1e-3
    torch.testing.assert_close(token_logits(found.model, rows, every_token=True), wanted, atol=1e-3, rtol=1e-3)
    found.save(tmp_path)
    read = replace(base, network=PeftModel.from_pretrained(copy.deepcopy(base.network), tmp_path).base_model.model)
    torch.testing.assert_close(token_logits(read, rows, every_token=True), wanted, atol=1e-3, rtol=1e-3)


def test_at_a_lower_rank_it_is_nearer_on_the_inputs_than_a_plain_decomposition(tiny_llama_model: LanguageModel) -> None:
    base = tiny_llama_model
    sibling = changed(base, 6)
    path = "model.layers.0.self_attn.q_proj"
    inputs: list[torch.Tensor] = []
    layer = base.network.get_submodule(path)
    with torch.inference_mode(), layer.register_forward_pre_hook(lambda _, x: inputs.append(x[0][0].double())):
        for row in base.encode(TEXTS):
            base.body(torch.tensor([row]))
    x = torch.cat(inputs)
    change = (sibling.network.get_submodule(path).weight - layer.weight).detach().double()
    made = extract(base, sibling, TEXTS, rank=1).model.network.get_submodule(path)
    ours = (made.scaling["default"] * made.lora_B["default"].weight @ made.lora_A["default"].weight).detach()
    u, s, vt = torch.linalg.svd(change, full_matrices=False)
    plain = s[0] * torch.outer(u[:, 0], vt[0])
    whole, off, plainly = (float((x @ part.T).norm()) for part in (change, change - ours.double(), change - plain))
    assert off < plainly < whole


def test_what_cannot_be_extracted_is_refused(tiny_llama_model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="differs from that of"):
        extract(tiny_llama_model, tiny_llama_model, TEXTS, rank=2)
    with pytest.raises(ValueError, match="rank 0"):
        extract(tiny_llama_model, changed(tiny_llama_model, 2), TEXTS, rank=0)


def test_other_texts_give_another_fingerprint_and_unchanged_layers_nothing(tiny_llama_model: LanguageModel) -> None:
    base = tiny_llama_model
    sibling = changed(base, 6)
    with torch.no_grad():  # one layer alone
        for name, weight in sibling.network.named_parameters():
            if "layers.1" in name or "down_proj" in name:
                weight.copy_(base.network.get_parameter(name))
    first, second = (extract(base, sibling, texts, rank=1) for texts in (TEXTS[:3], TEXTS[3:]))
    assert first.model.fingerprint != second.model.fingerprint
    layer = base.network.get_submodule("model.layers.0.self_attn.q_proj")
    assert first.parameters == sum(layer.weight.shape)
