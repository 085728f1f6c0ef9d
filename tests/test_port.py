"""A plugged adapter is what a live network computes, row by row in every way of generating, and leaves no trace."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import SIZES, VOCABULARY, Build
from torch import Tensor
from transformers import CohereConfig, Gemma2Config, GPTNeoXConfig, GraniteConfig, MiniCPM3Config, PretrainedConfig

from chassis_utils.adapters.adapter import Adapter
from chassis_utils.adapters.port import Port
from chassis_utils.lm.model import LanguageModel, load

PROMPTS = ["Two and two", "The function returns", "A sentence of several words that ends with", "In"]
ROWS = ["state", None, "both", "vocabulary"]
KINDS: dict[str, tuple[str, int, bool]] = {  # space, rank, intercept
    "state": ("state", 3, False),
    "both": ("state", 2, True),
    "vocabulary": ("vocabulary", 2, False),
    "vocabulary and intercept": ("vocabulary", 1, True),
    "intercept": ("state", 0, True),
}
NEW = 8
MODES: dict[str, dict[str, object]] = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "several of the beams": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.fixture(scope="module")
def port_llama() -> LanguageModel:
    """The shipped base."""
    return load("models/port-llama", device="cpu")


@pytest.fixture(scope="module")
def tiny_neox(build: Build) -> LanguageModel:
    """A random GPT-NeoX: parallel block, a head named embed_out."""
    return load(str(build(GPTNeoXConfig(max_position_embeddings=64, **SIZES))))


@pytest.fixture(params=["port_llama", "tiny_gpt2", "tiny_phi", "tiny_neox"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    """One of each architecture."""
    return request.getfixturevalue(request.param)


def adapter(model: LanguageModel, kind: str) -> Adapter:
    """Random, of the size of the states and logits, so that it changes what is generated."""
    space, rank, intercept = KINDS[kind]
    generator = torch.Generator().manual_seed(list(KINDS).index(kind))
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    h = states(model, PROMPTS[1]).double()
    out, size = (model.width, h.std()) if space == "state" else (VOCABULARY, model.head(h.float()).double().std())
    down = normal(model.width, rank) / h.norm(dim=1).mean()
    constant = model.head(h.float()).double().std() * normal(VOCABULARY) if intercept else None
    return Adapter(space, down, size * normal(out, rank), size * normal(out) / 2, model.head.fingerprint, constant)


def a_port(model: LanguageModel) -> Port:
    """A port with one adapter of each kind."""
    port = Port(model)
    for kind in KINDS:
        port.plug(kind, adapter(model, kind))
    return port


def padded(model: LanguageModel, prompts: list[str]) -> dict[str, Tensor]:
    """Inputs of `generate`, padded on the left."""
    ids = model.encode(prompts)
    longest = max(map(len, ids))
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in ids]
    rows = [[0] * (longest - len(row)) + row for row in ids]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def generate(model: LanguageModel, prompts: list[str], **mode: object) -> Tensor:
    """The new tokens, as many for each row."""
    inputs = padded(model, prompts)
    length = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
    return model.network.generate(**inputs, **{"do_sample": False} | length | mode)[:, inputs["input_ids"].shape[1] :]


@torch.inference_mode()
def states(model: LanguageModel, text: str) -> Tensor:
    return model.network(torch.tensor(model.encode([text])), output_hidden_states=True).hidden_states[-1][0]


@torch.inference_mode()
def logits(model: LanguageModel, rows: int = 1, text: str = PROMPTS[1]) -> Tensor:
    """Of every token of the text, in each of several equal rows."""
    return model.network(torch.tensor(model.encode([text] * rows))).logits


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Within a share of the largest logit."""
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=tolerance * float(expected.double().abs().max())
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_plugged_logits_are_those_of_the_adapter(model: LanguageModel, kind: str) -> None:
    plugged, port = adapter(model, kind), Port(model)
    port.plug("it", plugged)
    h = states(model, PROMPTS[1])
    with port.use("it"):
        found = logits(model)[0]
    assert_close(found, plugged.logits(h, model.head))
    assert float((found - model.head(h)).abs().max()) > 0.1 * float(found.abs().max())


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5),
        CohereConfig(**SIZES, num_key_value_heads=1, logit_scale=0.25),
        GraniteConfig(**SIZES, num_key_value_heads=1, logits_scaling=8.0),
    ],
    ids=["softcap", "scale", "inverse scale"],
)
def test_scale_and_cap_follow_the_adapter(config: PretrainedConfig, build: Build) -> None:
    model = load(str(build(config)))
    port, h = a_port(model), states(model, PROMPTS[1])
    for kind in KINDS:
        with port.use(kind):
            assert_close(logits(model)[0], adapter(model, kind).logits(h, model.head))


