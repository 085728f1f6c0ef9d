"""States of a model at the last token (or a chosen one) of each prompt, at every layer.

Prompts are padded on the right and masked, whatever the tokenizer's default, and the state
is read at the last real token, so a batch gives what each prompt alone gives. Layer 0 is
the embeddings, the last is the state after the final norm: the head's input. Computed
once: stored by the content of model and prompts in `build/cache/`, under a lock, so that
notebooks running side by side share one pass. Cost: one forward pass per prompt;
n * (depth + 1) * width numbers.
"""

from collections.abc import Iterator, Sequence
from importlib.metadata import version

import torch
from filelock import FileLock
from jaxtyping import Float, Int
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from chassis_utils.corpus import content_key
from chassis_utils.models import LanguageModel
from chassis_utils.paths import CACHE, write_atomically
from chassis_utils.resources import require_disk, require_memory

FORMAT = 1  # raised whenever the same inputs give other states
BATCH_TOKENS = 4096  # tokens of one forward pass, padding included


def collect(
    model: LanguageModel, texts: Sequence[str], positions: Sequence[int] | None = None
) -> Float[Tensor, "layers n d"]:
    """States [depth + 1, n, width] of each text at its last token, or at token `positions[k]` of text k.

    Raises `ValueError` for a text without tokens or longer than the model reads, a
    position outside its text, and states that are not finite; `OSError` for a full disk and
    `MemoryError` for too little memory, both before the pass begins.
    """
    ids = encode(model, texts)
    ends = [len(row) - 1 for row in ids] if positions is None else list(positions)
    for text, row, end in zip(texts, ids, ends, strict=True):
        if not 0 <= end < len(row):
            raise ValueError(f"position {end} lies outside the {len(row)} tokens of prompt {text[:40]!r}")
    made_by = f"{FORMAT} {version('torch')} {version('transformers')} {model.network.dtype} {model.fingerprint}"
    key = content_key(f"{made_by} {ids} {ends}")
    stored = CACHE / f"states-{key}.safetensors"
    stored.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(stored.with_suffix(".lock")):
        if not stored.exists():
            size = (model.depth + 1) * len(ids) * model.width * model.network.dtype.itemsize
            remedy = "use fewer prompts or a smaller model"
            require_memory(2 * size, f"the states of {len(ids)} prompts", remedy)  # once more while they are written
            require_disk(size, CACHE, f"the states of {len(ids)} prompts")
            found = _run(model, ids, ends)
            _check_finite(found, texts)
            write_atomically(stored, save({"states": found}))
    return load_file(stored)["states"]


def encode(model: LanguageModel, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text; `ValueError` for no text, one without tokens or longer than the model reads."""
    ids = model.encode(texts)
    if not ids:
        raise ValueError("there are no prompts for the model to read: give at least one")
    limit = reading_limit(model)
    for text, row in zip(texts, ids, strict=True):
        if not row:
            raise ValueError(f"prompt {text!r} has no tokens: remove it")
        if len(row) > limit:
            raise ValueError(f"prompt {text[:40]!r}... has {len(row)} tokens, {model.name} reads {limit}: shorten it")
    return ids


def reading_limit(model: LanguageModel) -> int | float:
    """The most tokens that the model reads; infinite where its configuration names none."""
    return getattr(model.network.config.get_text_config(), "max_position_embeddings", None) or float("inf")


def batches(ids: Sequence[list[int]]) -> Iterator[list[int]]:
    """Numbers of the prompts of each batch: similar lengths together, within `BATCH_TOKENS` tokens."""
    batch: list[int] = []
    for k in sorted(range(len(ids)), key=lambda k: len(ids[k])):
        if batch and len(ids[k]) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(k)
    yield batch


def pad(rows: Sequence[list[int]], device: torch.device) -> tuple[Int[Tensor, "n t"], Int[Tensor, "n t"]]:
    """Token ids padded on the right, and the mask that is 1 where they are real."""
    longest = max(map(len, rows))
    ids = [row + [0] * (longest - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@torch.inference_mode()
def _run(model: LanguageModel, ids: list[list[int]], ends: list[int]) -> Float[Tensor, "layers n d"]:
    found = torch.empty(model.depth + 1, len(ids), model.width, dtype=model.network.dtype)
    with tqdm(total=len(ids), desc=f"states of {model.name}", disable=None, leave=False) as bar:
        for batch in batches(ids):
            padded, mask = pad([ids[k] for k in batch], model.device)
            output = model.network.base_model(padded, attention_mask=mask, output_hidden_states=True, use_cache=False)
            rows = torch.arange(len(batch))
            places = torch.tensor([ends[k] for k in batch])
            for layer, states in enumerate(output.hidden_states):
                found[layer, batch] = states[rows, places].cpu()
            bar.update(len(batch))
    return found


def _check_finite(found: Float[Tensor, "layers n d"], texts: Sequence[str]) -> None:
    bad = (~torch.isfinite(found).all(-1)).nonzero()
    if len(bad):
        layer, k = bad[0].tolist()
        raise ValueError(f"state of layer {layer} is not finite for prompt {texts[k][:60]!r}: use float32 or drop it")
