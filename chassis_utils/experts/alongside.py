"""A device alongside: an expert that runs beside the base, in `generate` itself.

    log p(v) = (1 - w) log p_base(v) + w log q(v) + constant,   q = (1 - FLOOR) bridged + FLOOR p_base

At weight w = 1 the expert, carried over byte by byte, takes the place of the base; between, the two are a product of
experts. Cost of a step: one pass of the expert over those of its tokens that are new and the last few before them,
and `calls` passes over one more. An expert with the base's tokenizer reads the base's tokens, in one pass.
"""

import codecs
from collections.abc import Sequence
from itertools import dropwhile

import torch
from jaxtyping import Float, Float64, Int, Shaped
from torch import Tensor
from transformers import LogitsProcessor

from chassis_utils.bridge.bridge import Bridge
from chassis_utils.bridge.covers import Covers
from chassis_utils.experts.bridged import FLOOR
from chassis_utils.lm.model import LanguageModel, require_model
from chassis_utils.lm.reader import Reader

WORD = "a"  # stands for the word before which white space is cut
LEAST = -1e4  # log-probability of what the base excludes: finite, so that a weight of 0 may stand before it


class Alongside(LogitsProcessor):
    """An expert of any tokenizer that the bridge knows, mixed into the base's next-token logits.

    >>> from chassis_utils import Alongside, Port, load
    >>> base = load("models/port-llama")
    >>> port = Port(base)
    >>> port.plug("phi", Alongside(base, load("models/expert-phi"), weight=0.5))
    >>> text = port.generate("Return the mean of", use="phi")

    The expert reads text: nothing of the base's special tokens, so padding must be one, and a replacement sign for
    bytes that are no UTF-8. It says nothing before there is text. Raises `ValueError` for tokenizers that the bridge
    does not know, a weight outside 0 to 1 and calls below 0; in `generate`, for a text longer than the expert reads.
    """

    def __init__(self, base: LanguageModel, expert: LanguageModel, weight: float = 1.0, calls: int = 1) -> None:
        require_model(base)
        require_model(expert)
        if not 0 <= weight <= 1 or calls < 0:
            raise ValueError(f"weight {weight!r} and {calls!r} calls: a weight is 0 to 1, calls are 0 or more")
        self.base, self.expert, self.weight, self.calls = base, expert, weight, calls
        same = base.tokenizer.to_str() == expert.tokenizer.to_str()
        shared = same and len(base.head.weight) == len(expert.head.weight)
        self.bridge = None if shared else Bridge.between(base, expert)
        self._covers = None if self.bridge is None else Covers(self.bridge)
        self._reader = Reader(expert)
        self._lead = [] if expert.encode([""])[0] else expert.begun([])  # as `bits_per_byte` does

    def __call__(self, input_ids: Int[Tensor, "n t"], scores: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
        """Log-probabilities of the mix, in the dtype of the base's scores; what those exclude stays excluded."""
        own = scores.double().log_softmax(-1)
        q, _ = self.beside(input_ids.tolist())
        mixed = mix(own, q.to(own.device), self.weight)
        return mixed.masked_fill(own.isneginf(), -torch.inf).to(scores.dtype)

    def beside(self, rows: Sequence[list[int]]) -> tuple[Float64[Tensor, "n vocab"], Float64[Tensor, "n"]]:
        """The expert's distributions behind rows of base tokens, over these, and its text that the base cannot write.

        That text is dropped, and its probability returned. A row without text, where the expert is silent, is 0.
        """
        if self._covers is None or self.bridge is None:
            logits = self._reader([self._shared_tokens(row) for row in rows])
            return torch.cat(logits).double().softmax(-1), torch.zeros(len(rows), dtype=torch.float64)
        data = [self.bridge.base.table.join(row) for row in rows]
        q, lost = self._covers.next_token(self._expert_tokens(data), self._ends, self.calls)
        return q.masked_fill(torch.tensor([not text for text in data])[:, None], 0.0), lost

    def _ends(self, rows: list[list[int]], last: int) -> list[Shaped[Tensor, "k v_e"]]:
        return [logits.double().softmax(-1) for logits in self._reader(rows, last)]

    def _shared_tokens(self, row: list[int]) -> list[int]:
        """The base's tokens for an expert that shares them, without padding on the left."""
        padding = {0, self.base.network.generation_config.pad_token_id} - {self.base.start_token}
        return list(dropwhile(lambda token: token in padding, row))

    def _expert_tokens(self, data: Sequence[bytes]) -> list[list[int]]:
        """The expert's tokens of each text, white space at its end cut as before a word, half a character byte by byte.

        Many tokenizers cut white space otherwise at an end than before a word, and a model has hardly read the former.
        """
        decoded = [codecs.utf_8_decode(text, "replace", False) for text in data]
        texts = [text + WORD * text[-1:].isspace() for text, _ in decoded]
        rows = []
        for encoding, (text, used), whole in zip(self.expert.tokenizer.encode_batch(texts), decoded, data, strict=True):
            ends = [end for _, end in encoding.offsets if end <= len(text)]
            rest = text[max(ends, default=0) :].encode() + whole[used:]
            rows.append([*self._lead, *encoding.ids[: len(ends)], *self._single_bytes(rest)])
        return rows

    def _single_bytes(self, data: bytes) -> list[int]:
        ids = {} if self.bridge is None else self.bridge.expert.ids_of
        return [ids[byte] for k in range(len(data)) if (byte := data[k : k + 1]) in ids]


def mix(own: Float64[Tensor, "n vocab"], q: Float64[Tensor, "n vocab"], weight: float) -> Float64[Tensor, "n vocab"]:
    """Log-probabilities of the mix of the base's log-probabilities and the expert's q; the base's where q is 0."""
    expert = ((1 - FLOOR) * q + FLOOR * own.exp()).clamp_min(torch.finfo(torch.float64).tiny).log()
    return ((1 - weight) * own.clamp_min(LEAST) + weight * expert).log_softmax(-1)
