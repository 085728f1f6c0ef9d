"""The base behind a system prompt as an expert: the same weights, told what to do.

The expert reads the system prompt before every question, the base the question alone, and both read the expert's own
greedy answer behind it. From the last token of the prompt on, the two read the same tokens, so each of those positions
is a sample: what the base computes there, and what it would compute had it been told. Cost: writing the answers.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

import torch
from transformers import PreTrainedTokenizerFast

from chassis_utils.lm.checkpoint import find_folder
from chassis_utils.lm.forward import batches, pad, reading_limit
from chassis_utils.lm.model import LanguageModel, require_model
from chassis_utils.text.prompts import require_texts

Around = Callable[[int], AbstractContextManager]  # the last column of the prompts -> what is in place while writing


@dataclass(frozen=True)
class Answered:
    """Questions with their answers, as the base and as the expert read them.

    The last `lengths[k]` tokens of both rows k are the same: the last of the prompt, and the answer.
    """

    base_rows: list[list[int]]
    expert_rows: list[list[int]]
    lengths: list[int]

    def part(self, numbers: Sequence[int]) -> "Answered":
        """Some of the questions."""
        base_rows, expert_rows = ([side[k] for k in numbers] for side in (self.base_rows, self.expert_rows))
        return Answered(base_rows, expert_rows, [self.lengths[k] for k in numbers])

    def owners(self) -> list[int]:
        """The question that each sample belongs to."""
        return [k for k, length in enumerate(self.lengths) for _ in range(length)]


@dataclass(frozen=True)
class PromptedExpert:
    """A base behind a system prompt, through its chat template where the checkpoint has one.

    Without a template the system prompt stands before the question as a paragraph of text.

    >>> from chassis_utils import load
    >>> from chassis_utils.experts.prompted import PromptedExpert
    >>> expert = PromptedExpert(load("models/port-llama"), "Some sums.")
    >>> answered = expert.answered(["What is 2 + 3?", "What is 4 + 4?"], tokens=4)
    >>> [row[-length:] == other[-length:] for row, other, length in
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

    @cached_property
    def _chat(self) -> PreTrainedTokenizerFast | None:
        """What fills in the checkpoint's chat template; its tokenizer is not used (see `lm.model`)."""
        chat = PreTrainedTokenizerFast.from_pretrained(find_folder(self.base.name))
        return chat if chat.chat_template else None

    def prompts(self, questions: Sequence[str], system: bool = True) -> list[list[int]]:
        """Token ids of each question as the expert reads it, or, without `system`, as the base does."""
        questions = require_texts(questions)
        if self._chat is None:
            before = f"{self.prompt}\n\n" if system else ""
            return self.base.encode([before + question for question in questions])
        said = [{"role": "system", "content": self.prompt}] if system else []
        texts = [
            self._chat.apply_chat_template(
                [*said, {"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            for question in questions
        ]
        return [encoding.ids for encoding in self.base.tokenizer.encode_batch(texts, add_special_tokens=False)]

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
        return Answered(base_rows, expert_rows, [1 + len(answer) for answer in answers])


@torch.inference_mode()
def written(
    model: LanguageModel, rows: Sequence[list[int]], tokens: int, around: Around = lambda _: nullcontext()
) -> list[list[int]]:
    """The greedy continuation of each row of token ids, up to an end-of-text token, within what `around` puts in place.

    Raises `ValueError` for no tokens to write, and rows that with them exceed what the model reads.
    """
    longest = max(map(len, rows)) + tokens
    if tokens < 1 or longest > reading_limit(model):
        raise ValueError(f"{longest} tokens with the {tokens} to write: {model.name} reads {reading_limit(model)}")
    ends, answers = set(model.end_tokens), {}
    for batch in batches(rows, equal=not model.keeps_keys, stretch=math.inf):
        padded, mask = pad([rows[k] for k in batch], model.device, left=True)
        with around(padded.shape[1] - 1):
            grown = model.network.generate(
                padded, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=min(ends, default=0)
            )
        for k, row in zip(batch, grown[:, padded.shape[1] :].tolist(), strict=True):
            answers[k] = list(takewhile(lambda token: token not in ends, row))
    return [answers[k] for k in range(len(rows))]
