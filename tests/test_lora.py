"""LoRA follows an expert, and the base stays as it was."""

import copy
from dataclasses import replace

import pytest
import torch

from chassis_utils.adapters.lora import equal_rank, train_lora
from chassis_utils.lm.forward import token_logits
from chassis_utils.lm.model import LanguageModel
from chassis_utils.lm.states import collect
from chassis_utils.metrics import kl_divergence

PROMPTS = ["What is 3 + 4?", "Explain entropy", "Go", "The array has", "def area(", "A longer prompt of several words"]


def test_training_comes_closer_to_the_expert_and_leaves_the_base(tiny_llama_model: LanguageModel) -> None:
    base = tiny_llama_model
    before = {name: value.clone() for name, value in base.network.state_dict().items()}
    logits = base.head(collect(base, PROMPTS)[-1])
    changed = copy.deepcopy(base.network)  # where LoRA can follow
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in changed.named_parameters():
            if "v_proj" in name:
                weight.add_(2 * torch.randn(len(weight), 1, generator=generator) * torch.ones(weight.shape[1]))
    expert = token_logits(replace(base, network=changed), base.encode(PROMPTS), every_token=False).detach()
    rows, targets = base.encode(PROMPTS), expert.split(1)
    *_, found = train_lora(base, rows, targets, equal_rank(base, 100), passes=20, batch=4, rate=0.05)
    assert kl_divergence(expert, found.logits(PROMPTS)).mean() < 0.3 * kl_divergence(expert, logits).mean()
    assert found.parameters >= 100
    assert all(torch.equal(value, before[name]) for name, value in base.network.state_dict().items())


def test_an_untrained_lora_is_the_base(tiny_llama_model: LanguageModel) -> None:
    base = tiny_llama_model
    logits = base.head(collect(base, PROMPTS)[-1])
    (found,) = train_lora(base, base.encode(PROMPTS), logits.split(1), 1, passes=1, rate=0.0)
    torch.testing.assert_close(found.logits(PROMPTS), logits, rtol=1e-5, atol=1e-5)
    assert found.losses[0] < 1e-9


def test_the_last_tokens_of_a_row_count_whether_the_expert_gives_states_or_logits(
    tiny_llama_model: LanguageModel,
) -> None:
    base = tiny_llama_model
    rows = [row for row in base.encode(PROMPTS) if len(row) > 2]
    own = [base.body(torch.tensor([row])).last_hidden_state[0, -3:] for row in rows]
    shifted = [states + 0.3 for states in own]
    wanted = float(kl_divergence(base.head(torch.cat(shifted)), base.head(torch.cat(own))).mean())
    for expert in (shifted, [base.head(states) for states in shifted]):
        (found,) = train_lora(base, rows, expert, 1, targets=["o_proj"], passes=1, batch=len(rows), rate=0.0)
        assert found.losses[0] == pytest.approx(wanted, rel=1e-4)
