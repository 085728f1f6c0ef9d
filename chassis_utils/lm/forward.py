"""Running a language model on texts: encode, batch and pad, read logits, write on.

Prompts of similar length share a batch within `BATCH_TOKENS` tokens. They are padded on the right where logits or
states are read (a causal model gives each row what it gives alone) and on the left where the model writes on, so that
every row continues at its own end. Cost: one forward pass over the padded tokens.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby, takewhile
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from chassis_utils.lm.model import LanguageModel
from chassis_utils.text.prompts import require_texts

BATCH_TOKENS = 4096  # tokens of one forward pass, padding included
ENOUGH_TOKENS = 128  # of one forward pass: more are hardly faster by the token, and padding is work for nothing


def encode(model: LanguageModel, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text; `ValueError` for no text, one without tokens or longer than the model reads."""
    ids = model.encode(texts)
    if not ids:
        raise ValueError("there are no prompts for the model to read: give at least one")
    limit = reading_limit(model)
    for text, row in zip(texts, ids, strict=True):
        if not row:
            raise ValueError(f"prompt {text!r} has no tokens: remove it")
        if len(row) > limit:
            raise ValueError(f"prompt {text[:40]!r}... has {len(row)} tokens, {model.name} reads {limit}: shorten it")
    return ids


def reading_limit(model: LanguageModel) -> int | float:
    """The most tokens that the model reads; infinite where its configuration names none."""
    return getattr(model.network.config.get_text_config(), "max_position_embeddings", None) or float("inf")


def batches(ids: Sequence[list[int]], equal: bool = False, stretch: float = 1.25) -> Iterator[list[int]]:
    """Numbers of the prompts of each batch: similar or `equal` lengths together, within `BATCH_TOKENS` tokens.

    Beyond `ENOUGH_TOKENS` a batch takes in no prompt of more than `stretch` times the length of its shortest. Where
    the pass reads but one token of each prompt, padding costs next to nothing: give infinity.
    """
    if equal:
        for similar in batches(ids):
            yield from (list(group) for _, group in groupby(similar, key=lambda k: len(ids[k])))
        return
    batch: list[int] = []
    for k in sorted(range(len(ids)), key=lambda k: len(ids[k])):
        tokens = len(ids[k]) * (len(batch) + 1)
        most = ENOUGH_TOKENS if batch and len(ids[k]) > stretch * len(ids[batch[0]]) else BATCH_TOKENS
        if batch and tokens > most:
            yield batch
            batch = []
        batch.append(k)
    yield batch


