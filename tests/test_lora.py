"""LoRA follows an expert, and the base stays as it was."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chassis_utils.adapters.lora import equal_rank, train_lora
from chassis_utils.lm.forward import token_logits
from chassis_utils.lm.model import LanguageModel, load
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


def test_a_saved_lora_is_loaded_as_its_base_with_the_lora(tiny_llama_model: LanguageModel, tmp_path: Path) -> None:
    base = tiny_llama_model
    targets = base.head(collect(base, PROMPTS)[-1]).flip(0).split(1)
    *_, found = train_lora(base, base.encode(PROMPTS), targets, 2, passes=3, batch=4, rate=0.05)
    found.save(tmp_path)
    loaded = load(str(tmp_path))
    assert (loaded.name, loaded.fingerprint != base.fingerprint) == (str(tmp_path), True)
    ours = loaded.head(collect(loaded, PROMPTS)[-1])
    torch.testing.assert_close(ours, found.logits(PROMPTS), rtol=1e-4, atol=1e-4)
    assert float((ours - base.head(collect(base, PROMPTS)[-1])).abs().max()) > 0.1


@pytest.fixture
def saved(tiny_llama_model: LanguageModel, tmp_path: Path) -> Path:
    """The folder of a LoRA that nobody has damaged yet."""
    base = tiny_llama_model
    logits = base.head(collect(base, PROMPTS)[-1])
    (found,) = train_lora(base, base.encode(PROMPTS), logits.split(1), 2, passes=1)
    found.save(tmp_path)
    return tmp_path


def test_a_lora_without_its_base_or_its_weights_says_so(saved: Path) -> None:
    config = saved / "adapter_config.json"
    stored = json.loads(config.read_text())
    config.write_text(json.dumps(stored | {"base_model_name_or_path": "build/no-such-model"}))
    with pytest.raises(ValueError, match=r"'build/no-such-model', the base of the LoRA .* neither a folder nor a hub"):
        load(str(saved))
    config.write_text(json.dumps(stored))
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors: save it as safetensors"):
        load(str(saved))


def test_a_lora_of_another_base_is_refused(saved: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "models/port-llama"}))
    with pytest.raises(ValueError, match="does not fit its base"):
        load(str(saved))
