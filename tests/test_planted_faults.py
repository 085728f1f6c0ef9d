"""Faults planted in copies of what is committed: the check that is run on the originals names the place."""

import base64
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from prose import literal_numbers
from shown import disagreements

from chassis_utils.files import ROOT
from chassis_utils.paper import checksums, tables
from chassis_utils.paper.agreement import table_differences

ENDS = (".csv", ".tex", ".md", ".json")
TABLES = [f"paper/tables/{name}{end}" for name in ("port", "fft_speed", "fft_model_speed") for end in ENDS]
NOTEBOOKS = ["notebooks/12_fft_speed.ipynb", "notebooks/50_port.ipynb"]
FIGURES = [f"figures/{name}{end}" for name in ("port", "fft_speed") for end in (".pdf", ".png", ".json")]
OTHERS = [
    "paper/paper.pdf",
    "paper/paper.typ",
    "paper/details.typ",
    "paper/lib.typ",
    "paper/references.bib",
    "paper/reported/bridge.csv",
]
FILES = [*TABLES, *NOTEBOOKS, *FIGURES, *OTHERS]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Some committed files, with their lines of the committed list."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    lines = (ROOT / checksums.LIST).read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / checksums.LIST).write_text("".join(line for line in lines if line.split()[1] in FILES))
    return tmp_path


def times(column: str, factor: float, below: float = float("inf")) -> Callable[[str], str]:
    """The first value of a CSV's column that is below so much, multiplied."""

    def plant(text: str) -> str:
        head, *rows = [line.split(",") for line in text.splitlines()]
        place = head.index(column)
        row = next(row for row in rows if row[place] and float(row[place]) < below)
        row[place] = str(float(row[place]) * factor)
        return "\n".join(map(",".join, [head, *rows])) + "\n"

    return plant


def swap(old: str, new: str) -> Callable[[str], str]:
    """Replace the first place of a pattern that must be there."""

    def plant(text: str) -> str:
        planted, count = re.subn(old, new, text, count=1, flags=re.DOTALL)
        assert count
        return planted

    return plant


def picture(text: str) -> str:
    """The stored picture of a notebook, its last byte another."""
    (stored,) = re.findall(r'"image/png": "([^"]*)"', text)
    data = base64.b64decode(stored.replace("\\n", ""))
    return text.replace(stored, base64.b64encode(data[:-1] + b"!").decode())


EDITS = {  # what is edited by hand -> the file, and how
    "1.5 percent": ("paper/tables/port.csv", times("base_kl", 1.015)),
    "a speed-up times three": ("paper/tables/fft_speed.csv", times("speedup", 3)),
    "an exact divergence": ("paper/tables/port.csv", times("kl", 50, below=1e-6)),
    "markdown": ("paper/tables/port.md", swap(r"\d\.\d", "9.9")),
    "latex": ("paper/tables/port.tex", swap(r"\d\.\d", "9.9")),
    "provenance": ("paper/tables/port.json", swap('"content": "..', '"content": "zz')),
    "a header": ("paper/tables/port.json", swap("KL \\(nats\\)", "KL (bits)")),
    "what was reported": ("paper/reported/bridge.csv", swap(r"\d", "7")),
    "the description of a figure": ("figures/port.json", swap("KL to each", "KL to every")),
    "a stored picture": ("notebooks/50_port.ipynb", picture),
    "a claim in a notebook": ("notebooks/50_port.ipynb", swap("are followed exactly", "are missed")),
    "a verdict": ("notebooks/50_port.ipynb", swap(r"bit-identical to those", "different from those")),
    "a shown table": ("notebooks/50_port.ipynb", swap(r"<td>synthetic</td>", "<td>bridged</td>")),
    "a literal number": ("paper/paper.typ", swap("On the small models", "On the small models (1.2e-7)")),
}
BINARY = ["figures/port.png", "figures/port.pdf", "paper/paper.pdf"]


def plant(root: Path, case: str) -> str:
    """Edit a file; its name."""
    name, edit = EDITS[case]
    text = (root / name).read_text(encoding="utf-8")
    (root / name).write_text(edit(text), encoding="utf-8")
    assert (root / name).read_text(encoding="utf-8") != text
    return name


def test_the_copies_are_sound(copy: Path) -> None:
    assert checksums.altered(copy) == disagreements(copy) == []


@pytest.mark.parametrize("case", EDITS)
def test_an_edit_by_hand_differs_from_the_list(case: str, copy: Path) -> None:
    name = plant(copy, case)
    assert checksums.altered(copy) == [name]


@pytest.mark.parametrize("name", BINARY)
def test_a_flipped_bit_differs_from_the_list(name: str, copy: Path) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    assert checksums.altered(copy) == [name]


def test_a_missing_and_an_unlisted_file_differ_from_the_list(copy: Path) -> None:
    (copy / "figures" / "port.png").rename(copy / "figures" / "other.png")
    assert checksums.altered(copy) == ["figures/other.png", "figures/port.png"]


NAMED = {  # what disagrees where somebody has brought the list up to date after the edit
    "1.5 percent": ["port.tex does not follow from port.csv", "port.md does not", "50_port.ipynb: row 0 shown in cell"],
    "a speed-up times three": ["fft_speed.tex does not follow from fft_speed.csv", "fft_speed.md does not"],
    "markdown": ["port.md does not follow from port.csv"],
    "latex": ["port.tex does not follow from port.csv"],
    "a header": ["port.json does not follow from port.csv"],
    "a stored picture": ["50_port.ipynb: the picture in cell"],
    "a shown table": ["50_port.ipynb: row 0 shown in cell"],
}


@pytest.mark.parametrize("case", NAMED)
def test_an_edit_with_its_checksum_disagrees_with_what_stands_beside_it(case: str, copy: Path) -> None:
    checksums.record(copy, [copy / plant(copy, case)])
    assert checksums.altered(copy) == []
    found = disagreements(copy)
    assert len(found) == len(NAMED[case])
    assert all(line.startswith(start) for line, start in zip(found, NAMED[case], strict=True))


WRITTEN_OUT = [
    *("It is exact to 1.2e-7 nats.", "It closes 87 percent.", "off by $3.2 times 10^(-5)$ nats", "#let best = 0.25"),
    *("#shown(0.25)", "#if best > 0.2 [it is 4 times faster]", '#from("port", [0.31])', "ranks of 7 nats"),
]


@pytest.mark.parametrize("words", WRITTEN_OUT)
def test_a_number_that_no_table_gives_is_found_in_the_paper(words: str) -> None:
    source = (ROOT / "paper" / "paper.typ").read_text(encoding="utf-8")
    planted = source.replace("= Introduction\n", f"= Introduction\n\n{words}\n", 1)
    (line,) = literal_numbers(planted)
    assert line.startswith(f"line {source[: source.index('= Introduction')].count(chr(10)) + 3}: ")


MOVES = {"1.5 percent": (1.015, 1e-4, 10.0), "below 1e-6": (50, 1e-8, 1e-6)}  # by so much, from a KL between these


@pytest.mark.parametrize("case", MOVES)
@pytest.mark.parametrize("name", ["lens_kl", "hidden_to_hidden"])
def test_a_run_that_gives_another_number_disagrees_with_the_committed_one(name: str, case: str) -> None:
    factor, low, high = MOVES[case]
    stored = tables.read(ROOT / "paper" / "tables" / f"{name}.csv")
    row = stored.index[stored["kl"].between(low, high)][0]
    new = stored.copy()
    new.loc[row, "kl"] *= factor
    (line,) = table_differences(new, stored)
    assert f"column kl, 1 of {len(stored)} rows, first row {row}: " in line
