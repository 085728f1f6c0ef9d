"""Prompt families and the splits on which every result is reported.

A family is a set of templates over a running index `i`; `natural` is real text cut at
random places; `read_prompts` reads any text file with one prompt a line. A split names what
is held out, and a prompt's `group` is the unit that the split (and K-fold validation,
see `fold_numbers`) keeps together. A prompt knows its part of the split: what is fitted refuses
test prompts (`fold_numbers`), what is measured refuses training prompts (`groups`).

    index      same templates, other i           group: a block of consecutive i
    prefix     val and test repeat train: training error, kept because it was reported
    template   whole templates held out          group: the template
    document   `natural`, whole documents        group: the document
"""

import os
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from chassis_utils.files import locate
from chassis_utils.text.corpus import PARTS, Document, content_key, read_documents, read_texts, read_unseen

OUTSIDE = "Explain entropy in simple words."  # the one prompt outside the templates of the CHASSIS study
SPLITS = ("index", "prefix", "template", "document")
STANDARD = {"index": "mixed", "template": "templates", "document": "natural"}  # split -> family
FIRST_INDEX = {"train": 0, "val": 5000, "test": 8000}
LAST_INDEX = {"train": 5000, "val": 8000, "test": 1_000_000}
BLOCK = 64  # consecutive indices of one group
CONTEXT = (32, 160)  # characters of a natural prompt

Template = Callable[[int], str]

# Two families may share a template under slightly different numbers or words ("sum" and
# "derive"): one name, so that near copies never sit on both sides of a split.
FAMILIES: dict[str, dict[str, Template]] = {
    "mixed": {
        "sum": lambda i: f"What is {i} + {i + 1}?",
        "entropy": lambda i: f"Explain entropy in one sentence. #{i}",
        "force": lambda i: f"In physics, force equals mass times acceleration. Comment #{i}.",
    },
    "math": {"sum": lambda i: f"What is {i} + {i + 3}?"},
    "physics": {"newton": lambda i: f"In physics, explain Newton's {1 + i % 3}rd law of motion. #{i}"},
    "math_steps": {"product": lambda i: f"What is {i} * {i + 2}? Show the steps."},
    "physics_derive": {"derive": lambda i: f"In physics, derive F = m a for a simple system. #{i}"},
    "reasoning": {
        "steps": lambda i: f"Explain step by step how to solve {i} + {i + 7}.",
        "sky": lambda i: f"Why is the sky blue? Give a detailed reasoning. #{i}",
        "derive": lambda i: f"In physics, derive F = m a with a simple example. #{i}",
    },
    "tools": {
        "tools": lambda i: (
            f"You have access to a calculator and a web browser. Plan how to find the answer to {i} * {i + 3}."
        )
    },
    "engineering": {
        "debug": lambda i: f"Explain how you would debug a segmentation fault in C. #{i}",
        "integral": lambda i: f"Explain the steps to evaluate an integral of x^{i % 4 + 1}.",
    },
}
# `templates` is every template of every family, the first of equal names standing for both.
FAMILIES["templates"] = {
    name: make for family in reversed(list(FAMILIES.values())) for name, make in reversed(family.items())
}
HELD_OUT_TEMPLATES = ("force", "steps", "sky", "tools", "debug", "integral")


@dataclass(frozen=True)
class Prompt:
    """A prompt, the group that splits and folds keep together, and the part of the split that it was taken from."""

    text: str
    group: str
    cluster: str | None = None  # the template or document that it shares with others, where it is no sample of its own
    part: str = field(default="", compare=False)  # train, val or test; none for a list of the user's


