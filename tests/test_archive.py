"""The archive holds what its metadata says, to the byte, and nothing of the machine that wrote it."""

import hashlib
import importlib.util
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import pytest

from chassis_utils.files import ROOT

CHECKPOINTS, ADAPTERS = ("expert-phi", "port-llama", "sibling-math"), ("smollm2-arithmetic", "smollm2-french")
SHIPPED = (
    *(f"{name}/model" for name in CHECKPOINTS),
    *(f"{name}/adapter_model" for name in (*ADAPTERS, "port-llama-french")),
)
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".npz")
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<~})])/[a-z]\w*/[\w.-]+|\b[A-Z]:\\\w|file://")

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the archive is made of a commit, here is no git")


@pytest.fixture(scope="module")
def archive() -> ModuleType:
    """The script behind `make archive`."""
    spec = importlib.util.spec_from_file_location("archive", ROOT / "paper" / "archive.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(archive: ModuleType) -> bytes:
    """The archive of the last commit."""
    return archive.build(archive.Snapshot.of(ROOT), archive.freeze())


@pytest.fixture(scope="module")
def unpacked(built: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that it unpacks to."""
    folder = tmp_path_factory.mktemp("archive")
    (folder / "archive.zip").write_bytes(built)
    with ZipFile(folder / "archive.zip") as file:
        assert file.testzip() is None
        file.extractall(folder / "unpacked")
    return folder / "unpacked"


@pytest.fixture(scope="module")
def graph(unpacked: Path, archive: ModuleType) -> dict[str, dict]:
    """The entities of its metadata by their names."""
    crate = json.loads((unpacked / archive.METADATA).read_text(encoding="utf-8"))
    assert crate["@context"][0] == "https://w3id.org/ro/crate/1.1/context"
    entities = {entity["@id"]: entity for entity in crate["@graph"]}
    assert len(entities) == len(crate["@graph"])
    return entities


def test_the_same_commit_gives_the_same_bytes(archive: ModuleType, built: bytes) -> None:
    assert archive.build(archive.Snapshot.of(ROOT), archive.freeze()) == built


def test_every_file_is_described_with_its_checksum(unpacked: Path, graph: dict[str, dict], archive: ModuleType) -> None:
    described = {name: entity for name, entity in graph.items() if "File" in entity["@type"]}
    there = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert set(described) == there - {archive.METADATA}
    for name, entity in described.items():
        content = (unpacked / name).read_bytes()
        assert (entity["sha256"], entity["contentSize"]) == (hashlib.sha256(content).hexdigest(), str(len(content)))
        assert len(entity["description"]) > 5, name
    assert {part["@id"] for part in graph["./"]["hasPart"]} >= set(described)


def references(value: object) -> set[str]:
    """The names that a value refers to."""
    if isinstance(value, dict):
        return {value["@id"]} if set(value) == {"@id"} else set().union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


def test_the_metadata_refers_to_nothing_that_is_not_there(graph: dict[str, dict]) -> None:
    named = references(list(graph.values()))
    assert named - set(graph) == {"https://w3id.org/ro/crate/1.1"}
    root = graph["./"]
    assert graph[root["author"]["@id"]]["@type"] == "Organization"
    assert graph[root["license"]["@id"]]["identifier"] == "MIT"
    assert {"name", "description", "datePublished", "version", "keywords"} <= set(root)


def test_every_result_has_one_action_that_made_it(graph: dict[str, dict]) -> None:
    actions = [entity for entity in graph.values() if entity["@type"] == "CreateAction"]
    made = sorted(name for action in actions for name in references(action["result"]))
    results = (name for name in graph if name.startswith(("paper/tables/", "figures/")) or name == "paper/paper.pdf")
    assert made == sorted(results)
    swept = graph["#22_rank_sweep-micro"]
    assert references(swept["object"]) == {"models/port-llama/", "notebooks/profiles/micro.yaml", "constraints.txt"}
    assert "paper/tables/rank_sweep.csv" in references(swept["result"])


def test_nothing_betrays_the_machine(unpacked: Path, archive: ModuleType) -> None:
    for name in (archive.METADATA, archive.FREEZE):
        assert ABSOLUTE_PATH.findall((unpacked / name).read_text(encoding="utf-8")) == []
    places = {str(ROOT).encode(), str(Path.home() / "x")[:-1].encode()}
    files = [path for path in unpacked.rglob("*") if path.is_file() and path.suffix not in (*WEIGHTS, ".png", ".pdf")]
    assert [path.name for path in files if any(place in path.read_bytes() for place in places)] == []


def test_of_weights_only_the_shipped_ones_are_in_it(unpacked: Path) -> None:
    found = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.suffix in WEIGHTS}
    assert found == {f"models/{name}.safetensors" for name in SHIPPED}


def test_the_packages_are_those_of_this_environment(unpacked: Path, archive: ModuleType) -> None:
    lines = (unpacked / archive.FREEZE).read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.+!-]+", line) for line in lines)
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(names) and "torch" in names and "chassis-utils" not in names


def test_without_a_commit_or_with_changes_it_is_one_sentence(
    archive: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="error: this is no git repository with a commit"):
        archive.main()
    author = ["-c", "user.name=a", "-c", "user.email=a@b.invalid"]
    (tmp_path / "old.txt").write_text("committed")
    for command in (["init", "-q"], ["add", "old.txt"], [*author, "commit", "-q", "-m", "a file"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "new.txt").write_text("not yet committed")
    with pytest.raises(SystemExit, match=r"error: new.txt is not as in the last commit"):
        archive.main()
