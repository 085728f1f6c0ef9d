"""What works with which architecture: every cell of the table against plain full passes, and the table itself.

`python tests/test_architectures.py` writes the table anew.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, Build
from torch import Tensor, nn
from transformers import AutoConfig

from chassis_utils.adapters.adapter import Adapter, HeldOut
from chassis_utils.adapters.depth import Depth
from chassis_utils.adapters.lora import equal_rank, train_lora
from chassis_utils.adapters.port import Port
from chassis_utils.circulant.activations import PairedForward
from chassis_utils.circulant.layer import BlockCirculantLinear
from chassis_utils.circulant.patch import as_linear, patch
from chassis_utils.circulant.replace import collect as collect_moments
from chassis_utils.circulant.replace import replacements
from chassis_utils.files import ROOT
from chassis_utils.linalg.moments import Moments
from chassis_utils.lm import states
from chassis_utils.lm.attention import check_attention
from chassis_utils.lm.forward import continuations, encode, read_logits
from chassis_utils.lm.last_token import Prefixes
from chassis_utils.lm.model import LanguageModel, load
from chassis_utils.lm.reader import Reader
from chassis_utils.lm.states import collect
from chassis_utils.lm.stream import Stream
from chassis_utils.metrics import kl_divergence
from chassis_utils.text.prompts import Prompt

TABLE = ROOT / "chassis_utils" / "lm" / "ARCHITECTURES.md"
END = 2  # the end-of-text token of all models
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": END, "pad_token_id": 0}
MAMBA = TOKENS | {"hidden_size": 32, "num_hidden_layers": 3}
PLAIN = MAMBA | {"num_attention_heads": 4, "max_position_embeddings": 64, "intermediate_size": 48}
LLAMA = PLAIN | {"num_key_value_heads": 2, "head_dim": 8}
GPT = TOKENS | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
WINDOW = {"sliding_window": 8}  # less than the longest text
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
DELTA = {f"linear_{what}": 8 for what in ("key_head_dim", "value_head_dim")} | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
CONFIGS: dict[str, dict[str, object]] = {
    **dict.fromkeys(["llama", "qwen2", "qwen3", "smollm3", "gemma", "phi", "gpt_neox", "stablelm"], LLAMA),
    **dict.fromkeys(["starcoder2", "cohere", "olmo", "olmo2", "nanochat"], LLAMA),
    "granite": LLAMA | {"residual_multiplier": 0.22},  # as released
    **dict.fromkeys(["mistral", "gemma2", "gemma3_text", "cohere2"], LLAMA | WINDOW),
    "phi3": LLAMA | WINDOW,
    "minicpm3": PLAIN | LATENT,
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 4},
    "openai-gpt": GPT,
    "opt": PLAIN | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": TOKENS | {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "falcon": MAMBA | {"num_attention_heads": 4},
    "mpt": TOKENS | {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
    "llama4_text": LLAMA | LOCAL | {"intermediate_size_mlp": 48, "attention_chunk_size": 8},
    **dict.fromkeys(["mixtral", "phimoe"], LLAMA | LOCAL),
    "jetmoe": LLAMA | LOCAL | {"kv_channels": 8},
    "qwen2_moe": LLAMA | EXPERTS,
    "qwen3_next": LLAMA | EXPERTS | DELTA,
    "jamba": LLAMA | {"num_experts": 4, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 8},
    "bamba": LLAMA | MAMBA_2 | {"attn_layer_indices": [1]},
    "lfm2": LLAMA | {"full_attn_idxs": [1]},
    "mamba": MAMBA | {"state_size": 8},
    "rwkv": MAMBA,
}
EXPERT_MLP, NO_MLP = "is a mixture of experts, each of which sees only some tokens", "has no MLP of linear layers"
NO_TARGETS = "has no layers named q_proj and v_proj, and peft knows no others"
NO_PLACE, NO_ATTENTION = "do not read on from what their attention adds to its input", "has no attention"
REFUSED: dict[str, dict[str, str]] = {  # architecture -> function -> part of the sentence; all other cells are ok
    **{key: {"depth": NO_PLACE} for key in ["phi", "gpt_neox", "cohere", "cohere2", "gptj", "falcon", "olmo2"]},
    **{key: {"depth": NO_PLACE} for key in ["gemma2", "gemma3_text", "bloom", "rwkv"]},
    **{key: {"depth": NO_ATTENTION} for key in ["bamba", "lfm2"]},
    "phi3": {"LoRA": NO_TARGETS},
    "minicpm3": {"port": "changes its last state before the head reads it", "depth": NO_PLACE, "LoRA": NO_TARGETS},
    "openai-gpt": {"LoRA": NO_TARGETS},
    "granite": {"depth": NO_PLACE},  # it scales what the attention adds
    "llama4_text": {"circulant": EXPERT_MLP},
    "mixtral": {"circulant": EXPERT_MLP},
    "phimoe": {"circulant": EXPERT_MLP},
    "jetmoe": {"LoRA": NO_TARGETS, "circulant": EXPERT_MLP},
    "qwen2_moe": {"circulant": EXPERT_MLP},
    "qwen3_next": {"circulant": EXPERT_MLP},
    "jamba": {"depth": NO_ATTENTION, "circulant": EXPERT_MLP},
    "mamba": {"depth": NO_ATTENTION, "LoRA": NO_TARGETS, "circulant": NO_MLP},
}
TEXTS = ["One day a cat sat on the mat and looked at the moon.", "Go", "What is 3 + 4? Show it.", "The sum is"]
ALIKE = [f"{TEXTS[0]} {k}" for k in range(5)]  # read together, where a model can
PROMPTS = [Prompt(text, text) for text in TEXTS]
MIDDLE, BLOCK = 1, 4
close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache for each test."""
    monkeypatch.setattr(states, "CACHE", tmp_path)


