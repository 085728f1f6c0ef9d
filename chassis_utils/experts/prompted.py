"""The base behind a system prompt as an expert: the same weights, told what to do.

The expert reads the system prompt before every question, the base the question alone, and both read the expert's own
greedy answer behind it. From the question on the two read the same tokens, so each of those positions is a sample: what
the base computes there, and what it would compute had it been told. Cost: writing the answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from chassis_utils.lm.chat import as_chat
from chassis_utils.lm.forward import written
from chassis_utils.lm.model import LanguageModel, require_model
from chassis_utils.text.prompts import require_texts


@dataclass(frozen=True)
class Answered:
    """Questions with their answers, as the base and as the expert read them.

    Behind its first `skip` tokens a row of the base is the end of the expert's: the question and the answer.
    """

    base_rows: list[list[int]]
    expert_rows: list[list[int]]
    answers: list[list[int]]
    skip: int

    @property
    def lengths(self) -> list[int]:
        """How many tokens, the last ones, both rows of each question have in common."""
        return [len(row) - self.skip for row in self.base_rows]

    def part(self, numbers: Sequence[int]) -> "Answered":
        """Some of the questions."""
        base_rows, expert_rows, answers = (
            [side[k] for k in numbers] for side in (self.base_rows, self.expert_rows, self.answers)
        )
        return Answered(base_rows, expert_rows, answers, self.skip)

    def __add__(self, other: "Answered") -> "Answered":
        """Both, one after the other."""
        ours, theirs = ((side.base_rows, side.expert_rows, side.answers) for side in (self, other))
        base_rows, expert_rows, answers = (first + second for first, second in zip(ours, theirs, strict=True))
        return Answered(base_rows, expert_rows, answers, max(self.skip, other.skip))

    def samples(self) -> tuple[Int[Tensor, "n"], Bool[Tensor, "n"]]:
        """The question of each of these tokens, row after row, and whether what follows it is the answer."""
        lengths, written = torch.tensor(self.lengths), torch.tensor([len(answer) + 1 for answer in self.answers])
        left = torch.cat([torch.arange(length, 0, -1) for length in lengths.tolist()])
        owners = torch.arange(len(lengths)).repeat_interleave(lengths)
        return owners, left <= written[owners]


@dataclass(frozen=True)
class PromptedExpert:
    """A base behind a system prompt, through its chat template where the checkpoint has one.

    Without a template the system prompt stands before the question as a paragraph of text.

    >>> from chassis_utils import load
    >>> from chassis_utils.experts.prompted import PromptedExpert
    >>> expert = PromptedExpert(load("models/port-llama"), "Some sums.")
    >>> answered = expert.answered(["What is 2 + 3?", "What is 4 + 4?"], tokens=4)
    >>> [row[answered.skip:] == other[-length:] for row, other, length in
    ...  zip(answered.base_rows, answered.expert_rows, answered.lengths)]
    [True, True]
    """

    base: LanguageModel
    prompt: str

    def __post_init__(self) -> None:
        require_model(self.base)
        require_texts([self.prompt])
        if not self.prompt.strip():
            raise ValueError("the system prompt is empty, so the expert is the base: say what it shall do")

    def prompts(self, questions: Sequence[str], system: bool = True) -> list[list[int]]:
        """Token ids of each question as the expert reads it, or, without `system`, as the base does."""
        return as_chat(self.base, questions, self.prompt if system else None)

    def answered(self, questions: Sequence[str], tokens: int) -> Answered:
        """The questions with the expert's own greedy answers of at most so many tokens.

        Raises `ValueError` for no questions, and those that with their answers exceed what the model reads.
        """
        told, bare = self.prompts(questions), self.prompts(questions, system=False)
        if not all([*bare, bare]):
            raise ValueError("a question without tokens, or none at all: give some to answer")
        answers = written(self.base, told, tokens)
        base_rows, expert_rows = (
            [row + answer for row, answer in zip(side, answers, strict=True)] for side in (bare, told)
        )
        skip = max(len(row) - _common_end(row, other) for row, other in zip(bare, told, strict=True))
        return Answered(base_rows, expert_rows, answers, skip)


def _common_end(row: list[int], other: list[int]) -> int:
    """How many last tokens two rows have in common."""
    pairs = zip(reversed(row), reversed(other), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
