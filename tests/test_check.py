"""The comparison of executed notebooks passes on rounding and fails on other words, numbers and code."""

import json
from pathlib import Path

import pytest

from chassis_utils.paper.check import output_differences as differences


def write(path: Path, text: str, source: str = "print(1)", tags: tuple[str, ...] = (), injected: bool = False) -> Path:
    outputs = [{"output_type": "stream", "name": "stdout", "text": [piece]} for piece in text.split("|")]
    cell = {"cell_type": "code", "id": "a", "metadata": {"tags": list(tags)}, "source": [source], "outputs": outputs}
    cell["execution_count"] = 1
    extra = {**cell, "metadata": {"tags": ["injected-parameters"]}, "source": ["n = 2"], "id": "b"}
    notebook = {"cells": [extra, cell] if injected else [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(notebook))
    return path


def test_rounding_an_injected_cell_and_measured_times_pass(tmp_path: Path) -> None:
    stored = write(tmp_path / "stored.ipynb", "KL 0.1234")
    assert not differences(write(tmp_path / "new.ipynb", "KL 0.1235", injected=True), stored)
    assert not differences(write(tmp_path / "new.ipynb", "KL| 0.12|34"), stored)
    stored = write(tmp_path / "stored.ipynb", "12 ms", tags=("nbval-ignore-output",))
    assert not differences(write(tmp_path / "new.ipynb", "900 ms"), stored)


@pytest.mark.parametrize("change", [{"text": "KL 0.2234"}, {"text": "no KL 0.1234"}, {"source": "print(2)"}])
def test_other_words_numbers_and_code_fail(change: dict[str, str], tmp_path: Path) -> None:
    stored = write(tmp_path / "stored.ipynb", "KL 0.1234")
    assert len(differences(write(tmp_path / "new.ipynb", **{"text": "KL 0.1234"} | change), stored)) == 1