def pad(
    rows: Sequence[list[int]], device: torch.device, left: bool = False
) -> tuple[Int[Tensor, "n t"], Int[Tensor, "n t"]]:
    """Token ids padded on the right (or the left), and the mask that is 1 where they are real."""
    longest = max(map(len, rows))

    def filled(row: list[int]) -> list[int]:
        padding = [0] * (longest - len(row))
        return padding + row if left else row + padding

    ids, mask = [filled(row) for row in rows], [filled([1] * len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def at_ends(states: Shaped[Tensor, "n t d"], mask: Int[Tensor, "n t"]) -> Shaped[Tensor, "n d"]:
    """The states at the last token of each row, padded on the right."""
    return states[torch.arange(len(mask)), mask.sum(1).to(states.device) - 1]


def every_position(model: LanguageModel, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text behind which it may be continued: all but special ones and parts of a character."""
    chosen: list[list[int]] = []
    for encoding in model.tokenizer.encode_batch(require_texts(texts)):
        ends = [end for _, end in encoding.offsets]
        later = [*ends[1:], len(texts[len(chosen)]) + 1]
        chosen.append([k for k, (end, following) in enumerate(zip(ends, later, strict=True)) if 0 < end < following])
    return chosen


def prefixes(model: LanguageModel, texts: Sequence[str], positions: Sequence[Sequence[int]]) -> list[str]:
    """Each text up to the end of each of its tokens `positions[k]`, text after text."""
    encodings = model.tokenizer.encode_batch(list(texts))
    return [
        text[: encoding.offsets[place][1]]
        for text, encoding, places in zip(texts, encodings, positions, strict=True)
        for place in places
    ]


def layer_states(model: LanguageModel, ids: Int[Tensor, "n t"], **inputs: Any) -> list[Shaped[Tensor, "n t d"]]:
    """What each block reads, before any hook that edits it, and the state after the final norm: depth + 1 states.

    What transformers lists as hidden states begins one block later in some architectures (Mamba, RWKV).
    """
    states: list[Tensor] = []

    def record(block: torch.nn.Module, positional: tuple[Any, ...]) -> None:
        states.append(positional[0])

    with ExitStack() as hooks:
        for block in model.blocks:
            hooks.enter_context(block.register_forward_pre_hook(record, prepend=True))
        last = model.body(ids, **inputs).last_hidden_state
    return [*states, last]


def token_logits(
    model: LanguageModel, rows: Sequence[list[int]], every_token: bool
) -> Float[Tensor, "positions vocab"]:
    """Next-token logits of each prompt at its last token, or at all its real ones, prompt after prompt.

    Of last tokens the head reads the states alone, each still a row of its batch, as hooks on it expect.
    """
    ids, mask = pad(rows, model.device)
    states = model.body(ids, attention_mask=mask, use_cache=False).last_hidden_state
    if not every_token:
        states = at_ends(states, mask)[:, None]
    logits = model.head.finish(model.network.get_output_embeddings()(states))
    return logits[mask.bool()] if every_token else logits[:, 0]


@torch.no_grad()
def read_logits(model: LanguageModel, ids: Sequence[list[int]], every_token: bool) -> list[Float[Tensor, "t vocab"]]:
    """The same for any number of prompts, batch by batch, on the CPU: one tensor for each prompt."""
    read: dict[int, Tensor] = {}
    for batch in batches(ids):
        logits = token_logits(model, [ids[k] for k in batch], every_token).cpu()
        read |= zip(batch, logits.split([len(ids[k]) if every_token else 1 for k in batch]), strict=True)
    return [read[k] for k in range(len(read))]


def continuations(model: LanguageModel, prompts: Sequence[str], tokens: int) -> list[str]:
    """Greedy continuation of each prompt, without it and without what follows an end-of-text token.

    Raises `ValueError` as of `written`, and for a prompt without tokens.
    """
    return [model.tokenizer.decode(row) for row in written(model, encode(model, prompts), tokens)]


@torch.inference_mode()
def written(model: LanguageModel, rows: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """The same for rows of token ids.

    They are padded on the left, so that every row continues at its own end, and not at all for a model that keeps
    more of them than keys and values (RWKV reads padding as it reads any token).
    Raises `ValueError` for no tokens to write, and a row that with `tokens` more exceeds what the model reads.
    """
    if not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"{tokens!r} tokens are no continuation: ask for one or more")
    _check_room(model, rows, tokens)
    ends, answers = set(model.end_tokens), {}
    for batch in batches(rows, equal=not model.keeps_keys, stretch=math.inf):
        padded, mask = pad([rows[k] for k in batch], model.device, left=True)
        grown = model.network.generate(
            padded, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=min(ends, default=0)
        )
        for k, row in zip(batch, grown[:, padded.shape[1] :].tolist(), strict=True):
            answers[k] = list(takewhile(lambda token: token not in ends, row))
    return [answers[k] for k in range(len(rows))]


def _check_room(model: LanguageModel, rows: Sequence[list[int]], tokens: int) -> None:
    limit = reading_limit(model)
    for row in rows:
        if len(row) + tokens > limit:
            raise ValueError(
                f"prompt {model.tokenizer.decode(row)[:40]!r} has {len(row)} tokens, with {tokens} more they exceed "
                f"the {limit} that {model.name} reads: shorten it, or continue it by less"
            )
