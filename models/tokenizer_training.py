"""The two tokenizers of the micro checkpoints: one of each great family.

`sentencepiece_bpe` follows Llama: spaces become U+2581, no pre-tokenizer when encoding,
unknown characters fall back to bytes. `byte_level_bpe` follows GPT-2 and Phi.
"""

import json

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
# What may become one piece: a run of spaces (but for the one that starts a word), a word
# with its space, one digit, a run of newlines, a run of punctuation.
PIECE = Regex(r"▁+(?=▁)|▁?\p{L}+|\p{N}|\n+|▁?[^▁\p{L}\p{N}\n]+|▁")


def sentencepiece_bpe(texts: list[str], size: int) -> Tokenizer:
    """A BPE tokenizer in the manner of Llama's, with `<unk>`, `<s>`, `</s>` and byte fallback."""
    specials = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(PIECE, "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials + BYTE_PIECES, limit_alphabet=160, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    layout = json.loads(tokenizer.to_str())
    layout["pre_tokenizer"] = None  # as Llama's: merges alone decide when encoding
    layout["added_tokens"] = [token for token in layout["added_tokens"] if token["content"] in specials]
    tokenizer = Tokenizer.from_str(json.dumps(layout))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def byte_level_bpe(texts: list[str], size: int) -> Tokenizer:
    """A byte-level BPE tokenizer in the manner of GPT-2's, with `<|endoftext|>` as its only special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
