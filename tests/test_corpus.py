"""The corpus is read without running anything, and its split follows from content alone."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chassis_utils.text import corpus
from chassis_utils.text.corpus import SHORTEST, Document, package_docstrings, read_documents, read_unseen


def test_no_document_is_met_twice(documents: dict[str, list[Document]]) -> None:
    keys = [document.key for side in documents.values() for document in side]
    assert len(keys) == len(set(keys))


def test_each_held_out_side_is_about_three_percent(documents: dict[str, list[Document]]) -> None:
    sizes = {split: len(side) for split, side in documents.items()}
    total = sum(sizes.values())
    spread = 4 * (0.03 * 0.97 / total) ** 0.5
    assert {split: size / total for split, size in sizes.items() if split != "train"} == {
        "val": pytest.approx(0.03, abs=spread),
        "test": pytest.approx(0.03, abs=spread),
    }


@given(st.text())
def test_equal_content_has_one_name_and_one_side(text: str) -> None:
    one, other = Document(text), Document("".join(text))
    assert (one.key, one.part) == (other.key, other.part)
    assert one.part in corpus.PARTS


def test_the_order_of_reading_moves_no_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = []
    for packages in (["seaborn", "tqdm"], ["tqdm", "seaborn"]):
        monkeypatch.setattr(corpus, "PACKAGES", dict.fromkeys(packages, ""))
        monkeypatch.setattr(corpus, "CACHE", tmp_path / packages[0])
        sides.append({part: {document.key for document in read_documents(part)} for part in corpus.PARTS})
    assert sides[0] == sides[1] and len(sides[0]["train"]) > 50


def test_docstrings_are_read_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = "word " * SHORTEST, "too short"
    package = tmp_path / "explosive"
    (package / "tests").mkdir(parents=True)
    source = f'"""{long}1"""\nraise RuntimeError\nclass A:\n  """{short}"""\n  def f(self):\n    """{long}2"""\n'
    (package / "__init__.py").write_text(source)
    (package / "broken.py").write_text("def (")
    (package / "tests" / "test_it.py").write_text(f'"""{long}3"""')
    monkeypatch.syspath_prepend(tmp_path)
    assert package_docstrings("explosive") == [f"{long}1", f"{long}2"]
    assert "explosive" not in sys.modules


def test_paragraphs_are_split_at_blank_lines() -> None:
    assert Document("One\ntwo.\n \n\n  Three. ").paragraphs == {"One\ntwo.", "Three."}


def test_a_missing_package_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match="package 'nosuch' is read for its docstrings but is not installed"):
        package_docstrings("nosuch")


def test_an_unknown_side_is_refused() -> None:
    with pytest.raises(ValueError, match="part 'dev' is unknown: use one of train, val, test"):
        read_documents("dev")


def test_unseen_documents_share_no_paragraph_with_training(documents: dict[str, list[Document]]) -> None:
    training = {part for document in documents["train"] for part in document.paragraphs}
    unseen = read_unseen("test")
    assert unseen
    assert not any(training & document.paragraphs for document in unseen)
    left_out = {document.key for document in documents["test"]} - {document.key for document in unseen}
    assert all(training & document.paragraphs for document in documents["test"] if document.key in left_out)


@pytest.mark.parametrize("damage", [b"", b"[", b"0" * 64 + b"\n[]"])
def test_a_damaged_corpus_is_read_anew(damage: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PACKAGES", {"seaborn": ""})
    monkeypatch.setattr(corpus, "CACHE", tmp_path)
    sound = read_documents("train")
    (stored,) = [file for file in tmp_path.iterdir() if file.suffix != ".lock"]
    stored.write_bytes(damage)
    with pytest.warns(UserWarning, match="in the cache is damaged: it is made anew"):
        assert read_documents("train") == sound
