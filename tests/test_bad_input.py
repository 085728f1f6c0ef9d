"""Bad input of every kind ends in one sentence of this package, before any long work and with nothing left on disk."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from mutations import as_json, damaged, deformed, problem
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from chassis_utils.adapters.adapter import Adapter, HeldOut
from chassis_utils.adapters.fit import fit, fit_gated, fit_logits, fit_states
from chassis_utils.adapters.port import Port
from chassis_utils.as_reported.sizes import scaled_block_size, scaled_layer, scaled_rank
from chassis_utils.bridge.bridge import Bridge
from chassis_utils.bridge.look_ahead import trace
from chassis_utils.bridge.segmenter import Segmenter
from chassis_utils.bridge.token_bytes import ByteTable
from chassis_utils.circulant.calibrate import Settings, calibrate
from chassis_utils.circulant.layer import BlockCirculantLinear
from chassis_utils.circulant.low_rank import LowRankLinear
from chassis_utils.circulant.patch import patch
from chassis_utils.circulant.replace import replacements
from chassis_utils.experts.synthetic import SyntheticExpert
from chassis_utils.files import MODELS, ROOT
from chassis_utils.lm.bits_per_byte import bits_per_byte
from chassis_utils.lm.model import Head, LanguageModel, load
from chassis_utils.lm.states import collect
from chassis_utils.lm.tokenizer import read_tokenizer
from chassis_utils.paper import report
from chassis_utils.paper.notebook import Notebook, PlanError, numbered_notebooks
from chassis_utils.paper.plan import plan, read_profile
from chassis_utils.text.prompts import read_prompts, standard_sets, take, texts

seeds = st.integers(0, 2**32 - 1)
NAN, INFINITE = float("nan"), float("inf")
LLAMA = json.loads((MODELS / "port-llama" / "tokenizer.json").read_bytes())
PHI = json.loads((MODELS / "expert-phi" / "tokenizer.json").read_bytes())


@pytest.fixture(autouse=True)
def without_shape_checks() -> Iterator[None]:
    """As for a user: only the test suite checks the annotations while it runs."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No name is looked up on the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def refused(call: Callable[[], object], sentence: str) -> None:
    """The call ends in one sentence of this package that says what is expected, parts joined by `...`."""
    assert problem(call) is None
    with pytest.raises((ValueError, TypeError, OSError), match=".*".join(map(re.escape, sentence.split("...")))):
        call()


# Prompt files

LINES = "\n".join(f"line number {k}" for k in range(300)).encode()
PROMPT_FILES = {
    "utf-16 with a mark": (
        LINES.decode().encode("utf-16"),
        "own.txt' is no UTF-8 text, its byte 0 is 0xff: save it as",
    ),
    "utf-16 without a mark": (LINES.decode().encode("utf-16-le"), "has a NUL character in line 1...: save it as UTF-8"),
    "latin-1": ("one\nGröße\n".encode("latin-1"), "is no UTF-8 text, its byte 6 is 0xf6: save it as UTF-8"),
    "a NUL in the middle": (b"one\ntwo\0\n", "has a NUL character in line 2, so it is UTF-16 or no text: save it"),
    "a compressed file": (b"\x1f\x8b\x08\0\0", "is no UTF-8 text, its byte 1 is 0x8b: save it"),
    "half a character": (b"one\n\xf0\x9f", "is no UTF-8 text, its byte 4 is 0xf0: save it as"),
    "a mark and nothing else": (b"\xef\xbb\xbf\n", "own.txt' is empty: write one prompt a line"),
}


@pytest.mark.parametrize("case", PROMPT_FILES)
def test_a_prompt_file_that_is_no_text(case: str, tmp_path: Path) -> None:
    content, sentence = PROMPT_FILES[case]
    (tmp_path / "own.txt").write_bytes(content)
    refused(lambda: read_prompts(tmp_path / "own.txt"), sentence)
    refused(lambda: standard_sets(10, 5, str(tmp_path / "own.txt")), sentence)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (str(MODELS), "models' is a folder: name a text file with one prompt a line"),
        ("", "prompt file '' is a folder: name a text file"),
        ("x" * 5000, "prompt file 'xxx...' does not exist: name a text file"),
        ("a\0b", "prompt file 'a\\x00b' does not exist: name a text file"),
        ("~nobody-of-this-name/own.txt", "prompt file '~nobody-of-this-name/own.txt' does not exist: name"),
        ("/dev/zero", "prompt file '/dev/zero' does not exist: name a text file"),
    ],
    ids=["folder", "empty", "long", "nul", "home", "device"],
)
def test_a_name_that_is_no_prompt_file(name: str, sentence: str) -> None:
    refused(lambda: read_prompts(name), sentence)


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert texts(read_prompts(tmp_path / "own.txt")) == ["one", "two"]


