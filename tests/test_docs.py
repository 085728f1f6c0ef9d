"""The documents say what is there: their links, commands, programs, tables and figures, and the numbers in them."""

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import chassis_utils
from chassis_utils.__main__ import main
from chassis_utils.as_reported.sizes import scaled_rank
from chassis_utils.experts.alongside import Alongside
from chassis_utils.files import MODELS, ROOT
from chassis_utils.paper.notebook import Notebook, numbered_notebooks

README, GUIDE, LAYOUT = ROOT / "README.md", ROOT / "docs" / "guide.md", ROOT / "docs" / "layout.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SCREENS = 110  # lines of the README at most
FENCED = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
TARGETS = set(re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
LONGEST_PAPER = 30  # minutes of one thread, all notebooks; two cores take half


def text(path: Path) -> str:
    """A document."""
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str) -> list[str]:
    """The programs or commands in it."""
    return [body for kind, body in FENCED.findall(text(path)) if kind == language]


def anchors(path: Path) -> set[str]:
    """What links may point to within a document, as GitHub names it."""
    titles = re.findall(r"(?m)^#+ (.*)", FENCED.sub("", text(path)))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(path: Path) -> list[str]:
    """Links to files and titles that are not there."""
    broken = []
    for link in LINK.findall(FENCED.sub("", text(path))):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        there = path.parent / name if name else path
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path: Path) -> None:
    assert broken_links(path) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# One title\n[x](#one-title) [y](b.md) [z](#other) [w](https://example.org)\n")
    assert broken_links(tmp_path / "a.md") == ["b.md", "#other"]


def test_the_readme_is_two_screens_long() -> None:
    assert len(text(README).splitlines()) <= SCREENS


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_those_of_the_makefile_and_of_chassis(path: Path) -> None:
    commands = [line for block in blocks(path, "sh") for line in block.splitlines()]
    assert {target for line in commands for target in re.findall(r"\bmake ([a-z]+)", line)} <= TARGETS
    for line in commands:
        for name in re.findall(r"\b(?:python|pytest) ((?:models|tests)/[\w./]+)", line):
            assert (ROOT / name).exists(), name


def test_every_target_of_the_makefile_is_explained() -> None:
    everything = "".join(map(text, DOCUMENTS))
    assert [target for target in sorted(TARGETS) if f"make {target}" not in everything] == []


def test_programs_import_what_there_is() -> None:
    programs = [ast.parse(block) for path in DOCUMENTS for block in blocks(path, "python")]
    nodes = [node for program in programs for node in ast.walk(program) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in nodes if node.module == "chassis_utils" for alias in node.names}
    assert {"load", "fit", "fit_prompt", "Port", "Adapter", "Alongside"} <= names <= set(chassis_utils.PUBLIC)


def test_the_guide_goes_from_a_command_to_a_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = [block.split() for block in blocks(GUIDE, "sh") if block.startswith("chassis fit")]
    named = {"path/to/base": str(MODELS / "port-llama"), "path/to/expert": str(MODELS / "sibling-math")}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("\n".join(f"What is {i} + {i + 3}? It is {2 * i + 3}." for i in range(40)))
    assert main([named.get(word, word) for word in command[1:]]) == 0
    (program,) = [block for block in blocks(GUIDE, "python") if "from_pretrained" in block]
    names: dict = {}
    exec(program, names)
    with names["port"].use([None, None]):
        untouched = names["model"].network.generate(names["rows"], max_new_tokens=8)
    assert names["answers"].shape == untouched.shape
    assert (names["answers"][1] == untouched[1]).all() and (names["answers"][0] != untouched[0]).any()


def test_the_device_of_the_guide_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = [block for block in blocks(GUIDE, "python") if "Alongside" in block]
    names: dict = {}
    exec(program, names)
    assert names["Alongside"] is Alongside and capsys.readouterr().out.strip()


def notebook_rows() -> dict[str, list[str]]:
    """The lines of the table of notebooks: name -> question, tables, figures, minutes."""
    found = re.findall(
        r"(?m)^\| \[(\w+)\]\(\.\./notebooks/\1\.ipynb\) \| (.*) \|$", text(ROOT / "docs" / "notebooks.md")
    )
    return {name: [cell.strip() for cell in row.split(" | ")] for name, row in found}