def test_in_half_precision_they_are_those_of_the_adapter_to_its_rounding(build: Build) -> None:
    model = load(str(build(GPTNeoXConfig(max_position_embeddings=64, **SIZES))), dtype=torch.bfloat16)
    port, h = a_port(model), states(model, PROMPTS[1])
    for kind in KINDS:
        with port.use(kind):
            found = logits(model)[0]
        assert found.dtype == torch.bfloat16
        assert_close(found, adapter(model, kind).logits(h, model.head), 0.02)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_every_row_of_a_batch_has_what_its_prompt_and_adapter_give_alone(
    model: LanguageModel, mode: dict[str, object]
) -> None:
    port, alone = a_port(model), []
    with port.use(ROWS):
        together = generate(model, PROMPTS, **mode)
    for prompt, name in zip(PROMPTS, ROWS, strict=True):
        with port.use(name):
            alone.append(generate(model, [prompt], **mode))
    assert torch.equal(together, torch.cat(alone))
    bare = generate(model, PROMPTS, **mode).unflatten(0, (len(PROMPTS), -1))
    changed = (together.unflatten(0, (len(PROMPTS), -1)) != bare).flatten(1).any(1)
    assert changed.tolist() == [name is not None for name in ROWS]


@pytest.mark.parametrize("returned", [1, 2])
def test_what_is_sampled_from_is_what_each_row_gives_alone(model: LanguageModel, returned: int) -> None:
    port, warmth = a_port(model), 1.5
    sampling = {"do_sample": True, "temperature": warmth, "top_k": 0, "num_return_sequences": returned}
    more = {"return_dict_in_generate": True, "output_scores": True, "eos_token_id": -1}  # nothing ends a text
    torch.manual_seed(0)
    with port.use(ROWS):
        output = model.network.generate(
            **padded(model, PROMPTS), max_new_tokens=NEW, pad_token_id=0, **sampling, **more
        )
    new = output.sequences[:, -NEW:].unflatten(0, (len(PROMPTS), returned))
    scores = torch.stack(output.scores, dim=1).unflatten(0, (len(PROMPTS), returned))
    for k, name in enumerate(ROWS):
        ids = model.encode([PROMPTS[k]])[0]
        read = torch.tensor([ids + row.tolist() for row in new[k]])
        with port.use(name), torch.inference_mode():
            expected = model.network(read).logits[:, len(ids) - 1 : -1] / warmth
        assert_close(scores[k], expected)
    assert returned == 1 or not torch.equal(new[:, 0], new[:, 1])


def test_one_name_is_that_name_for_every_row(model: LanguageModel) -> None:
    port, one, each = a_port(model), [], []
    for kind in KINDS:
        with port.use(kind):
            one.append(logits(model, rows=3))
        with port.use([kind] * 3):
            each.append(logits(model, rows=3))
    assert_close(torch.stack(one), torch.stack(each), 1e-6)