@pytest.mark.parametrize("content", [b"one\n", b"one\n" * 300, b"one\ntwo\n" * 99], ids=["one", "repeated", "two"])
def test_too_few_different_prompts_leave_none_to_hold_out(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_bytes(content)
    count = len(set(content.split()))
    sentence = f"has {count} different lines, too few to hold some out: give a hundred"
    refused(lambda: standard_sets(10, 5, str(tmp_path / "own.txt")), sentence)


def test_a_long_prompt_file_is_split_in_no_time(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("\n".join(f"line {k}" for k in range(50_000)))  # once minutes
    sets = standard_sets(10, 5, str(tmp_path / "own.txt"))
    assert len(sets["document", "test"]) == 5


@given(seeds)
def test_any_damaged_prompt_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.txt"
    path.write_bytes(damaged((ROOT / "notebooks" / "prompts" / "quality.txt").read_bytes(), seed))
    assert problem(lambda: read_prompts(path)) is None


# Adapter folders

HEAD = Head(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)))


def save_adapter(folder: Path) -> None:
    """A good adapter of rank 2, with an intercept and what the fit found."""
    normal = torch.Generator().manual_seed(1)
    factors = [torch.randn(*size, generator=normal, dtype=torch.float64) for size in ((6, 2), (6, 2), (6,), (20,))]
    held_out = HeldOut(0.1, 0.01, 1.0, 50)
    Adapter("state", *factors[:3], HEAD.fingerprint, factors[3], held_out).save_pretrained(folder)


def read_adapter(folder: Path) -> Adapter:
    """Read it and use it."""
    adapter = Adapter.from_pretrained(folder, HEAD)
    adapter.logits(torch.zeros(2, 6), HEAD)
    return adapter


