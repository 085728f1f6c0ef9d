"""What every expert can be asked.

An expert reads the base's texts. By default it answers after the last token of each; with `positions`, after those
tokens of the base's own reading of each text (`lm.forward.every_position` gives all of them), text after text.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from chassis_utils.lm.states import Positions


@runtime_checkable
class Expert(Protocol):
    """Any source of next-token logits over the base's vocabulary."""

    def logits(self, texts: Sequence[str], positions: Positions = None) -> Float[Tensor, "n vocab"]:
        """Of the next token after each text, or after each of the named tokens of each text."""