def test_rows_without_an_adapter_are_the_bare_ones_to_the_bit(model: LanguageModel) -> None:
    port, bare = a_port(model), logits(model, rows=6)
    with port.use([None, "state", "vocabulary and intercept"]):
        mixed = logits(model, rows=6)  # two rows for each name
    assert [torch.equal(a, b) for a, b in zip(mixed, bare, strict=True)] == [True, True, False, False, False, False]
    with port.use("state"):
        assert_close(mixed[2:4], logits(model, rows=2))
    with port.use("vocabulary and intercept"):
        assert_close(mixed[4:6], logits(model, rows=2))


def test_numbers_that_overflow_stay_in_their_row(tiny_phi: LanguageModel) -> None:
    port, bare = Port(tiny_phi), logits(tiny_phi, rows=2)
    wild = adapter(tiny_phi, "state")
    port.plug("wild", replace(wild, down=1e300 * wild.down))
    with port.use(["wild", None]):
        mixed = logits(tiny_phi, rows=2)
    assert not torch.isfinite(mixed[0]).all() and torch.equal(mixed[1], bare[1])


def test_the_base_is_untouched_before_and_after_to_the_bit(model: LanguageModel) -> None:
    network, output = model.network, model.network.get_output_embeddings()

    def everything() -> list[Tensor]:
        return [logits(model, rows=3), *(generate(model, PROMPTS, **mode) for mode in MODES.values())]

    def assert_bare(before: list[Tensor]) -> None:
        assert all(torch.equal(a, b) for a, b in zip(everything(), before, strict=True))
        assert not output._forward_hooks and not output._forward_pre_hooks

    before, kind, attributes = everything(), type(network), set(vars(network))
    port = a_port(model)
    assert_bare(before)
    with port.use("both"):
        assert not torch.equal(logits(model, rows=3), before[0])
    assert_bare(before)
    with pytest.raises(ZeroDivisionError), port.use(["both", None, "vocabulary"]):
        1 / 0  # noqa: B018
    assert_bare(before)
    for name in KINDS:
        port.unplug(name)
    assert_bare(before)
    assert type(network) is kind and set(vars(network)) == attributes and network.get_output_embeddings() is output


def test_of_nested_blocks_the_innermost_holds_alone(tiny_gpt2: LanguageModel) -> None:
    port, bare, found = a_port(tiny_gpt2), logits(tiny_gpt2), {}
    for kind in KINDS:
        with port.use(kind):
            found[kind] = logits(tiny_gpt2)
    with port.use("both"):
        with port.use("vocabulary"):
            assert torch.equal(logits(tiny_gpt2), found["vocabulary"])
            with port.use(None):
                assert torch.equal(logits(tiny_gpt2), bare)
            assert torch.equal(logits(tiny_gpt2), found["vocabulary"])
        with pytest.raises(ZeroDivisionError), port.use("state"):
            1 / 0  # noqa: B018
        assert torch.equal(logits(tiny_gpt2), found["both"])
        with pytest.raises(ValueError, match="no adapter is plugged in as 'mine'"), port.use("mine"):
            pass
        assert torch.equal(logits(tiny_gpt2), found["both"])
    assert torch.equal(logits(tiny_gpt2), bare)


def test_hooks_of_others_stay_and_see_the_edited_state(tiny_phi: LanguageModel) -> None:
    port, seen = a_port(tiny_phi), []
    output = tiny_phi.network.get_output_embeddings()
    with port.use("state"):
        handle = output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
        logits(tiny_phi)
    logits(tiny_phi)
    handle.remove()
    h = states(tiny_phi, PROMPTS[1])
    assert_close(seen[0], h.double() + adapter(tiny_phi, "state").edit(h))
    assert torch.equal(seen[1], h)


