"""Questions as a model reads them: through the chat template that a checkpoint brings, if it does."""

from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerFast

from chassis_utils.lm.checkpoint import find_folder
from chassis_utils.lm.model import LanguageModel
from chassis_utils.text.prompts import require_texts


def as_chat(model: LanguageModel, questions: Sequence[str], system: str | None = None) -> list[list[int]]:
    """Token ids of each question, up to where the answer begins; behind a system prompt where one is given.

    Without a chat template the system prompt stands before the question as a paragraph of text.
    Raises `TypeError` and `ValueError` for what `require_texts` refuses.
    """
    questions, chat = require_texts(questions), _template(model.name)
    if chat is None:
        return model.encode([f"{system}\n\n{question}" if system else question for question in questions])
    before = [{"role": "system", "content": system}] if system else []
    asked = [[*before, {"role": "user", "content": question}] for question in questions]
    texts = [chat.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in asked]
    return [encoding.ids for encoding in model.tokenizer.encode_batch(texts, add_special_tokens=False)]


@lru_cache(maxsize=4)
def _template(name: str) -> PreTrainedTokenizerFast | None:
    """What fills in a checkpoint's chat template; its tokenizer is not used (see `lm.model`)."""
    chat = PreTrainedTokenizerFast.from_pretrained(find_folder(name))
    return chat if chat.chat_template else None
