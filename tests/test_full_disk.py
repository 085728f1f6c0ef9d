"""A disk without room, or a folder that cannot be written, is one sentence, and what was there before stays."""

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from chassis_utils.adapters.adapter import Adapter
from chassis_utils.files import cached
from chassis_utils.lm.model import Head
from chassis_utils.paper import checksums, report
from chassis_utils.paper.pipeline import finish_moves

HEAD = Head(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)))


@contextmanager
def room(size: int) -> Iterator[None]:
    """Every file may have so many bytes: the system refuses the write that goes beyond, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_table(folder: Path, number: int) -> None:
    """A table whose CSV is shorter than its provenance."""
    os.environ["CHASSIS_RESULTS"] = str(folder)
    report.save_table(pd.DataFrame({"layer": [number]}), "small")


def save_figure(folder: Path, number: int) -> None:
    """A figure that shows a number."""
    os.environ["CHASSIS_RESULTS"] = str(folder)
    figure, axis = plt.subplots()
    axis.set_title(str(number))
    report.save_figure(figure, "small", alt="A number.")


def save_adapter(folder: Path, number: int) -> None:
    """An adapter of two files."""
    Adapter.untouched(HEAD, rank=1 + number).save_pretrained(folder / "adapter")


def move_results(folder: Path, number: int) -> None:
    """Two results of a notebook that has finished."""
    moving = {}
    for end, content in ((".csv", f"layer\n{number}\n"), (".json", f"{number} " * 500)):
        staged = folder / "build" / "micro" / "staging" / "20_test" / "tables" / f"small{end}"
        staged.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(content)
        moving[f"paper/tables/small{end}"] = str(staged.relative_to(folder))
    (folder / "build" / "micro" / "staging" / "20_test.moving").write_text(json.dumps(moving))
    with room(900) if number == 2 else nullcontext():  # staged before the disk was full
        finish_moves(folder)


def fill_cache(folder: Path, number: int) -> None:
    """An entry of the cache for each number."""
    cached(folder / "cache" / f"states-{number}", lambda: b"%d" % number * 2000)


def contents(folder: Path) -> dict[str, bytes]:
    """All results below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files if "build" not in path.parts}


@pytest.fixture(autouse=True)
def stamped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with some provenance."""
    monkeypatch.setenv("CHASSIS_RESULTS", "")
    monkeypatch.setattr(report, "_provenance", {"profile": "micro", "notebook": "20_test", "content": "0" * 1000})


WRITERS: dict[str, tuple[Callable[[Path, int], None], int, str]] = {  # and the room of each file, the file that fails
    "table": (save_table, 200, "tables/small.json"),
    "figure": (save_figure, 2000, "figures/small.pdf"),
    "adapter": (save_adapter, 200, "adapter/adapter.safetensors"),
    "move": (move_results, 100_000, "tables/small.json"),
    "cache": (fill_cache, 1000, "cache/states-2"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(kind: str, tmp_path: Path) -> None:
    write, size, name = WRITERS[kind]
    write(tmp_path, 1)
    before = contents(tmp_path)
    assert before
    sentence = rf"^{name} could not be written \(File too large\): make room"
    with room(size), pytest.raises(OSError, match=sentence) as caught:
        write(tmp_path, 2)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before


def test_what_found_no_room_is_moved_at_the_next_start(tmp_path: Path) -> None:
    move_results(tmp_path, 1)
    with pytest.raises(OSError, match="make room and run again"):
        move_results(tmp_path, 2)
    finish_moves(tmp_path)
    assert (tmp_path / "paper/tables/small.csv").read_text() == "layer\n2\n"
    assert (tmp_path / "paper/tables/small.json").read_text() == "2 " * 500
    assert checksums.altered(tmp_path) == []


FOLDERS = {"table": "tables", "figure": "figures", "adapter": "adapter", "move": "paper/tables", "cache": "cache"}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_in_the_place_of_a_folder_is_one_sentence(kind: str, tmp_path: Path) -> None:
    place = tmp_path / FOLDERS[kind]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("in the way")
    with pytest.raises(OSError, match=r"(could not|cannot) be written \(File exists\): make ") as caught:
        WRITERS[kind][0](tmp_path, 1)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == {FOLDERS[kind]: b"in the way"}


@pytest.mark.skipif(os.geteuid() == 0, reason="no folder is read-only for the superuser")
@pytest.mark.parametrize("kind", WRITERS)
def test_a_read_only_folder_is_one_sentence_and_leaves_what_was_there(kind: str, tmp_path: Path) -> None:
    WRITERS[kind][0](tmp_path, 1)
    before = contents(tmp_path)
    folder = tmp_path / FOLDERS[kind]
    folder.chmod(0o555)
    try:
        with pytest.raises(OSError, match=r"(could not|cannot) be written \(Permission denied\): make "):
            WRITERS[kind][0](tmp_path, 3)
    finally:
        folder.chmod(0o755)
    assert contents(tmp_path) == before