def test_names_and_bytes_of_what_is_plugged_in(tiny_phi: LanguageModel) -> None:
    port, d, v = a_port(tiny_phi), tiny_phi.width, VOCABULARY
    assert port.names == list(KINDS)
    numbers = {
        "state": 3 * (d + d) + d,
        "both": 2 * (d + d) + d + v,
        "vocabulary": 2 * (d + v) + v,
        "vocabulary and intercept": d + v + v,
        "intercept": d + v,
    }
    assert port.memory == {name: 4 * count for name, count in numbers.items()}
    port.unplug("both")
    assert "both" not in port.names and "both" not in port.memory
    port.plug("both", adapter(tiny_phi, "intercept"))
    assert port.names[-1] == "both" and port.memory["both"] == 4 * (d + v)


REFUSALS: dict[str, tuple[Callable[[Port], object], str]] = {
    "unknown": (
        lambda port: port.use("mine").__enter__(),
        r"no adapter is plugged in as 'mine': there are \['state', 'both', ",
    ),
    "unknown in a row": (lambda port: port.use(["state", "mine"]).__enter__(), "no adapter is plugged in as 'mine'"),
    "no rows": (
        lambda port: port.use([]).__enter__(),
        r"no adapter is named: give one name for all, or one name \(or None\) for each prompt",
    ),
    "taken": (
        lambda port: port.plug("state", adapter(port.model, "both")),
        "an adapter is plugged in as 'state' already: unplug it first, or use another name",
    ),
    "unplugged": (lambda port: port.unplug("mine"), "no adapter is plugged in as 'mine'"),
}


@pytest.mark.parametrize(("act", "sentence"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_done_is_refused_and_changes_nothing(
    act: Callable[[Port], object], sentence: str, tiny_gpt2: LanguageModel
) -> None:
    port, bare = a_port(tiny_gpt2), logits(tiny_gpt2)
    with pytest.raises(ValueError, match=sentence):
        act(port)
    assert port.names == list(KINDS)
    assert torch.equal(logits(tiny_gpt2), bare)


def test_an_adapter_in_use_is_not_unplugged(tiny_gpt2: LanguageModel) -> None:
    port = a_port(tiny_gpt2)
    with port.use(["both", None]), port.use("state"):
        port.unplug("vocabulary")
        for name in ("both", "state"):
            with pytest.raises(ValueError, match=f"adapter '{name}' is in use: leave the `with` block first"):
                port.unplug(name)
    port.unplug("both")
    assert port.names == ["state", "vocabulary and intercept", "intercept"]


def test_an_adapter_of_another_head_is_refused(tiny_gpt2: LanguageModel, tiny_phi: LanguageModel) -> None:
    port = Port(tiny_gpt2)
    with pytest.raises(ValueError, match=f"was fitted to the head {tiny_phi.head.fingerprint}, not to"):
        port.plug("foreign", adapter(tiny_phi, "state"))
    assert port.names == []


def test_rows_that_do_not_divide_the_batch_are_refused(tiny_phi: LanguageModel) -> None:
    port, bare = a_port(tiny_phi), logits(tiny_phi)
    for kind in ("state", "vocabulary"):
        sentence = "2 rows have been chosen for a batch of 3: give one name for all, or one for each prompt"
        with pytest.raises(ValueError, match=sentence), port.use([kind, None]):
            logits(tiny_phi, rows=3)
        with pytest.raises(ValueError, match="3 rows have been chosen for a batch of 1"), port.use([kind, None, None]):
            logits(tiny_phi)
    assert torch.equal(logits(tiny_phi), bare)


def test_a_network_whose_head_reads_another_state_is_refused(build: Build) -> None:
    sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    folders: list[Path] = [build(MiniCPM3Config(**SIZES, **sizes, dim_model_base=base)) for base in (4, 16)]
    scaled, plain = (load(str(folder)) for folder in folders)
    with pytest.raises(ValueError, match="changes its last state before the head reads it: adapters of that state"):
        Port(scaled)
    assert not scaled.network.get_output_embeddings()._forward_pre_hooks
    assert Port(plain).names == []
