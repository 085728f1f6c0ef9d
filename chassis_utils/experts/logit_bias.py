"""The base with a constant added to some logits: the CHASSIS study's logit-bias expert. Cost: that of the base."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from chassis_utils.lm.model import LanguageModel
from chassis_utils.lm.states import Positions, last_states

BOOST = 4.0  # added by the study's logit-bias expert, for each of these strings
BOOSTED = (
    *"0123456789+-*/=^",
    *("Therefore", "Thus", "Hence", "QED", "The answer is", "Result:", "Proof", "Let", "Assume", "implies"),
)


@dataclass(frozen=True)
class LogitBias:
    """The base's logits and a constant."""

    base: LanguageModel
    bias: Float64[Tensor, "vocab"]

    @classmethod
    def of_strings(cls, base: LanguageModel, strings: Sequence[str] = BOOSTED, boost: float = BOOST) -> "LogitBias":
        """`boost` on every token of each string as it is tokenised alone, once for each time that it occurs.

        As in the study, flaw included: SentencePiece puts the mark of a space before a string,
        and where that is a token of its own it collects the boost of every such string.
        """
        encodings = base.tokenizer.encode_batch_fast(list(strings), add_special_tokens=False)
        bias = torch.zeros(len(base.head.weight), dtype=torch.float64)
        for token in (token for encoding in encodings for token in encoding.ids):
            bias[token] += boost
        return cls(base, bias)

    def logits(self, texts: Sequence[str], positions: Positions = None) -> Float[Tensor, "n vocab"]:
        """In the dtype of the base's logits; `ValueError` as of `states.collect`."""
        logits = self.base.head(last_states(self.base, texts, positions))
        return logits + self.bias.to(logits.dtype)