def take(family: str, split: str, part: str, n: int, seed: int = 0) -> list[Prompt]:
    """The first `n` prompts of one part of a split; `seed` moves the cuts of `natural`.

    `family` is a name in `FAMILIES` or `natural`. Raises `ValueError` for an unknown name, a
    combination that holds nothing out, and more prompts than keep the parts apart.
    """
    if not isinstance(n, int):
        raise TypeError(f"{n!r} is no number of prompts: give a whole number")
    if n < 1:
        raise ValueError(f"{n} prompts of part {part!r} are none: ask for at least one")
    _check(split, SPLITS, "split")
    _check(part, PARTS, "part")
    if family == "natural":
        if split != "document":
            raise ValueError(f"split {split!r} does not apply to natural text: use 'document'")
        return _passages(read_documents(part) if part == "train" else read_unseen(part), part, n, seed)
    _check(family, (*FAMILIES, "natural"), "family")
    if split == "document":
        raise ValueError(f"split 'document' needs natural text, not the templates of {family!r}: use 'index'")
    templates = _templates(family, split, part)
    start = 0 if split == "prefix" else FIRST_INDEX[part]
    room = LAST_INDEX[part] - FIRST_INDEX[part]
    if n > room:
        raise ValueError(f"{n} prompts of part {part!r} would run into the next part: ask for at most {room}")
    return [_render(templates, i, split, part) for i in range(start, start + n)]


def standard_sets(n_train: int, n_test: int, prompts_file: str = "") -> dict[tuple[str, str], list[Prompt]]:
    """Train and test prompts of the splits that each result is shown on, by (split, part).

    The lines of `prompts_file`, or passages of the documents in a folder of that name, stand in the place of natural
    text; one line or document in ten is held out.
    """
    sizes = {"train": n_train, "test": n_test}
    sets = {}
    for (split, family), (part, n) in product(STANDARD.items(), sizes.items()):
        own = split == "document" and prompts_file
        sets[split, part] = _own(prompts_file, part, n) if own else take(family, split, part, n)
    return sets


def read_prompts(path: str | Path) -> list[Prompt]:
    """One prompt a line, blank lines skipped, each its own group; `ValueError` if missing, empty or no UTF-8 text."""
    name, path = str(path), locate(path)
    if not os.path.isfile(path):
        reason = "is a folder" if os.path.isdir(path) else "does not exist"
        raise ValueError(f"prompt file {name[:200]!r} {reason}: name a text file with one prompt a line")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")  # with or without a byte-order mark
    except UnicodeDecodeError as error:
        raise ValueError(
            f"prompt file {name!r} is no UTF-8 text, its byte {error.start} is 0x{content[error.start]:02x}: "
            "save it as UTF-8, one prompt a line"
        ) from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"prompt file {name!r} is empty: write one prompt a line")
    if "\0" in text:
        number = next(k for k, line in enumerate(text.splitlines(), 1) if "\0" in line)
        raise ValueError(
            f"prompt file {name!r} has a NUL character in line {number}, so it is UTF-16 or no text: save it as UTF-8"
        )
    return [Prompt(line, content_key(line)) for line in lines]


def require_texts(texts: Sequence[str]) -> list[str]:
    """The texts as a list; `TypeError` for anything but several strings, `ValueError` for one that is no Unicode."""
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise TypeError(f"{texts!r:.60} is no list of texts: put it into a list")
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{text!r:.60} among the texts is of type {type(text).__name__}: give strings alone")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"text {text[:60]!r} holds half a surrogate pair: read it with its encoding") from None
    return texts


def deal(texts: Sequence[str], folds: int = 5) -> list[int]:
    """A fold for each text, from its content alone: equal texts share one, and every fold gets as many as the next."""
    order = sorted(set(texts), key=content_key)
    number = {text: k % folds for k, text in enumerate(order)}
    return [number[text] for text in texts]


def fold_numbers(prompts: list[Prompt], folds: int = 5) -> list[int]:
    """A fold for each prompt; a group is never divided.

    Few groups (templates) become one fold each; many are dealt to `folds` folds in order of
    their names, which for documents are hashes. Raises `ValueError` for a single group, and
    for test prompts, which nothing may be fitted to.
    """
    for prompt in prompts:
        if not isinstance(prompt, Prompt):
            raise TypeError(f"{prompt!r:.60} is no `Prompt` with a group: make prompts with `take` or `read_prompts`")
        if prompt.part == "test":
            raise ValueError(f"prompt {prompt.text[:40]!r} is held out for the test: fit to prompts of part 'train'")
    groups = sorted({prompt.group for prompt in prompts})
    if len(groups) < 2:
        raise ValueError(f"all {len(prompts)} prompts belong to one group, so nothing can be held out: use more")
    count = len(groups) if len(groups) <= 2 * folds else folds
    number = {group: k % count for k, group in enumerate(groups)}
    return [number[prompt.group] for prompt in prompts]