CONFIGS: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "adapter_config.json' is damaged (Expecting...): save or download it anew"),
    "no UTF-8": (b'{"space": "\xff"}', "adapter_config.json' is damaged ('utf-8' codec...: save or download"),
    "nested without end": (b"[" * 100_000, "adapter_config.json' is damaged (...: save or download it anew"),
    "a list": ([1], "is damaged (a list in the place of an object): save or download it anew"),
    "no space": ({"space": ...}, "adapter 'mine' is damaged (adapter_config.json lacks 'space'): save or fit it anew"),
    "no format": ({"format": ...}, "is damaged (adapter_config.json lacks 'format'): save or fit it anew"),
    "another space": ({"space": "sate"}, "its space is 'sate', neither state nor vocabulary): save or fit"),
    "a space that is a list": ({"space": ["state"]}, "its space is ['state'], neither state nor vocabulary): save"),
    "a lying rank": ({"rank": 3}, "its rank is 3 and 'down' is [6, 2]): save or fit it anew"),
    "a rank that is text": ({"rank": "2"}, "its rank is '2' and 'down' is [6, 2]): save or fit it anew"),
    "the other space": (
        {"space": "vocabulary"},
        "down, up and shift of this adapter are...its head takes...: save or fit",
    ),
    "a head that is a number": ({"head": 7}, "was fitted to the head 7, not to...: plug it into the base"),
    "held_out that is a list": ({"held_out": [1]}, "adapter 'mine' is damaged (...must be a mapping...): save or fit"),
    "held_out without a number": (
        {"held_out": {"kl": 1.0}},
        "is damaged (...missing 3 required...): save or fit it anew",
    ),
    "held_out of text": (
        {"held_out": {"kl": "a", "kl_se": 1.0, "base_kl": 1.0, "n": 1}},
        "is damaged (held_out holds {'kl': 'a',...): save or fit it anew",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_an_adapter_with_a_damaged_configuration(case: str, tmp_path: Path) -> None:
    change, sentence = CONFIGS[case]
    save_adapter(tmp_path / "mine")
    config = tmp_path / "mine" / "adapter_config.json"
    if isinstance(change, dict):
        whole = json.loads(config.read_text()) | change
        change = {key: value for key, value in whole.items() if value is not ...}
    config.write_bytes(change if isinstance(change, bytes) else as_json(change))
    refused(lambda: read_adapter(tmp_path / "mine"), sentence)


DOWN = torch.ones(6, 2)
TENSORS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "no tensor": (dict.fromkeys(("down", "up", "shift", "intercept")), "holds nothing): save or fit it anew"),
    "no shift": ({"shift": None}, "adapter.safetensors holds down, intercept, up): save or fit it anew"),
    "one too many": ({"other": DOWN}, "holds down, intercept, other, shift, up): save or fit it anew"),
    "NaN": ({"down": DOWN * NAN}, "'down' holds torch.float32, or numbers that are not finite): save or fit"),
    "infinite": ({"shift": torch.full((6,), INFINITE)}, "'shift' holds...not finite): save or fit it anew"),
    "whole numbers": ({"down": DOWN.long()}, "'down' holds torch.int64, or...: save or fit it anew"),
    "complex numbers": ({"down": DOWN * 1j}, "'down' holds torch.complex64, or...: save or fit it anew"),
    "one dimension": ({"down": torch.ones(12)}, "its rank is 2 and 'down' is [12]): save or fit it anew"),
    "no dimension": ({"down": torch.tensor(1.0)}, "its rank is 2 and 'down' is []): save or fit it anew"),
    "another width": ({"down": torch.ones(5, 2)}, "are [[5, 2], [6, 2], [6]], where its head takes [[6, 2],...: save"),
    "another rank of up": ({"up": torch.ones(6, 3)}, "are [[6, 2], [6, 3], [6]], where its head takes...: save or fit"),
    "a short intercept": ({"intercept": torch.ones(19)}, "its head takes...an intercept of 20: save or fit it anew"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_an_adapter_with_damaged_factors(case: str, tmp_path: Path) -> None:
    change, sentence = TENSORS[case]
    save_adapter(tmp_path / "mine")
    path = tmp_path / "mine" / "adapter.safetensors"
    whole = load_file(path) | change
    save_file({name: tensor for name, tensor in whole.items() if tensor is not None}, path)
    refused(lambda: read_adapter(tmp_path / "mine"), sentence)


@pytest.mark.parametrize(
    "damage",
    [lambda raw: raw[:-8], lambda raw: b"", lambda raw: b"\xff" * 8 + raw[8:], lambda raw: raw[:8] + b"x" + raw[9:]],
    ids=["cut off", "empty", "a header without end", "no JSON in the header"],
)
def test_an_adapter_with_a_damaged_header(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    save_adapter(tmp_path / "mine")
    path = tmp_path / "mine" / "adapter.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refused(
        lambda: read_adapter(tmp_path / "mine"), "adapter 'mine' is damaged (Error while deserializing...: save or fit"
    )


@given(seeds)
def test_any_damaged_adapter_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(folder)
    assert problem(lambda: read_adapter(folder)) is None
    config, weights = folder / "adapter_config.json", folder / "adapter.safetensors"
    good, raw = config.read_bytes(), weights.read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    header = as_json(deformed(json.loads(raw[8:size]), seed))
    for content in (damaged(good, seed), as_json(deformed(json.loads(good), seed))):
        config.write_bytes(content)
        assert problem(lambda: read_adapter(folder)) is None
    config.write_bytes(good)
    for content in (damaged(raw, seed), len(header).to_bytes(8, "little") + header + raw[size:]):
        weights.write_bytes(content)
        assert problem(lambda: read_adapter(folder)) is None
    shutil.rmtree(folder)


# Tokenizers


def with_entry(layout: dict[str, Any], piece: str, token: Any) -> dict[str, Any]:
    """A layout with one more piece."""
    return layout | {"model": layout["model"] | {"vocab": layout["model"]["vocab"] | {piece: token}}}


def with_model(layout: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A layout with another model."""
    return layout | {"model": layout["model"] | changes}


END = PHI["added_tokens"][0]
TEMPLATE = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
TOKENIZERS: dict[str, tuple[Any, str]] = {
    "an id of 2**40": (with_entry(PHI, "zzz", 2**40), "tokenizer.json' is damaged (invalid value: integer...: save or"),
    "an id of 2**31": (with_entry(PHI, "zzz", 2**31), "('zzz' has id 2147483648, beyond any vocabulary): save or"),
    "a negative id": (
        with_entry(PHI, "zzz", -1),
        "is damaged (invalid value: integer `-1`...: save or download it anew",
    ),
    "an id that is text": (
        with_entry(LLAMA, "zzz", "5"),
        "is damaged (invalid type: string...: save or download it anew",
    ),
    "two pieces of one id": (with_entry(LLAMA, "zzz", 5), "('zzz' and '<0x02>' share id 5): save or download it anew"),
    "no model": ({key: PHI[key] for key in PHI if key != "model"}, "is damaged (Model missing...: save or download it"),
    "a model that is a list": (PHI | {"model": []}, "tokenizer.json' is damaged (...: save or download it anew"),
    "a merge of nothing": (
        with_model(PHI, merges=[["q!", "z!"]]),
        "(Token `q!` out of vocabulary...: save or download",
    ),
    "an added token twice": (
        PHI | {"added_tokens": [END | {"id": 7}]},
        "the added token {...gets another id): save or",
    ),
    "a prefix that is cut off": (  # of a merge that lacks it: once the end of the process
        with_model(PHI, continuing_subword_prefix="\0"),
        "lacks the prefix '\\x00'): save or download it anew",
    ),
    "a template of nothing": (  # once a panic of the library at the first text
        PHI | {"post_processor": TEMPLATE | {"single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}]}},
        "(its template asks for '<s>', which is not there): save or download it anew",
    ),
    "a template of two texts": (
        PHI | {"post_processor": TEMPLATE | {"single": [{"Sequence": {"id": "B", "type_id": 0}}]}},
        "(its template asks for 'B', which is not there): save or download it anew",
    ),
    "a list": ([PHI], "is damaged (a list in the place of an object): save or download it anew"),
    "cut off": (as_json(PHI)[:500], "tokenizer.json' is damaged (...: save or download it anew"),
    "empty": (b"", "tokenizer.json' is damaged (Expecting value...: save or download it anew"),
    "NUL": (b"\0" * 40, "tokenizer.json' is damaged (...: save or download it anew"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_damaged_tokenizer(case: str, tmp_path: Path) -> None:
    content, sentence = TOKENIZERS[case]
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else as_json(content))
    for read in (ByteTable.of, Segmenter.of, read_tokenizer):
        refused(lambda read=read: read(path), sentence)


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        (with_model(PHI, end_of_word_suffix="</w>"), "pieces with a end_of_word_suffix are not the bytes...: use a"),
        (LLAMA | {"decoder": PHI["decoder"]}, "is not written in the byte alphabet: mark it as an added token"),
        (PHI | {"model": {"type": "Unigram"}, "decoder": []}, "a Unigram tokenizer with decoder none does not...: use"),
    ],
    ids=["a suffix", "the decoder of another", "another family, damaged"],
)
def test_a_tokenizer_whose_bytes_are_not_known(layout: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(as_json(layout))
    refused(lambda: ByteTable.of(tmp_path), sentence)


@given(seeds)
def test_any_damaged_tokenizer_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    path = tmp_path_factory.getbasetemp() / "tokenizer.json"
    layout = PHI if seed % 2 else LLAMA
    path.write_bytes(damaged(as_json(layout), seed) if seed % 5 == 0 else as_json(deformed(layout, seed)))
    assert problem(lambda: ByteTable.of(path).join([5])) is None
    assert problem(lambda: Segmenter.of(path).segment([b" the cat \xff"])) is None
    assert problem(lambda: read_tokenizer(path).encode_batch_fast(["the cat"])) is None


# Checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good one."""
    folder = tmp_path_factory.mktemp("checkpoint")
    AutoModelForCausalLM.from_config(tiny_llama()).save_pretrained(folder)
    shutil.copy(MODELS / "port-llama" / "tokenizer.json", folder)
    return folder


UP = "model.layers.1.mlp.up_proj.weight"
CHECKPOINTS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "config cut off": ("config.json", lambda raw: b'{"a"', "config.json' is damaged (...: save or download it anew"),
    "config of no model": ("config.json", lambda raw: {}, "the config.json of...gives no network (...: use the one of"),
    "config of a reader": (
        "config.json",
        lambda raw: {"model_type": "t5"},
        "gives no network (...: use the one of its",
    ),
    "a negative width": ("config.json", lambda raw: raw | {"hidden_size": -4}, "gives no network (...: use the one of"),
    "a width of text": ("config.json", lambda raw: raw | {"hidden_size": "x"}, "gives no network (...: use the one of"),
    "no heads": ("config.json", lambda raw: raw | {"num_attention_heads": 0}, "gives no network (...: use the one of"),
    "a layer too many": (  # which once had random weights
        "config.json",
        lambda raw: raw | {"num_hidden_layers": 3},
        "lack 9 of those...model.layers.2...: use config and weights of one model",
    ),
    "another width": (
        "config.json",
        lambda raw: raw | {"hidden_size": 32},
        "lack...: use config and weights of one model",
    ),
    "weights cut off": (
        "model.safetensors",
        lambda raw: raw[:-9],
        "the weights of...are damaged (...: save or download",
    ),
    "no weights": (
        "model.safetensors",
        lambda raw: b"",
        "the weights of...are damaged (...: save or download them anew",
    ),
    "one weight missing": ("model.safetensors", lambda raw: {UP: None}, f"lack 1 of those...{UP}...: use config and"),
    "one weight of another size": ("model.safetensors", lambda raw: {UP: torch.ones(3, 16)}, f"lack 1...{UP}...: use"),
    "one weight NaN": ("model.safetensors", lambda raw: {UP: torch.full((32, 16), NAN)}, "are not finite: use other"),
    "a damaged tokenizer": (
        "tokenizer.json",
        lambda raw: b"{}",
        "tokenizer.json' is damaged (...: save or download it",
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_damaged_checkpoint(case: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name, change, sentence = CHECKPOINTS[case]
    folder = shutil.copytree(checkpoint, tmp_path / "mine")
    raw = (folder / name).read_bytes()
    changed = change(json.loads(raw) if name == "config.json" else raw)
    if isinstance(changed, dict) and name == "model.safetensors":
        kept = {key: value for key, value in (load_file(folder / name) | changed).items() if value is not None}
        save_file(kept, folder / name, metadata={"format": "pt"})
    else:
        (folder / name).write_bytes(changed if isinstance(changed, bytes) else as_json(changed))
    refused(lambda: load(str(folder)), sentence)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dtype": torch.int8}, "dtype torch.int8 is none to compute in: use torch.float32"),
        ({"dtype": "float32"}, "dtype float32 is none to compute in: use torch.float32"),
        ({"device": "gpu"}, "device 'gpu' cannot be used (...: use 'cpu'"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used (...: use 'cpu'"),
        ({"name": "x" * 5000}, "is neither a folder nor a hub model that can be reached: give a folder"),
        ({"name": str(MODELS / "port-llama" / "config.json")}, "config.json' is neither a folder nor a hub...: give"),
    ],
    ids=["int8", "text", "no device", "no such card", "a long name", "a file"],
)
def test_a_model_that_cannot_be_asked_for(arguments: dict[str, Any], sentence: str) -> None:
    refused(lambda: load(**{"name": str(MODELS / "port-llama")} | arguments), sentence)


# Functions

H = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
Z = torch.randn(40, 4096, generator=torch.Generator().manual_seed(1))
FOLDS = [k % 5 for k in range(40)]
BROKEN = Z.clone()
BROKEN[3, 4] = NAN


@dataclass(frozen=True)
class Things:
    """A model of width 16 and depth 2, an adapter of it, and a bridge from another model."""

    model: LanguageModel
    bridge: Bridge

    @property
    def head(self) -> Head:
        """The model's."""
        return self.model.head

    @property
    def nothing(self) -> Adapter:
        """An adapter that edits nothing."""
        return Adapter.untouched(self.head, 1)


@pytest.fixture(scope="module")
def things(checkpoint: Path) -> Things:
    bridge = Bridge.of(Segmenter.of(MODELS / "port-llama"), ByteTable.of(MODELS / "expert-phi"))
    return Things(load(str(checkpoint)), bridge)


CALLS: dict[str, tuple[Callable[[Things], object], str]] = {
    "fit to one text": (
        lambda t: fit(t.model, t.model, "What is 2?"),
        "'What is 2?' is no list of texts: put it into a",
    ),
    "fit to numbers": (lambda t: fit(t.model, t.model, [1, 2]), "1 among the texts is of type int: give strings alone"),
    "fit to half a pair": (
        lambda t: fit(t.model, t.model, ["\ud800", "b"]),
        "'\\ud800' holds half a surrogate...: read",
    ),
    "fit to empty texts": (lambda t: fit(t.model, t.model, ["", "a"]), "1 of 2 texts have tokens to fit at: give two"),
    "fit a rank below 0": (lambda t: fit(t.model, t.model, ["a", "b"], -1), "rank -1 is beyond the limit:...0 to 16"),
    "fit half a rank": (lambda t: fit(t.model, t.model, ["a", "b"], 1.5), "rank 1.5 is beyond the limit:...0 to 16"),
    "fit at no position": (
        lambda t: fit(t.model, t.model, ["a", "b"], positions=0),
        "0 positions leave none...: ask for",
    ),
    "fit to a name": (
        lambda t: fit(t.model, "models/port-llama", ["a"]),
        "'models/port-llama' is no loaded model: give",
    ),
    "fit a network": (lambda t: fit(t.model.network, t.model, ["a"]), "is no loaded model: give what `load` returns"),
    "states of fewer rows": (
        lambda t: fit_states(H, H[:9], t.head, FOLDS),
        "are [[40, 16], [9, 16]] with 40...: give one",
    ),
    "states of another width": (lambda t: fit_states(H[:, :9], H, t.head, FOLDS), "are [[40, 9],...: give one row and"),
    "states that are NaN": (lambda t: fit_states(H, H / 0, t.head, FOLDS), "row 0 of the targets is not finite: leave"),
    "a single fold": (lambda t: fit_states(H, H, t.head, [0] * 40), "all 40 rows are of one fold...: number two folds"),
    "logits of another base": (
        lambda t: fit_logits(H, Z[:, :9], t.head, FOLDS),
        "are [[40, 16], [40, 9]]...: give one",
    ),
    "folds of fewer rows": (
        lambda t: fit_logits(H, Z, t.head, FOLDS[:9]),
        "with 9 folds, where...40 folds: give one row",
    ),
    "a NaN among logits": (lambda t: fit_logits(H, BROKEN, t.head, FOLDS), "row 3 of the targets is not finite: leave"),
    "a ridge that is NaN": (
        lambda t: fit_logits(H, Z, t.head, FOLDS, NAN),
        "ridge nan is not finite: use zero or more",
    ),
    "no rows": (
        lambda t: fit_gated(H[:0], Z[:0], t.head, []),
        "all 0 rows are of one fold...: number two folds at least",
    ),
    "a rank above the width": (lambda t: fit_gated(H, Z, t.head, FOLDS, 17), "rank 17 is beyond the limit:...0 to 16"),
    "groups of fewer rows": (
        lambda t: fit_gated(H, Z, t.head, FOLDS, groups=["a"]),
        "1 groups for 40 rows: give one for",
    ),
    "states of one text": (lambda t: collect(t.model, "Go"), "'Go' is no list of texts: put it into a list"),
    "states of no list": (lambda t: collect(t.model, None), "None is no list of texts: put it into a list"),
    "positions of fewer texts": (
        lambda t: collect(t.model, ["a", "b"], [[0]]),
        "1 lists of positions for 2 texts: give",
    ),
    "a layer too deep": (lambda t: collect(t.model, ["a"], layers=[3]), "no states of layer 3:...has 0 to 2"),
    "a layer from the end": (lambda t: collect(t.model, ["a"], layers=[-1]), "no states of layer -1:...has 0 to 2"),
    "bits of no text": (lambda t: bits_per_byte(t.model, []), "there is no text to be scored...: leave it out"),
    "bits of an empty text": (
        lambda t: bits_per_byte(t.model, ["a", ""]),
        "or an empty one among the texts: leave it out",
    ),
    "a port of a name": (lambda t: Port("models/port-llama"), "'models/port-llama' is no loaded model: give what"),
    "a folder plugged in": (lambda t: Port(t.model).plug("a", "folder"), "'folder' is no adapter: give what `fit`"),
    "factors of two ranks": (
        lambda t: Port(t.model).plug("a", replace(t.nothing, up=t.nothing.up[:, :0])),
        "are [[16, 1], [16, 0], [16]], where its head takes [[16, 1], [16, 1], [16]]...: save or fit it anew",
    ),
    "no token to write": (lambda t: Port(t.model).generate("a", tokens=0), "0 tokens are no continuation: ask for one"),
    "half a token to write": (lambda t: Port(t.model).generate("a", tokens=1.5), "1.5 tokens are no continuation: ask"),
    "a number for a prompt": (lambda t: Port(t.model).generate(5), "5 among the texts is of type int: give strings"),
    "greedily no token": (lambda t: t.model.greedy("a", 0), "'a' is not continued by 0 tokens: give a text, and one"),
    "one row as a vector": (
        lambda t: t.bridge.one_step(torch.ones(5120)),
        "a tensor [5120] of...no rows...: pass one for",
    ),
    "no row": (lambda t: t.bridge.one_step(torch.ones(0, 5120)), "a tensor [0, 5120]...no rows of probabilities: pass"),
    "counts for probabilities": (
        lambda t: t.bridge.one_step(torch.ones(1, 5120).long()),
        "of torch.int64...: pass one",
    ),
    "logits for probabilities": (lambda t: t.bridge.one_step(Z.repeat(1, 2)[:, :5120]), "is no distribution...: pass"),
    "budgets that fall": (
        lambda t: trace(t.bridge, id, "a", [4, 1]),
        "budgets [4, 1] of one search do not rise...: sort",
    ),
    "a mass that is NaN": (lambda t: trace(t.bridge, id, "a", [1], NAN), "delta nan is no mass: give 0 to 1"),
    "a layer of nothing": (
        lambda t: BlockCirculantLinear(0, 4, 1),
        "a layer 0 -> 4 holds nothing: give sizes above zero",
    ),
    "half a block": (
        lambda t: BlockCirculantLinear(8, 4, 1.5),
        "block size 1.5 does not fit a layer 8 -> 4: use 1 to 8",
    ),
    "inputs of another width": (
        lambda t: BlockCirculantLinear(8, 4, 2)(torch.ones(3, 10)),
        "the input has 10 features, this layer reads 8: check its place",
    ),
    "a low rank of nothing": (
        lambda t: LowRankLinear(-3, 4, 0),
        "a layer -3 -> 4 holds nothing: give sizes above zero",
    ),
    "no layers to replace": (
        lambda t: replacements(t.model, [], 8, "average"),
        "layers [] name none...: give a list of",
    ),
    "a layer as a number": (
        lambda t: replacements(t.model, 1, 8, "average"),
        "layers 1 name none...: give a list of at",
    ),
    "a layer of text": (
        lambda t: replacements(t.model, ["a"], 8, "average"),
        "no layer 'a': this network has layers 0 to 1",
    ),
    "blocks of nothing": (
        lambda t: replacements(t.model, [0], 0, "low_rank"),
        "block size 0 does not fit a...: use 1 to",
    ),
    "blocks below nothing": (
        lambda t: replacements(t.model, [0], -2, "low_rank"),
        "block size -2 does not fit...: use 1",
    ),
    "prompts without groups": (
        lambda t: replacements(t.model, [0], 8, "aware", ["one", "two"]),
        "'one' is no `Prompt` with a group: make prompts with `take` or `read_prompts`",
    ),
    "a patch of the wrapper": (lambda t: patch(t.model, {}), "a LanguageModel has no layers to be replaced: give the"),
    "calibration on one text": (
        lambda t: calibrate(t.model, replacements(t.model, [1], 8, "average"), "one", "two"),
        "'one' is no list of texts: put it into a list",
    ),
    "half a step": (lambda t: Settings(steps=1.5), "steps 1.5 is a float: give a number, whole but for the rate"),
    "a rate that is NaN": (lambda t: Settings(rate=NAN), "rate nan is not above zero: give a larger one"),
    "no number of steps": (lambda t: Settings(steps=None), "steps None is a NoneType: give a number"),
    "an effect below zero": (
        lambda t: SyntheticExpert.draw(16, 2).with_effect(-1.0, t.head, H),
        "of -1.0 nats...: ask for",
    ),
    "an effect that is NaN": (
        lambda t: SyntheticExpert.draw(16, 2).with_effect(NAN, t.head, H),
        "of nan nats...: ask for",
    ),
    "an effect on nothing": (
        lambda t: SyntheticExpert.draw(16, 2).with_effect(1.0, t.head, H[:0]),
        "on 0 states...: ask",
    ),
    "a seed beyond 64 bits": (
        lambda t: SyntheticExpert.draw(16, 2, 2**70),
        "is no seed: give a whole number from 0 to",
    ),
    "half a prompt": (
        lambda t: take("mixed", "index", "train", 1.5),
        "1.5 is no number of prompts: give a whole number",
    ),
    "a rank above the study's": (
        lambda t: scaled_rank(256, 4096),
        "rank 4096 is above 2048, the width...: give a lower",
    ),
    "a layer above the study's": (
        lambda t: scaled_layer(8, 23),
        "layer 23 is none of the study's: give one from 0 to 22",
    ),
    "a block of the study below 1": (
        lambda t: scaled_block_size(256, 0),
        "block size 0 does not fit the study's...: give",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_function_that_is_given_what_it_cannot_use(case: str, things: Things) -> None:
    call, sentence = CALLS[case]
    refused(lambda: call(things), sentence)
    assert not things.model.network.get_output_embeddings()._forward_hooks


def test_a_text_with_a_token_that_the_model_lacks(things: Things) -> None:
    model = replace(things.model, head=Head(things.head.weight[:100]))
    refused(
        lambda: collect(model, ["Return the"]), "has a token of id...knows 100: use the tokenizer that belongs to the"
    )


# Parameters of notebooks, and profiles

PARAMETERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no prompts": ("30", {"n_train": 0}, "sets 'n_train' to 0, which is not above zero: give a larger number"),
    "fewer than none": ("30", {"n_test": -5}, "sets 'n_test' to -5, which is not above zero: give a larger number"),
    "a truth for a number": (
        "30",
        {"n_test": True},
        "sets 'n_test' to True, but...declares it as int: give a value of",
    ),
    "a decimal for a number": (
        "30",
        {"n_test": 5.0},
        "sets 'n_test' to 5.0, but...declares it as int: give a value of",
    ),
    "nothing for a text": ("30", {"base": None}, "sets 'base' to None, but...declares it as str: give a value of that"),
    "an empty list": ("22", {"ranks": []}, "sets 'ranks' to [], which names nothing: give at least one entry"),
    "text in a list": (
        "22",
        {"ranks": [4, "x"]},
        "sets 'ranks' to [4, 'x'], but...with entries as in [4, 8,...: give a",
    ),
    "a list in a list": ("22", {"seeds": [[0]]}, "sets 'seeds' to [[0]], but...with entries as in [0, 1, 2]: give a"),
    "a rank of zero": ("22", {"ranks": [0]}, "sets 'ranks' to [0], which is not above zero: give a larger number"),
    "a seed below zero": ("22", {"seeds": [-1]}, "sets 'seeds' to [-1], which is below zero: give a larger number"),
    "an infinite edit": ("22", {"edits": [0.5, INFINITE]}, "sets 'edits' to [0.5, inf], which is not finite: give a"),
    "an edit that is NaN": ("21", {"edit_kl": NAN}, "sets 'edit_kl' to nan, which is not finite: give a number"),
    "an edit that is not made": (
        "22",
        {"ablated": 0.7},
        "leaves 'ablated' at 0.7, which is none of the edits [0.1,...: set",
    ),
    "edits without the shown one": (
        "26",
        {"edits": [0.1]},
        "leaves 'ablated' at 0.5, which is none of...[0.1]: set it",
    ),
    "a profile outside": ("22", {"profile": "../../x"}, "sets 'profile' to '../../x', which names no folder...: use"),
    "a profile of no name": ("22", {"profile": ""}, "sets 'profile' to '', which names no folder of results: use"),
}


@cache
def notebook(number: str) -> Notebook:
    """The notebook of a number."""
    (path,) = (path for path in numbered_notebooks(ROOT) if path.name.startswith(number))
    return Notebook.read(path)


@pytest.mark.parametrize("case", PARAMETERS)
def test_a_notebook_with_bad_parameters(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number, values, sentence = PARAMETERS[case]
    monkeypatch.setattr(report, "BUILD", tmp_path)
    asked = notebook(number)
    refused(lambda: report.stamp(asked.path.stem, asked.defaults | values), "this run " + sentence)
    assert not list(tmp_path.iterdir())


PROFILES = {
    "a scalar": ("5", "own.yaml holds 5: a profile is a mapping of parameters to values"),
    "nothing": ("", "own.yaml holds None: a profile is a mapping"),
    "tabs": ("base:\n\t- x", "own.yaml cannot be read (...found character '\\t'...: write UTF-8 lines of a name"),
    "one name twice": ("n_test: 5\nn_test: 6", "cannot be read (it sets 'n_test' twice): write UTF-8 lines"),
    "no end": ("ranks: [4, 8", "own.yaml cannot be read (while parsing...: write UTF-8 lines"),
    "nested without end": ("a: " + "[" * 5000, "own.yaml cannot be read (...: write UTF-8 lines"),
    "month 13": ("base: 2026-13-40", "own.yaml cannot be read (month must be in 1..12): write UTF-8 lines"),
    "an object": (
        "base: !!python/object:os.system {}",
        "(it has an anchor, an alias, a tag or lists in...): write UTF-8 lines",
    ),
    "a tag that does not fit": (
        "n_test: !!timestamp x",
        "(it has an anchor, an alias, a tag or lists in...): write UTF-8 lines",
    ),
    "a list of itself": ("edits: &a [*a]", "(it has an anchor, an alias, a tag or lists in...): write UTF-8 lines"),
    "two documents": ("n_test: 5\n---\nn_test: 6", "own.yaml cannot be read (...: write UTF-8 lines"),
    "latin-1": ("base: Größe".encode("latin-1"), "own.yaml cannot be read ('utf-8' codec...: write UTF-8 lines"),
    "utf-16": ("n_test: 5".encode("utf-16"), "own.yaml cannot be read ('utf-8' codec...: write UTF-8 lines"),
    "an unknown parameter": (
        "profile: own\nn_tset: 5",
        "sets 'n_tset', a parameter that no notebook has: remove it or",
    ),
    "a name that is a number": ("profile: own\n5: 5", "sets 5, a parameter that no notebook has: remove it or choose"),
    "a number below zero": ("profile: own\nn_test: -5", "sets 'n_test' to -5, which is not above zero: give a larger"),
    "a number as text": ("profile: own\nn_test: '5'", "sets 'n_test' to '5', but...declares it as int: give a value"),
    "no name of its own": ("n_test: 5", "profile 'own' does not name itself...: set `profile` to own in"),
    "the name of another": ("profile: laptop", "profile 'own' does not name itself...: set `profile` to own in"),
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with two of the notebooks."""
    (tmp_path / "notebooks" / "profiles").mkdir(parents=True)
    for number in ("22", "30"):
        shutil.copy(notebook(number).path, tmp_path / "notebooks")
    for path in ("chassis_utils", "paper"):
        (tmp_path / path).symlink_to(ROOT / path)
    return tmp_path


@pytest.mark.parametrize("case", PROFILES)
def test_a_bad_profile(case: str, project: Path) -> None:
    content, sentence = PROFILES[case]
    raw = content if isinstance(content, bytes) else content.encode()
    (project / "notebooks" / "profiles" / "own.yaml").write_bytes(raw)
    refused(lambda: plan(project, "own"), sentence)
    assert not (project / "build").exists()


@pytest.mark.parametrize("name", ["", "..", "../profiles/own", "own.yaml", "x" * 300])
def test_a_profile_of_another_name(name: str, project: Path) -> None:
    (project / "notebooks" / "profiles" / "own.yaml").write_text("profile: own")
    with pytest.raises(PlanError, match=r"is unknown: choose one of own, or add|does not name itself"):
        plan(project, name)


GOOD_PROFILE = b"""profile: own
base: models/port-llama
n_train: 10
ranks: [4, 8]
edits:
- 0.1
- 0.5
ablated: 0.5
seeds: [0]
prompts_file: ''
"""


@given(seeds)
def test_any_damaged_profile_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "own.yaml").write_bytes(damaged(GOOD_PROFILE, seed))

    def read() -> None:
        values = read_profile(folder, "own")
        asked = notebook("22")
        asked.check({name: value for name, value in values.items() if name in asked.parameters}, "profile 'own'")

    assert problem(read) is None


# The command line, each in a process of its own

COMMANDS = {
    "nothing": ([], "the following arguments are required: command: see `chassis --help`"),
    "half of fit": (["fit", "a"], "arguments are required: expert, texts: see `chassis fit --help`"),
    "a rank of text": (
        ["fit", "a", "b", "texts.txt", "--rank", "x"],
        "invalid int value: 'x': see `chassis fit --help`",
    ),
    "an unknown option": (["fit", "a", "b", "texts.txt", "--foo"], "unknown arguments: --foo: see `chassis --help`"),
    "no UTF-8": (["fit", "a", "b", "latin.txt"], "prompt file 'latin.txt' is no UTF-8 text...: save it as UTF-8"),
    "a folder of texts": (["fit", "a", "b", "."], "prompt file '.' is a folder: name a text file"),
    "a file for the adapter": (
        ["fit", "a", "b", "texts.txt", "--out", "texts.txt"],
        "no folder can be made at...: name one",
    ),
    "below a file": (["fit", "a", "b", "texts.txt", "--out", "texts.txt/x/y"], "no folder can be made at...: name one"),
    "a rank below zero": (
        ["fit", str(MODELS / "port-llama"), str(MODELS / "port-llama"), "texts.txt", "--rank", "-1", "--out", "new"],
        "rank -1 is beyond the limit: states of this width give ranks 0 to 256",
    ),
    "fewer than none": (["run", "30", "--n-train", "-3"], "sets 'n_train' to -3, which is not above zero: give"),
    "an infinite number": (["run", "22", "--edits", "[1e999]"], "sets 'edits' to [inf], which is not finite: give"),
    "one parameter twice": (
        ["run", "30", "--n-train", "5", "--n_train", "6"],
        "--n-train is given twice: give it once",
    ),
    "brackets without end": (
        ["run", "22", "--ranks", "(" * 500],
        "sets 'ranks' to '((((...declares it as list...: give",
    ),
    "no such model": (
        ["run", "30", "--base", "no/such"],
        "model 'no/such' is neither a folder nor a hub model...: give",
    ),
    "no such prompts": (
        ["run", "30", "--prompts-file", "none.txt"],
        "prompt file 'none.txt' does not exist: name a text",
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_that_cannot_be_done(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, sentence = COMMANDS[case]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    (tmp_path / "latin.txt").write_bytes("Größe\n".encode("latin-1"))
    command = [sys.executable, "-m", "chassis_utils", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert re.match("error: .*" + ".*".join(map(re.escape, sentence.split("..."))), done.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latin.txt", "texts.txt"]