@pytest.fixture(scope="module")
def model_of(build: Build) -> Callable[[str], LanguageModel]:
    """A random model of each architecture, built once."""
    models: dict[str, LanguageModel] = {}

    def built(name: str) -> LanguageModel:
        if name not in models:
            models[name] = load(str(build(AutoConfig.for_model(name, **CONFIGS[name]))), device="cpu")
        return models[name]

    return built


@torch.inference_mode()
def full_pass(model: LanguageModel, text: str, edits: Mapping[int, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """States [layers, width] and logits [vocab] at the last token of one text, `edits` added by hooks."""
    seen: list[Tensor] = []

    def before(_: nn.Module, inputs: tuple[Tensor, ...], layer: int) -> tuple[Tensor, ...]:
        h = inputs[0].clone()
        if layer == 0:
            seen.append(h[0, -1].clone())
        if layer in (edits or {}):
            h[:, -1] += edits[layer]
        return (h, *inputs[1:])

    def after(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple | list) -> None:
        seen.append((output if isinstance(output, Tensor) else output[0])[0, -1])

    blocks = list(enumerate(model.blocks))
    hooks = [block.register_forward_pre_hook(partial(before, layer=layer)) for layer, block in blocks]
    hooks += [block.register_forward_hook(after) for _, block in blocks]
    output = model.network(torch.tensor(model.encode([text])), output_hidden_states=True, use_cache=False)
    for handle in hooks:
        handle.remove()
    return torch.stack([*seen[:-1], output.hidden_states[-1][0, -1]]), output.logits[0, -1]


def full_states(model: LanguageModel) -> Tensor:
    """[layers, texts, width]."""
    return torch.stack([full_pass(model, text)[0] for text in TEXTS], dim=1)


def full_logits(model: LanguageModel) -> Tensor:
    """[texts, vocab]."""
    return torch.stack([full_pass(model, text)[1] for text in TEXTS])


def check_states(model: LanguageModel) -> None:
    """States of all layers at once are those of each text alone, and the head makes logits of the last."""
    found = collect(model, TEXTS)
    close(found, full_states(model))
    close(model.head(found[-1]), full_logits(model))
    alike = torch.stack([full_pass(model, text)[0] for text in ALIKE], dim=1)
    close(collect(model, ALIKE), alike)
    close(torch.cat(read_logits(model, model.encode(TEXTS), every_token=False)), full_logits(model))


def check_norm(model: LanguageModel) -> None:
    """What the final norm makes of the last block's output is the last state."""
    outputs: list[Tensor | tuple | list] = []
    handle = model.blocks[-1].register_forward_hook(lambda _, inputs, output: outputs.append(output))
    last = full_pass(model, TEXTS[0])[0][-1]
    handle.remove()
    output = outputs[0] if isinstance(outputs[0], Tensor) else outputs[0][0]
    close(model.final_norm(output)[0, -1], last)


def check_prefixes(model: LanguageModel) -> None:
    """A pass of the last token behind kept prefixes is a full pass, more than once."""
    prefixes = Prefixes.of(model, TEXTS)
    for _ in range(2):
        close(prefixes.finish(), full_states(model))


def check_reader(model: LanguageModel) -> None:
    """Rows read again with other ends, of other lengths, give what full passes of each alone give."""
    reader, rows = Reader(model), model.encode(TEXTS)
    for cut, added in ((0, []), (0, [7]), (2, [8, 9]), (1, [5, 6, 7]), (3, [])):
        rows = [[*row[: max(len(row) - cut * (k % 2), 1)], *added[: k + 1]] for k, row in enumerate(rows)]
        for row, found in zip(rows, reader(rows), strict=True):
            with torch.inference_mode():
                close(found, model.network(torch.tensor([row]), use_cache=False).logits[0, -1:])


def check_edits(model: LanguageModel) -> None:
    """Adapters of a middle layer: nothing added changes nothing, anything else does what hooks by hand do."""
    prefixes = Prefixes.of(model, TEXTS)
    edits = torch.randn(len(TEXTS), model.width, generator=torch.Generator().manual_seed(0))
    found = prefixes.finish({MIDDLE: edits})
    by_hand = [full_pass(model, text, {MIDDLE: edit})[0][-1] for text, edit in zip(TEXTS, edits, strict=True)]
    close(found[-1], torch.stack(by_hand))
    untouched = prefixes.finish({MIDDLE: Adapter.untouched(model.head).edit})
    close(model.head(untouched[-1]), full_logits(model))
    assert float((found[-1] - untouched[-1]).abs().amax(1).min()) > 0.01


def check_continuations(model: LanguageModel) -> None:
    """A batch of prompts goes on as each does by full passes alone."""
    for text, found in zip(TEXTS, continuations(model, TEXTS, 3), strict=True):
        (ids,) = model.encode([text])
        written: list[int] = []
        while len(written) < 3 and END not in written:
            with torch.inference_mode():
                logits = model.network(torch.tensor([ids + written]), use_cache=False).logits
            written.append(int(logits[0, -1].argmax()))
        assert found == model.tokenizer.decode([token for token in written if token != END])


def check_port(model: LanguageModel) -> None:
    """A plugged adapter that is zero changes nothing, another gives its logits, and neither leaves a trace."""
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(model.width, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    adapter = Adapter("state", down, up, up[:, 0], model.head.fingerprint)
    port = Port(model)
    port.plug("nothing", Adapter.untouched(model.head, rank=2))
    port.plug("something", adapter)
    untouched = full_logits(model)
    with port.use("nothing"):
        assert torch.equal(full_logits(model), untouched)
    with port.use("something"):
        found = full_logits(model)
    size = float(untouched.abs().max())
    close(found, adapter.logits(full_states(model)[-1], model.head), atol=1e-3 * size)
    assert float((found - untouched).abs().max()) > 0.01 * size
    assert torch.equal(full_logits(model), untouched)


def check_depth(model: LanguageModel) -> None:
    """Rows read on block by block are full passes, and under edits they are what a port's hooks give at every token."""
    check_attention(model)
    rows = encode(model, TEXTS)
    stream = Stream.of(model, rows, [len(row) for row in rows])
    ends = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
    close(stream.on_to(MIDDLE).finished()[ends], full_states(model)[-1])
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(model.width, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    adapter = Adapter("state", down / model.width, up, up[:, 0], model.head.fingerprint)
    port = Port(model)
    port.plug("deep", Depth({MIDDLE: adapter, model.depth: adapter}, skip=0, held_out=HeldOut(0.0, 0.0, 0.0, 1)))
    edited = stream.on_to(MIDDLE).edited(adapter.edit).on_to(model.depth).edited(adapter.edit).finished()
    with port.use("deep"):
        found = full_logits(model)
    close(found, model.head(edited[ends]), atol=1e-3 * float(found.abs().max()))
    assert float((found - full_logits(model)).abs().max()) > 0.01


def check_lora(model: LanguageModel) -> None:
    """A trained LoRA is the network with its factors merged by hand, and is closer to the expert than the base."""
    untouched = full_logits(model)
    expert = untouched + torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0))
    rows = encode(model, TEXTS)
    *_, found = train_lora(model, rows, expert.split(1), equal_rank(model, 500), passes=3, rate=1e-3)
    assert found.parameters >= 500
    merged = copy.deepcopy(model.network)
    for name, module in found.model.network.named_modules():
        if hasattr(module, "lora_A"):
            change = 2 * module.lora_B["default"].weight @ module.lora_A["default"].weight
            as_linear(merged.get_submodule(name)).weight.data += change
    by_hand = full_logits(LanguageModel(**{**vars(model), "network": merged}))
    close(found.logits(TEXTS), by_hand)
    assert kl_divergence(expert, by_hand).mean() < kl_divergence(expert, untouched).mean()
    assert torch.equal(full_logits(model), untouched)


def dense(layer: nn.Module) -> nn.Linear:
    """The same map without circulant products."""
    assert isinstance(layer, BlockCirculantLinear)
    linear = nn.Linear(layer.in_features, layer.out_features)
    linear.weight.data, linear.bias = layer.to_dense().detach(), layer.bias
    return linear


def sums(model: LanguageModel, path: str) -> tuple[Tensor, Tensor]:
    """Sums of the inputs and of the outputs of a layer over all tokens, each text alone."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((inputs[0].flatten(0, -2).sum(0), output.flatten(0, -2).sum(0)))

    handle = model.network.get_submodule(path).register_forward_hook(keep)
    for text in TEXTS:
        full_pass(model, text)
    handle.remove()
    return sum(x for x, _ in seen), sum(y for _, y in seen)


def check_circulant(model: LanguageModel) -> None:
    """Averaged layers are their dense matrices, fitted ones see the layers' inputs, and blocks of one are exact."""
    untouched = full_logits(model)
    averaged = replacements(model, [MIDDLE], BLOCK, "average")
    with patch(model.network, averaged):
        found = full_logits(model)
    with patch(model.network, {path: dense(layer) for path, layer in averaged.items()}):
        close(found, full_logits(model))
    assert float((found - untouched).abs().max()) > 0.01
    with patch(model.network, replacements(model, [MIDDLE], 1, "aware", PROMPTS)):
        close(full_logits(model), untouched)
    for path in averaged:
        moments = collect_moments([PairedForward(model, TEXTS, MIDDLE)], path, {}, Moments.of)[0]
        for streamed, alone in zip((moments.x_sum, moments.y_sum), sums(model, path), strict=True):
            close(streamed, alone.double())


CHECKS: dict[str, Callable[[LanguageModel], None]] = {
    "states": check_states,
    "final norm": check_norm,
    "prefixes": check_prefixes,
    "reader": check_reader,
    "middle layer": check_edits,
    "continuations": check_continuations,
    "port": check_port,
    "depth": check_depth,
    "LoRA": check_lora,
    "circulant": check_circulant,
}


@pytest.mark.parametrize("function", CHECKS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_cell_works_or_is_refused(name: str, function: str, model_of: Callable[[str], LanguageModel]) -> None:
    reason = REFUSED.get(name, {}).get(function)
    if reason is None:
        CHECKS[function](model_of(name))
    else:
        with pytest.raises(ValueError, match=rf"{reason}.*: \w"):  # and what to do instead
            CHECKS[function](model_of(name))


def table() -> str:
    """The page that shows the cells."""
    rows = [["architecture", *CHECKS], ["---"] * (1 + len(CHECKS))]
    for name in sorted(CONFIGS):
        reasons = REFUSED.get(name, {})
        rows.append([name, *(f"refused: {reasons[column]}" if column in reasons else "ok" for column in CHECKS)])
    return PAGE + "".join(f"| {' | '.join(row)} |\n" for row in rows)


PAGE = """# What works with which architecture

Rows are `model_type` in transformers, tried with tiny random models; a cell is `ok` where the function gives what plain
full passes of each text give, and otherwise the reason in the `ValueError` that refuses it. Columns: `collect` and the
head; `final_norm`; `Prefixes` (a model with a recurrent state keeps none and reads whole prompts each time: the same
numbers, slower); `Reader`, likewise, with which a device alongside reads; edits of a middle layer; `continuations`;
`Port`; edits behind the attention of a block (`fit_prompt`, `fit_sibling`); `train_lora`; `replacements` of a block's
MLP.
Other architectures are taken by what their modules are, not by name. `tests/test_architectures.py` tests every cell
and writes this page.

"""


def test_the_page_shows_the_cells_that_are_tested() -> None:
    assert TABLE.read_text(encoding="utf-8") == table()


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