def groups(prompts: list[Prompt], fitted: bool = False) -> list[str] | None:
    """The cluster of each prompt, for standard errors; None where every prompt is a sample of its own.

    Raises `ValueError` for training prompts, on which no result is measured; `fitted` says that
    the fit itself is judged, by its folds.
    """
    for prompt in prompts:
        if prompt.part == "train" and not fitted:
            raise ValueError(f"prompt {prompt.text[:40]!r} is one to fit to: measure on prompts of part 'test'")
    names = [prompt.cluster for prompt in prompts]
    return None if None in names else [str(name) for name in names]


def texts(prompts: list[Prompt]) -> list[str]:
    """The texts alone."""
    return [prompt.text for prompt in prompts]


def _check(value: str, known: tuple[str, ...], what: str) -> None:
    if value not in known:
        raise ValueError(f"{what} {value!r} is unknown: use one of {', '.join(known)}")


def _templates(family: str, split: str, part: str) -> dict[str, Template]:
    templates = FAMILIES[family]
    if split != "template":
        return templates
    held_out = part != "train"
    chosen = {name: make for name, make in templates.items() if (name in HELD_OUT_TEMPLATES) == held_out}
    if not chosen or len(chosen) == len(templates):
        raise ValueError(f"family {family!r} has no template to hold out: use 'mixed', 'reasoning' or 'templates'")
    return chosen


def _render(templates: dict[str, Template], i: int, split: str, part: str) -> Prompt:
    names = list(templates)
    name = names[i % len(names)]
    if split == "template":
        return Prompt(templates[name](i), name, name, part)
    return Prompt(templates[name](i), f"block {i // BLOCK:04d}", part=part)


def _passages(documents: Sequence[Document], part: str, n: int, seed: int) -> list[Prompt]:
    rng = random.Random(f"{part} {seed}")  # a string seeds the same on every platform
    order = rng.sample(range(len(documents)), len(documents))
    passages: list[Prompt] = []
    for k in range(4 * n):  # several cuts of one document where there are few documents
        document = documents[order[k % len(order)]]
        text = _cut(document.text, rng)
        if text:
            passages.append(Prompt(text, document.key, document.key, part))
        if len(passages) == n:
            return passages
    raise ValueError(f"the corpus has too little text for {n} natural prompts of part {part!r}: ask for fewer")


def _own(prompts_file: str, part: str, n: int) -> list[Prompt]:
    """Up to `n` lines of a file, or `n` passages from a folder; which are held out their content decides."""
    folder = locate(prompts_file)
    if os.path.isdir(folder):
        kept = [text for text in read_texts(folder) if _held_out(text.key) == (part == "test")]
        if not kept:
            raise ValueError(f"folder {prompts_file!r} has no text for part {part!r}, one in ten is held out: add some")
        return _passages(kept, part, n, 0)
    lines = read_prompts(prompts_file)
    chosen = [prompt for prompt in lines if _held_out(prompt.group) == (part == "test")]
    if len({prompt.group for prompt in chosen}) < 2:
        count = len({prompt.group for prompt in lines})
        raise ValueError(
            f"prompt file {prompts_file!r} has {count} different lines, too few to hold some out: give a hundred"
        )
    return [replace(prompt, part=part) for prompt in chosen[:n]]


def _held_out(key: str) -> bool:
    return int(key, 16) % 10 == 0


def _cut(text: str, rng: random.Random) -> str | None:
    """A passage that starts at a word and ends before a space, at a random place."""
    shortest, longest = CONTEXT
    ends = [match.start() + 1 for match in re.finditer(r"\S(?=\s)", text) if match.start() >= shortest]
    if not ends:
        return None
    end = rng.choice(ends)
    start = max(0, end - rng.randint(shortest, longest))
    while start and start < end and not text[start - 1].isspace():
        start += 1
    return text[start:end].strip() or None
