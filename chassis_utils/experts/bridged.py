"""An expert with another tokenizer, its next-token distribution carried over by the byte-exact bridge.

Cost: one pass of the expert over each text, or over the text up to each position; with look-ahead, which is not
kept, `calls` short continuations for each of them besides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from chassis_utils.bridge.bridge import Bridge
from chassis_utils.bridge.look_ahead import Continuations, look_ahead
from chassis_utils.lm.forward import prefixes
from chassis_utils.lm.model import LanguageModel
from chassis_utils.lm.states import Positions, last_states

FLOOR = 1e-3  # the base's share of a bridged distribution, so that no token is impossible


@dataclass(frozen=True)
class BridgedExpert:
    """A model with another tokenizer.

    `calls` texts are looked ahead at each position; none is one step. What the bridge gives no mass keeps
    the base's own order: the logits are those of (1 - `FLOOR`) q + `FLOOR` p_base.

    >>> from chassis_utils import Bridge, BridgedExpert, load
    >>> base, phi = load("models/port-llama"), load("models/expert-phi")
    >>> expert = BridgedExpert(base, phi, Bridge.between(base, phi))
    >>> expert.logits(["Return the"]).shape  # over the vocabulary of the base
    torch.Size([1, 4096])
    """

    base: LanguageModel
    model: LanguageModel
    bridge: Bridge
    calls: int = 0

    def logits(self, texts: Sequence[str], positions: Positions = None) -> Float[Tensor, "n vocab"]:
        """Logarithms of the bridged probabilities above the floor; `ValueError` as of `states.collect`."""
        prompts = texts if positions is None else prefixes(self.base, texts, positions)
        if self.calls:
            bar = tqdm(prompts, desc=f"bridge from {self.model.name}", disable=None, leave=False)
            q = torch.stack([look_ahead(self.bridge, Continuations(self.model, x), x, self.calls).q for x in bar])
        else:
            p = self.model.head(last_states(self.model, prompts)).softmax(-1)
            q = self.bridge.one_step(p)[0].double()
        own = self.base.head(last_states(self.base, texts, positions)).softmax(-1, dtype=torch.float64)
        return ((1 - FLOOR) * q + FLOOR * own).log().float()
