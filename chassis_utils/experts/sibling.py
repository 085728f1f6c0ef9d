"""A checkpoint that shares the base's tokenizer as the expert. Cost: one pass of it over the texts, kept."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from chassis_utils.experts.prompted import Answered
from chassis_utils.lm.chat import as_chat
from chassis_utils.lm.forward import encode, written
from chassis_utils.lm.model import LanguageModel, require_model
from chassis_utils.lm.states import Positions, last_states


@dataclass(frozen=True)
class Sibling:
    """Another checkpoint with the base's tokenizer; `TypeError` for what is no model, `ValueError` where tokens differ.

    >>> from chassis_utils import Sibling, load
    >>> expert = Sibling(load("models/port-llama"), load("models/sibling-math"))
    >>> expert.logits(["What is 2 + 3?"]).shape
    torch.Size([1, 4096])
    """

    base: LanguageModel
    model: LanguageModel

    def __post_init__(self) -> None:
        require_model(self.base)
        require_model(self.model)
        first, second = (model.tokenizer.get_vocab() for model in (self.base, self.model))
        sizes = [len(model.head.weight) for model in (self.base, self.model)]
        if first != second or sizes[0] != sizes[1]:
            differing = len(first.items() ^ second.items())
            raise ValueError(
                f"{self.model.name!r} is no sibling of {self.base.name!r}: {differing} entries of their vocabularies "
                f"differ and they give {sizes[1]} and {sizes[0]} logits; take a checkpoint of the same tokenizer"
            )

    def logits(self, texts: Sequence[str], positions: Positions = None) -> Float[Tensor, "n vocab"]:
        """The sibling's own logits; `ValueError` as of `states.collect`."""
        return self.model.head(last_states(self.model, texts, positions))

    def read(self, texts: Sequence[str], tokens: int = 0, chat: bool = False) -> Answered:
        """The texts as both read them, with the sibling's own greedy answers of at most so many tokens, if any.

        Without answers every token counts but the first of each row, where attention sinks; with them the answer's.
        `chat` asks the texts as questions, through the base's chat template where it has one.
        Raises `ValueError` for texts that cannot be read, and those of a single token.
        """
        rows = as_chat(self.base, texts) if chat else encode(self.base, texts)
        answers = written(self.model, rows, tokens) if tokens else [row[2:] for row in rows]
        rows = [row + answer for row, answer in zip(rows, answers, strict=True)] if tokens else rows
        if min(map(len, rows)) < 2:
            raise ValueError("a text of a single token leaves nothing to fit at: give longer ones")
        return Answered(rows, rows, answers, skip=1)
