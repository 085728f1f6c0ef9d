"""The text bridge of the CHASSIS study: generate, then rescore. Cost: a generation and a pass for each prompt.

Use `experts.bridged.BridgedExpert`, which gives the expert's own next-token distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from chassis_utils.lm.forward import continuations
from chassis_utils.lm.model import LanguageModel
from chassis_utils.lm.states import last_states


@dataclass(frozen=True)
class Rescored:
    """The expert writes on, the base reads prompt, space and continuation.

    Flaw: its logits are those of the base after that text, so they belong to a later position than
    the prompt's last token. The expert's tokenizer may be any.
    """

    base: LanguageModel
    expert: LanguageModel
    tokens: int = 32  # of the continuation, the expert's own

    def logits(self, prompts: Sequence[str]) -> Float[Tensor, "n vocab"]:
        """The base's logits after prompt and continuation; `ValueError` as of `states.collect`."""
        written = continuations(self.expert, prompts, self.tokens)
        texts = [f"{prompt} {continuation}" for prompt, continuation in zip(prompts, written, strict=True)]
        return self.base.head(last_states(self.base, texts))