def test_the_table_of_notebooks_is_complete() -> None:
    rows = notebook_rows()
    assert list(rows) == [path.stem for path in numbered_notebooks(ROOT)]
    minutes = [int(row[3]) for row in rows.values()]
    assert min(minutes) >= 1 and sum(minutes) <= LONGEST_PAPER + len(minutes) // 2  # each is rounded


@pytest.mark.parametrize("path", numbered_notebooks(ROOT), ids=lambda path: path.stem)
def test_the_table_of_notebooks_names_their_results(path: Path) -> None:
    notebook = Notebook.read(path)
    written = [sorted(notebook.names_given_to(f"save_{kind}", 1)) for kind in ("table", "figure")]
    assert [sorted(re.findall(r"`(\w+)`", cell)) for cell in notebook_rows()[path.stem][1:3]] == written


def test_the_layout_names_every_room_from_the_ground_up() -> None:
    rooms = [path.parent.name for path in (ROOT / "chassis_utils").glob("*/__init__.py")]
    named = re.findall(r"(?m)^  (\w+)/ ", text(LAYOUT))
    assert sorted(named) == sorted(rooms)
    assert named == ["linalg", "text", "lm", "bridge", "experts", "adapters", "circulant", "as_reported", "paper"]


def test_scaled_ranks_are_those_of_the_table() -> None:
    rows = re.findall(r"(?m)^\| [^|]+ \| (\d+) \| (\d+) \| ([\d, ]+) \|$", text(GUIDE))
    assert len(rows) == 4
    for width, main_rank, others in rows:
        assert scaled_rank(int(width)) == int(main_rank)
        assert ", ".join(str(scaled_rank(int(width), rank)) for rank in (4, 32, 128)) == others
    assert "64 is 8 on the shipped base and 2 at width 64" in text(README)


def pick(name: str, column: str, **where: object) -> float:
    """The one value of a column of a committed table."""
    table = pd.read_csv(ROOT / "paper" / "tables" / f"{name}.csv")
    for key, value in where.items():
        table = table[table[key].eq(value)]
    (value,) = table[column].unique()
    return float(value)


def _swept(variant: str, column: str = "kl") -> float:
    return pick("rank_sweep", column, split="document", edit_kl=0.5, rank=4, variant=variant)


def _lens(variant: str, column: str = "kl") -> float:
    return pick("lens_kl", column, split="document", layer=0, variant=variant)


def _bridged(variant: str) -> float:
    return pick("bridge_quality", "total_variation", variant=variant)


def _told(variant: str) -> float:
    return pick("real/prompted_expert", "gap_closed", expert="pirate", variant=variant)


def _summed(variant: str) -> float:
    return pick("real/sibling_at_depth", "exact", expert="sibling", kind="sums", variant=variant)


RESULTS: dict[str, list[Callable[[], float] | None]] = {  # last words of the table's line -> its three numbers
    "rank_sweep": [lambda: _swept("as_reported"), lambda: _swept("corrected"), lambda: _swept("corrected", "base_kl")],
    "lens_kl": [lambda: _lens("as_reported"), lambda: _lens("corrected"), lambda: _lens("corrected", "base_kl")],
    "bridge_quality": [lambda: _bridged("stage_a"), lambda: _bridged("byte_exact"), None],
    "prompted_expert": [None, lambda: _told("every_block"), lambda: _told("untouched")],
    "sibling_at_depth": [None, lambda: _summed("every_block"), lambda: _summed("untouched")],
}


@pytest.mark.parametrize("name", RESULTS)
def test_the_numbers_of_the_readme_are_those_of_the_tables(name: str) -> None:
    (line,) = [line for line in text(README).splitlines() if line.endswith(f"`{name}` |")]
    shown = [cell.strip() for cell in line.split("|")[2:5]]
    for cell, number in zip(shown, RESULTS[name], strict=True):
        if number is None:
            assert cell == ""
        else:
            assert float(cell) == float(f"{number():.3g}")
