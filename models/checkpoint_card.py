"""The last step of training: weights in half precision, configuration and a model card."""

import torch
from transformers import PreTrainedModel

from chassis_utils.files import MODELS, write_atomically
from chassis_utils.lm.bits_per_byte import bits_per_byte
from chassis_utils.lm.model import describe, load
from chassis_utils.text.corpus import PACKAGES, package_versions, read_documents

STARTS = (
    "Compute the singular value decomposition of",
    "Parameters\n----------\nx : array_like\n   ",
    "The sum of 4 and 5 is",
)
CARD = """# {model}

{purpose} {parameters:,} parameters, {architecture} architecture, width {width}, {layers} layers,
vocabulary {vocabulary} ({tokenizer}). Trained from the seed by `models/train.py`; weights in float16.

| | |
|---|---|
| tokens seen | {tokens:,} |
| training time | {seconds:.0f} s on {threads} thread(s) |
| held-out bits per byte | {whole.mean:.3f} ± {whole.se:.3f} on {n_whole} documents |
| the same where no paragraph occurs in training | {unseen.mean:.3f} ± {unseen.se:.3f} on {n_unseen} |

## Data

Docstrings of installed packages, read at training time and not part of this repository, and generated
sentences of arithmetic and explanation (`models/generated_text.py`). A document is one docstring; a hash
of its content keeps 6 percent of the documents out of training.

| package | version | licence |
|---|---|---|
{packages}

## Greedy samples

{samples}

## Limits

A checkpoint of this size knows the manner of technical English and little else. It exists so that the
paper's experiments run on a real trained model anywhere; it is of no use as an assistant.
"""
PURPOSES = {
    "port-llama": "The frozen base (the port) of the default profile.",
    "expert-phi": "An expert of another architecture with another tokenizer.",
    "sibling-math": "`port-llama` trained further, mostly on arithmetic: an expert that shares its tokenizer.",
}


def write_checkpoint(name: str, network: PreTrainedModel, *, tokens: int, seconds: float, threads: int) -> None:
    """Save `network` under models/<name>, measure what was saved and write its card."""
    folder = MODELS / name
    network.to(torch.float16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)  # repeats the configuration
    (folder / "model.safetensors").chmod(0o644)
    model = load(f"models/{name}")
    known = {part for document in read_documents("train") for part in document.paragraphs}
    held_out = read_documents("test")
    whole = bits_per_byte(model, [document.text for document in held_out])
    unseen = whole[[k for k, document in enumerate(held_out) if not known & document.paragraphs]]
    card = CARD.format(
        **describe(model) | {"model": name},
        purpose=PURPOSES[name],
        tokens=tokens,
        seconds=seconds,
        threads=threads,
        whole=whole,
        unseen=unseen,
        n_whole=len(whole.bits),
        n_unseen=len(unseen.bits),
        packages="\n".join(f"| {k} | {v} | {PACKAGES[k]} |" for k, v in package_versions().items()),
        samples="\n\n".join(f"```text\n{start}⟩{model.greedy(start, 60)}\n```" for start in STARTS),
    )
    write_atomically(folder / "README.md", card)
