"""Reading a `tokenizer.json`, and saying what is wrong with one that is damaged.

The tokenizers library checks the fields. What it lets through though no model can mean it is refused here: two pieces
under one id, an added token that gets another id than its own, ids far beyond any vocabulary. Cost: a fraction of a
second.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

MOST_IDS = 2**22  # the largest vocabularies have a quarter of a million


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file, neither padding nor cutting; `ValueError` where the file is damaged."""
    tokenizer = build(read_json(path), str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; `ValueError` where it holds none."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # no Unicode, no JSON, or nested without end
        raise _damaged(str(path), error) from None
    if not isinstance(content, dict):
        raise _damaged(str(path), f"a {type(content).__name__} in the place of an object")
    return content


def build(layout: dict[str, Any], name: str) -> Tokenizer:
    """The tokenizer of a layout that was read from the file `name`; `ValueError` where it is damaged."""
    _check_prefix(name, layout.get("model"))
    try:
        tokenizer = Tokenizer.from_str(json.dumps(layout))
    except Exception as error:  # the library has no class of its own for what it refuses
        raise _damaged(name, error) from None
    pieces: dict[int, str] = {}
    vocabulary = layout["model"]["vocab"]
    for piece, token in vocabulary.items() if isinstance(vocabulary, dict) else ():
        if token in pieces:
            raise _damaged(name, f"{piece!r} and {pieces[token]!r} share id {token}")
        pieces[token] = piece
    highest = max(pieces, default=0)
    if highest > MOST_IDS:
        raise _damaged(name, f"{pieces[highest]!r} has id {highest}, beyond any vocabulary")
    for entry in layout.get("added_tokens") or ():
        if not isinstance(entry, dict) or tokenizer.token_to_id(entry["content"]) != entry["id"]:
            raise _damaged(name, f"the added token {entry} gets another id")
    _check_template(name, json.loads(tokenizer.to_str())["post_processor"])
    return tokenizer


def _check_prefix(name: str, model: Any) -> None:
    """Refuse merges that lack the prefix which the library cuts off them: inside a character, that ends the process."""
    prefix, merges = (
        model.get(key) if isinstance(model, dict) else None for key in ("continuing_subword_prefix", "merges")
    )
    if not isinstance(prefix, str) or not isinstance(merges, list):
        return
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if isinstance(pair, list) and not all(str(second).startswith(prefix) for second in pair[1:]):
            raise _damaged(name, f"the merge {merge!r} lacks the prefix {prefix!r}")


def _check_template(name: str, processor: dict[str, Any] | None) -> None:
    """Refuse templates for a text that name what is not there: the library would panic when it fills them in."""
    for part in (processor or {}).get("processors", [processor]):
        for piece in (part or {}).get("single", ()):  # of templates alone
            ((kind, wanted),) = piece.items()
            if wanted["id"] not in (part["special_tokens"] if kind == "SpecialToken" else ["A"]):
                raise _damaged(name, f"its template asks for {wanted['id']!r}, which is not there")


def _damaged(name: str, reason: object) -> ValueError:
    return ValueError(f"{name!r} is damaged ({str(reason).partition(chr(10))[0]}): save or download it anew")
