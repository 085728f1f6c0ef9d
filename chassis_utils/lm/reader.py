"""Rows of tokens read again and again while they grow: what has been read is kept, whatever changes at their ends.

Keys and values that a row no longer needs are masked, or cut off where no row has any behind them; every token keeps
its position in its own row. Cost: one pass over the new tokens of the row with most of them.
"""

import inspect
from collections.abc import Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from chassis_utils.lm.forward import pad, reading_limit
from chassis_utils.lm.model import LanguageModel


class Reader:
    """Logits at the ends of a batch of rows, of which every call gives the whole.

    A model that keeps more than keys and values, or takes no positions, reads all tokens at each call; one with a
    sliding window does once they take as many places as the window, which would count masked ones as read.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model, self._cache = model, DynamicCache()
        self._rows: list[list[int]] = []
        self._places: list[list[int]] = []  # of each row's tokens among the kept keys
        layers = DynamicCache(config=model.network.config).layers
        windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
        self._room = min(windows, default=float("inf"))
        self._keeps = model.keeps_keys and "position_ids" in inspect.signature(model.body.forward).parameters

    @torch.inference_mode()
    def __call__(self, rows: Sequence[list[int]], last: int = 1) -> list[Shaped[Tensor, "k vocab"]]:
        """Next-token logits at the `last` tokens of each row, or all of a shorter one, on the CPU.

        Raises `ValueError` for a row without tokens and one longer than the model reads.
        """
        limit = reading_limit(self.model)
        if not all(0 < len(row) <= limit for row in rows):
            lengths = ", ".join(str(len(row)) for row in rows)
            raise ValueError(f"rows of {lengths} tokens, but {self.model.name!r} reads 1 to {limit}: give others")
        kept = self._agreement(rows, last)
        start = max((places[k - 1] + 1 for places, k in zip(self._places, kept, strict=False) if k), default=0)
        longest = max(len(row) - k for row, k in zip(rows, kept, strict=True))
        if not start or max(start + longest, self._cache.get_seq_length()) >= self._room:
            kept, start, self._cache = [0] * len(rows), 0, DynamicCache(config=self.model.network.config)
            self._places = [[] for _ in rows]
        new = [row[k:] for row, k in zip(rows, kept, strict=True)]
        states = self._read(new, kept, start)
        self._rows = [list(row) for row in rows]
        ends = [state[max(len(row) - last, 0) : len(row)] for state, row in zip(states, new, strict=True)]
        logits = self.model.head.finish(self.model.network.get_output_embeddings()(torch.cat(ends))).cpu()
        return list(logits.split([len(end) for end in ends]))

    def _agreement(self, rows: Sequence[list[int]], last: int) -> list[int]:
        """How many tokens of each row need not be read again."""
        if not self._keeps or len(rows) != len(self._rows):
            return [0] * len(rows)
        kept = []
        for old, row in zip(self._rows, rows, strict=True):
            most = max(min(len(old), len(row) - last), 0)
            kept.append(next((k for k in range(most) if old[k] != row[k]), most))
        return kept

    def _read(self, new: list[list[int]], kept: list[int], start: int) -> Shaped[Tensor, "n t d"]:
        """States of the new tokens, read behind the first `start` kept places."""
        ids, mask = pad(new, self.model.device)
        if not self._keeps:
            return self.model.body(ids, attention_mask=mask, use_cache=False).last_hidden_state
        before = mask.new_zeros(len(new), start)
        for number, k in enumerate(kept):
            before[number, self._places[number][:k]] = 1
            self._places[number][k:] = range(start, start + len(new[number]))
        if start:
            self._cache.crop(start - self._cache.get_seq_length())
        whole = torch.cat([before, mask], dim=1)
        positions = (whole.cumsum(1) - 1)[:, start:]
        inputs = {"attention_mask": whole, "position_ids": positions, "past_key_values": self._cache}
        return self.model.body(ids, **inputs, use_cache=True).last_hidden_state
