"""Bits per byte: how well a language model predicts text, comparable between tokenizers.

Long documents are read in windows of the length the micro checkpoints were trained on;
every window but the first starts with tokens already scored, which are context only.
Cost: one forward pass over the text, a third more for the context.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor
from tqdm import tqdm

from chassis_utils.lm.forward import pad
from chassis_utils.lm.model import LanguageModel
from chassis_utils.metrics import standard_error
from chassis_utils.text.prompts import require_texts

WINDOW, CONTEXT = 256, 64  # tokens read at a time; of these, context in every window but the first
BATCH = 16  # windows of one forward pass, at most
LOGITS = 2**27  # numbers that the logits of one forward pass may be, half a gigabyte


@dataclass(frozen=True)
class BitsPerByte:
    """Bits and UTF-8 bytes of each document."""

    bits: Float64[Tensor, "documents"]
    sizes: Float64[Tensor, "documents"]

    def __getitem__(self, chosen: Sequence[int]) -> "BitsPerByte":
        """The same for some of the documents."""
        return BitsPerByte(self.bits[chosen], self.sizes[chosen])

    @property
    def mean(self) -> float:
        """Bits per byte: total bits over total bytes."""
        return float(self.bits.sum() / self.sizes.sum())

    @property
    def se(self) -> float:
        """Standard error of `mean` over documents (ratio estimator); NaN for a single one."""
        return standard_error((self.bits - self.mean * self.sizes) / self.sizes.mean())


def bits_per_byte(model: LanguageModel, texts: Sequence[str]) -> BitsPerByte:
    """Bits of each text under the model; special tokens are read but not scored. `ValueError` for an empty text.

    >>> from chassis_utils import bits_per_byte, load
    >>> bits_per_byte(load("models/port-llama"), ["Return the mean of the values."]).mean < 3
    True
    """
    texts = require_texts(texts)
    if not texts or "" in texts:
        raise ValueError("there is no text to be scored, or an empty one among the texts: leave it out")
    windows: list[tuple[int, list[int], int]] = []  # document, token ids, first scored position
    for k, ids in enumerate(map(model.begun, model.encode(texts))):  # else some models were spared the first token
        for start in range(0, max(len(ids) - CONTEXT, 1), WINDOW - CONTEXT):
            windows.append((k, ids[start : start + WINDOW], 1 if start == 0 else CONTEXT))
    bits = torch.zeros(len(texts), dtype=torch.float64)
    windows.sort(key=lambda window: len(window[1]))
    size = max(1, min(BATCH, LOGITS // (WINDOW * len(model.head.weight))))
    for first in tqdm(range(0, len(windows), size), desc=f"bits of {model.name}", disable=None, leave=False):
        batch = windows[first : first + size]
        for (k, _, _), scored in zip(batch, _bits(model, batch), strict=True):
            bits[k] += scored
    sizes = torch.tensor([len(text.encode()) for text in texts], dtype=torch.float64)
    return BitsPerByte(bits, sizes)


@torch.inference_mode()
def _bits(model: LanguageModel, batch: list[tuple[int, list[int], int]]) -> list[float]:
    padded, mask = pad([ids for _, ids, _ in batch], model.device)
    logits = model.network(padded, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    nats: Tensor = torch.nn.functional.cross_entropy(logits.flatten(0, 1), padded[:, 1:].flatten(), reduction="none")
    nats = nats.view(len(batch), -1).double().cpu()
    scored = [row[start - 1 : len(ids) - 1] for row, (_, ids, start) in zip(nats, batch, strict=True)]
    return [float(row.sum()) / math.log(2) for row in scored]
