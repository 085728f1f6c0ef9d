"""Families say exactly what the studies asked; no split puts the same thing on both sides."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chassis_utils.text import prompts
from chassis_utils.text.corpus import Document
from chassis_utils.text.prompts import FAMILIES, Prompt, fold_numbers, read_prompts, standard_sets, take, texts

SIZES = {"train": 4096, "val": 512, "test": 512}
WRITTEN = {  # family: index -> prompt, copied from the studies by hand
    "mixed": {
        0: "What is 0 + 1?",
        1: "Explain entropy in one sentence. #1",
        2: "In physics, force equals mass times acceleration. Comment #2.",
        4095: "What is 4095 + 4096?",
    },
    "math": {0: "What is 0 + 3?", 1: "What is 1 + 4?"},
    "physics": {
        0: "In physics, explain Newton's 1rd law of motion. #0",  # the study's wording, for every number
        2: "In physics, explain Newton's 3rd law of motion. #2",
    },
    "math_steps": {4: "What is 4 * 6? Show the steps."},
    "physics_derive": {7: "In physics, derive F = m a for a simple system. #7"},
    "reasoning": {
        3: "Explain step by step how to solve 3 + 10.",
        4: "Why is the sky blue? Give a detailed reasoning. #4",
        5: "In physics, derive F = m a with a simple example. #5",
    },
    "tools": {5: "You have access to a calculator and a web browser. Plan how to find the answer to 5 * 8."},
    "engineering": {
        6: "Explain how you would debug a segmentation fault in C. #6",
        1: "Explain the steps to evaluate an integral of x^2.",
        3: "Explain the steps to evaluate an integral of x^4.",
    },
}


@pytest.fixture(autouse=True)
def corpus(documents: dict[str, list[Document]], monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Document]]:
    """The real corpus, read once for all tests."""
    monkeypatch.setattr(prompts, "read_documents", documents.__getitem__)
    monkeypatch.setattr(prompts, "read_unseen", documents.__getitem__)
    return documents


def skeleton(prompt: Prompt) -> str:
    """The template of a prompt: its text without what the index changes."""
    return re.sub(r"\d+(st|nd|rd)?", "_", prompt.text)


@pytest.mark.parametrize("family", WRITTEN)
def test_prompts_are_worded_as_in_the_studies(family: str) -> None:
    found = texts(take(family, "index", "train", 4096))
    assert {i: found[i] for i in WRITTEN[family]} == WRITTEN[family]


def test_validation_starts_at_5000_and_test_at_8000() -> None:
    assert take("math", "index", "val", 1)[0].text == "What is 5000 + 5003?"
    assert take("math", "index", "test", 1)[0].text == "What is 8000 + 8003?"


@pytest.mark.parametrize("family", FAMILIES)
def test_index_split_repeats_no_numbered_prompt_and_no_group(family: str) -> None:
    parts = {part: take(family, "index", part, n) for part, n in SIZES.items()}
    # the integral has four wordings whatever the index, as the study had it
    wordings = [{text for text in texts(part) if "integral" not in text} for part in parts.values()]
    groups = [{prompt.group for prompt in part} for part in parts.values()]
    for train, val, test in (wordings, groups):
        assert not (train & val or train & test or val & test)


def test_prefix_split_evaluates_on_its_training_prompts() -> None:
    train = take("mixed", "prefix", "train", 600)
    assert take("mixed", "prefix", "val", 512) == take("mixed", "prefix", "test", 512) == train[:512]


@pytest.mark.parametrize("family", ["mixed", "reasoning", "templates"])
def test_template_split_shares_no_template(family: str) -> None:
    train, test = (take(family, "template", part, 500) for part in ("train", "test"))
    assert not {skeleton(prompt) for prompt in train} & {skeleton(prompt) for prompt in test}
    assert not {prompt.group for prompt in train} & {prompt.group for prompt in test}


def test_all_templates_appear_when_families_are_pooled() -> None:
    pooled = {skeleton(prompt) for prompt in take("templates", "index", "train", 500)}
    single = {skeleton(p) for family in WRITTEN for p in take(family, "index", "train", 100)}
    assert pooled == single - {"In physics, derive F = m a with a simple example. #_"}  # a near copy, left out


def test_document_split_shares_no_document() -> None:
    train, val, test = ({prompt.group for prompt in take("natural", "document", part, 200)} for part in SIZES)
    assert not (train & val or train & test or val & test)


HELD_OUT = [
    *((family, "index") for family in FAMILIES),
    *((family, "template") for family in ("mixed", "reasoning", "templates")),
    ("natural", "document"),
]


@pytest.mark.parametrize(("family", "split"), HELD_OUT)
def test_nothing_is_measured_on_training_prompts_or_fitted_to_test_prompts(family: str, split: str) -> None:
    train, test = take(family, split, "train", 200), take(family, split, "test", 200)
    with pytest.raises(ValueError, match="is one to fit to: measure on prompts of part 'test'"):
        prompts.groups([*test, train[0]])
    with pytest.raises(ValueError, match="is held out for the test: fit to prompts of part 'train'"):
        fold_numbers([*train, test[0]])


CLUSTERS = {"index": None, "prefix": None, "template": "group", "document": "group"}


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("split", CLUSTERS)
def test_prompts_of_one_template_or_document_are_one_cluster(split: str, part: str) -> None:
    found = take("natural" if split == "document" else "mixed", split, part, 300)
    clusters = [prompt.group for prompt in found] if CLUSTERS[split] else None
    assert prompts.groups(found, fitted=part == "train") == clusters


def test_held_out_natural_text_is_what_shares_no_paragraph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "read_unseen", lambda part: [Document(f"A passage of the unseen {part} text. " * 20)])
    assert {prompt.group for prompt in take("natural", "document", "test", 5)} == {
        Document("A passage of the unseen test text. " * 20).key
    }


def test_natural_prompts_are_decided_by_the_seed() -> None:
    first = take("natural", "document", "test", 50, seed=1)
    assert first == take("natural", "document", "test", 50, seed=1)
    assert not set(texts(first)) & set(texts(take("natural", "document", "test", 50, seed=2)))


def test_natural_prompts_start_at_a_word_and_end_before_white_space(corpus: dict[str, list[Document]]) -> None:
    sources = {document.key: document.text for document in corpus["test"]}
    for prompt in take("natural", "document", "test", 200):
        assert re.search(rf"(?<!\S){re.escape(prompt.text)}(?=\s)", sources[prompt.group])


def test_a_smaller_natural_set_is_the_start_of_a_larger_one() -> None:
    assert take("natural", "document", "test", 20) == take("natural", "document", "test", 60)[:20]


def test_more_natural_prompts_than_documents_take_several_cuts(corpus: dict[str, list[Document]]) -> None:
    count = 2 * len(corpus["val"])
    assert len(set(texts(take("natural", "document", "val", count)))) > 0.9 * count


def test_standard_sets_are_the_three_honest_splits() -> None:
    sets = standard_sets(30, 20)
    assert {key: len(part) for key, part in sets.items()} == {
        (split, part): n for split in ("index", "template", "document") for part, n in (("train", 30), ("test", 20))
    }
    assert sets["document", "test"] == take("natural", "document", "test", 20)


@given(st.lists(st.integers(0, 40), min_size=2, max_size=80), st.integers(2, 6))
def test_folds_never_divide_a_group_and_none_is_empty(groups: list[int], folds: int) -> None:
    found = [Prompt(str(i), str(group)) for i, group in enumerate(groups)]
    if len(set(groups)) == 1:
        with pytest.raises(ValueError, match="belong to one group, so nothing can be held out"):
            fold_numbers(found, folds)
        return
    numbers = fold_numbers(found, folds)
    assert len(set(zip(groups, numbers, strict=True))) == len(set(groups))
    assert set(numbers) == set(range(max(numbers) + 1))
    assert max(numbers) + 1 == (len(set(groups)) if len(set(groups)) <= 2 * folds else folds)


def test_a_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("Größe ist\n\n  The sky is \n", encoding="utf-8")
    assert texts(read_prompts(path)) == ["Größe ist", "The sky is"]
    assert len({prompt.group for prompt in read_prompts(path)}) == 2


def test_a_missing_prompt_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompt file '.*own\.txt' does not exist: name a text file with one prompt"):
        read_prompts(str(tmp_path / "own.txt"))


def test_an_empty_prompt_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("\n  \n")
    with pytest.raises(ValueError, match=r"prompt file '.*own\.txt' is empty: write one prompt a line"):
        read_prompts(str(tmp_path / "own.txt"))


def test_a_part_cannot_grow_into_the_next() -> None:
    with pytest.raises(
        ValueError, match="6000 prompts of part 'train' would run into the next part: ask for at most 5000"
    ):
        take("mixed", "index", "train", 6000)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("mixxed", "index", "train"), "family 'mixxed' is unknown: use one of mixed, math"),
        (("mixed", "indexes", "train"), "split 'indexes' is unknown: use one of index, prefix, template, document"),
        (("mixed", "index", "dev"), "part 'dev' is unknown: use one of train, val, test"),
        (("math", "template", "train"), "family 'math' has no template to hold out"),
        (("tools", "template", "test"), "family 'tools' has no template to hold out"),
        (("mixed", "document", "train"), "split 'document' needs natural text, not the templates of 'mixed'"),
        (("natural", "index", "train"), "split 'index' does not apply to natural text: use 'document'"),
    ],
)
def test_what_holds_nothing_out_or_is_unknown_is_refused(arguments: tuple[str, str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        take(*arguments, 3)


def test_more_natural_text_than_there_is_cannot_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "read_unseen", lambda part: [Document("too short to be cut")])
    with pytest.raises(ValueError, match="too little text for 3 natural prompts of part 'val': ask for fewer"):
        take("natural", "document", "val", 3)


def test_passages_of_a_folder_keep_documents_together(tmp_path: Path) -> None:
    for k in range(40):
        words = " ".join(f"word{k}x{i}" for i in range(60))
        (tmp_path / f"{k}.txt").write_text(words, encoding="utf-8")
    sets = standard_sets(100, 30, str(tmp_path))
    train, test = (sets["document", part] for part in ("train", "test"))
    assert len(train) == 100 and len(test) == 30
    assert not {prompt.group for prompt in train} & {prompt.group for prompt in test}
    for prompt in (*train, *test):  # a passage lies inside one document, its group
        assert len({word.split("x")[0] for word in prompt.text.split()}) == 1
    assert {prompt.part for prompt in test} == {"test"}


def test_a_folder_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds 0 different texts"):
        standard_sets(10, 10, str(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"a\.txt is no UTF-8 text, see its byte 0"):
        standard_sets(10, 10, str(tmp_path))
