"""The paper, its results and its environment in one file, described for machines: `make archive`.

`build/archive/chassis-<version>.zip` holds every file of the last commit and `pip-freeze.txt`, the packages of this
environment. `ro-crate-metadata.json` follows RO-Crate 1.1: each file with a description and its SHA-256, and for each
notebook and profile an action that names what it read and which results it made. The same commit and the same packages
give the same bytes. Cost: seconds.
"""

import hashlib
import io
import json
import mimetypes
import os
import subprocess
import sys
import tarfile
import zipfile
from ast import get_docstring, parse
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import distributions
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from packaging.utils import canonicalize_name

from chassis_utils.files import BUILD, ROOT, write_atomically
from chassis_utils.paper import checksums
from chassis_utils.paper.plan import COMMITTED, result_folders

Entity = dict[str, Any]
METADATA, FREEZE = "ro-crate-metadata.json", "pip-freeze.txt"
CONTEXT = ["https://w3id.org/ro/crate/1.1/context", {"sha256": "http://schema.org/sha256"}]
AUTHORS, PIPELINE = "#authors", "notebooks/task_notebooks.py"
LICENCES = {"MIT": "MIT License", "Apache-2.0": "Apache License 2.0"}  # by their names at spdx.org
# all else is under that of the repository
OWN_LICENCE = dict.fromkeys(("models/smollm2-arithmetic/", "models/smollm2-french/"), "Apache-2.0")
RESULT_ENDINGS = (".csv", ".tex", ".md", ".pdf", ".png", ".json")
STORED = (".safetensors", ".png", ".pdf")  # compressed already
TYPES = {".ipynb": "application/x-ipynb+json", ".typ": "text/plain", ".bib": "application/x-bibtex"} | {
    ".md": "text/markdown",
    ".yaml": "application/yaml",
    ".yml": "application/yaml",
    ".cff": "application/yaml",
    ".toml": "application/toml",
    ".safetensors": "application/octet-stream",
}
DESCRIPTIONS = {  # what says nothing of itself; the first pattern that matches
    FREEZE: "The packages of the environment that wrote this archive, with their versions",
    "README.md": "What this is, its findings, and how to run it",
    "CONTRIBUTING.md": "How to add an expert, a bridge, a notebook or a profile",
    "CHANGELOG.md": "What each version contains",
    "CITATION.cff": "How to cite this work",
    "LICENSE": "The licence of this work",
    "Makefile": "The commands: paper, check, test and others",
    "pyproject.toml": "The package, its dependencies, and the settings of its checks",
    "constraints.txt": "The exact version of every package, for pip",
    "environment.yml": "The same environment for conda",
    ".ci/*": "All checks from a fresh clone",
    ".*": "Settings of the tools that keep the repository clean",
    "paper/paper.pdf": "The article and its appendix",
    "paper/checksums.txt": "SHA-256 of every result as the last run put it in place, for sha256sum -c",
    "paper/references.bib": "What the article cites",
    "paper/paper.typ": "The article, in Typst",
    "paper/details.typ": "The appendix of the article, in Typst",
    "paper/*.typ": "Functions by which the article takes its numbers from the tables, in Typst",
    "paper/reported/*": "What the earlier studies reported",
    "notebooks/profiles/*": "A profile: parameters for all notebooks",
    "notebooks/prompts/*": "Prompts, one a line",
    "notebooks/questions/*": "Topics and forms of questions, one a line",
    "models/*/README.md": "Model card",
    "models/*/*config.json": "Configuration of a shipped model",
    "models/*/tokenizer.json": "Tokenizer of a shipped model",
    "models/*/*.safetensors": "Weights of a shipped model",
    "paper/*": "A file that the article is made with",
    "notebooks/*": "A file beside the notebooks",
    "tests/*": "A file that tests read",
    "*": "A file of the repository",
}


@dataclass(frozen=True)
class Snapshot:
    """A commit: its files by name, which of them can be executed, its hash and its time."""

    files: dict[str, bytes]
    executable: frozenset[str]
    commit: str
    when: tuple[int, int, int, int, int, int]

    @classmethod
    def of(cls, root: Path, revision: str = "HEAD") -> "Snapshot":
        """Of a repository; `subprocess.CalledProcessError` where git does not know the revision."""
        packed = _git(root, "archive", "--format=tar", revision)
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            members = [(member, tar.extractfile(member)) for member in tar if member.isfile()]
            files = {member.name: file.read() for member, file in members if file}
        executable = frozenset(member.name for member, _ in members if member.mode & 0o100)
        form = ("--date=format-local:%Y %m %d %H %M %S", "--format=%H %cd")
        commit, *when = _git(root, "log", "-1", *form, revision).decode().split()
        year, month, day, hour, minute, second = map(int, when)
        return cls(files, executable, commit, (year, month, day, hour, minute, second))

    def json(self, name: str) -> Any:
        """A file as JSON."""
        return json.loads(self.files[name])


def main() -> None:
    """Write the archive of the last commit, or say in one sentence why not."""
    try:
        snapshot = Snapshot.of(ROOT)
        changed = _git(ROOT, "status", "--porcelain").decode().splitlines()
    except (subprocess.CalledProcessError, FileNotFoundError):
        sys.exit("error: this is no git repository with a commit: the archive is made of a commit, clone one")
    if changed:
        sys.exit(f"error: {changed[0][3:]} is not as in the last commit, which the archive is made of: commit it first")
    if altered := checksums.altered(ROOT):
        sys.exit(f"error: {altered[0]} is not what a run has put in place: run `make paper` and commit what it changes")
    content = build(snapshot, freeze())
    version = yaml.safe_load(snapshot.files["CITATION.cff"])["version"]
    path = write_atomically(BUILD / "archive" / f"chassis-{version}.zip", content)
    print(f"{path.relative_to(ROOT)}  {len(content) / 1e6:.0f} MB  sha256 {hashlib.sha256(content).hexdigest()}")


def freeze() -> str:
    """The packages of this environment as `pip freeze` lists them, without this one, which would name its folder."""
    found = {canonicalize_name(each.metadata["Name"]): each.version for each in distributions()}
    return "".join(f"{name}=={version}\n" for name, version in sorted(found.items()) if name != "chassis-utils")


def build(snapshot: Snapshot, packages: str) -> bytes:
    """The archive: equal bytes for an equal commit and equal packages."""
    files = snapshot.files | {FREEZE: packages.encode()}
    text = json.dumps(metadata(snapshot, files), indent=1, ensure_ascii=False) + "\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in sorted({**files, METADATA: text.encode()}.items()):
            entry = zipfile.ZipInfo(name, snapshot.when)
            entry.create_system = 3  # Unix, whatever this runs on, so that the modes hold
            entry.external_attr = (0o100755 if name in snapshot.executable else 0o100644) << 16
            entry.compress_type = zipfile.ZIP_STORED if name.endswith(STORED) else zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return buffer.getvalue()


def metadata(snapshot: Snapshot, files: dict[str, bytes]) -> Entity:
    """The RO-Crate of these files."""
    citation = yaml.safe_load(files["CITATION.cff"])
    models = sorted({f"{PurePosixPath(name).parent}/" for name in files if fnmatch(name, "models/*/*")})
    described = [_file(snapshot, name, content) for name, content in sorted(files.items())]
    actions = list(_actions(snapshot))
    (authors,) = citation["authors"]
    root = {
        "@id": "./",
        "@type": "Dataset",
        "name": citation["title"],
        "description": f"{' '.join(citation['abstract'].split())} Made from commit {snapshot.commit}.",
        "version": str(citation["version"]),
        "datePublished": str(citation["date-released"]),
        "keywords": ", ".join(citation["keywords"]),
        "license": _ref(_spdx(citation["license"])),
        "author": _ref(AUTHORS),
        "publisher": _ref(AUTHORS),
        "mainEntity": _ref("paper/paper.pdf"),
        "hasPart": [*map(_ref, models), *(_ref(entity["@id"]) for entity in described)],
        "mentions": [_ref(action["@id"]) for action in actions],
    }
    return {
        "@context": CONTEXT,
        "@graph": [
            {
                "@id": METADATA,
                "@type": "CreativeWork",
                "conformsTo": _ref("https://w3id.org/ro/crate/1.1"),
                "about": _ref("./"),
            },
            root,
            {"@id": AUTHORS, "@type": "Organization", "name": authors["name"]},
            *(
                {"@id": _spdx(key), "@type": "CreativeWork", "name": name, "identifier": key}
                for key, name in LICENCES.items()
            ),
            *(_model(folder, files) for folder in models),
            *described,
            *actions,
        ],
    }


def _file(snapshot: Snapshot, name: str, content: bytes) -> Entity:
    suffix = PurePosixPath(name).suffix
    own = [licence for folder, licence in OWN_LICENCE.items() if name.startswith(folder)]
    entity: Entity = {
        "@id": name,
        "@type": ["File", "SoftwareSourceCode"] if suffix in (".py", ".ipynb", ".typ") else "File",
        "name": PurePosixPath(name).name,
        "description": _description(snapshot, name),
        "encodingFormat": TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "text/plain",
        "contentSize": str(len(content)),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return entity | ({"license": _ref(_spdx(own[0]))} if own else {})


def _description(snapshot: Snapshot, name: str) -> str:
    """One sentence on a file: from itself, from the provenance beside it, or from `DESCRIPTIONS`."""
    path, content = PurePosixPath(name), snapshot.files.get(name, b"")
    beside = str(path.with_suffix(".json"))
    if fnmatch(name, "notebooks/*.ipynb"):
        return "".join(json.loads(content)["cells"][0]["source"]).splitlines()[0].removeprefix("# ")
    if path.suffix == ".py" and (documented := get_docstring(parse(content))):
        return documented.splitlines()[0]
    if path.parts[:2] == ("paper", "tables") or path.parts[0] == "figures":
        source = snapshot.json(beside)
        kind = "Provenance of the" if name == beside else "The"
        what = "figure" if path.parts[0] == "figures" else "table"
        alt = f": {source['alt']}" if "alt" in source else ""
        return f"{kind} {what} {path.stem} of notebook {source['notebook']}, profile {source['profile']}{alt}"
    if fnmatch(name, "docs/*.md") or name.endswith("ARCHITECTURES.md"):
        return content.decode().splitlines()[0].removeprefix("# ")
    return next(text for pattern, text in DESCRIPTIONS.items() if fnmatch(name, pattern))


def _model(folder: str, files: dict[str, bytes]) -> Entity:
    card = files[f"{folder}README.md"].decode().split("\n\n")[1]
    licence = OWN_LICENCE.get(folder)
    entity = {
        "@id": folder,
        "@type": "Dataset",
        "name": PurePosixPath(folder).name,
        "description": " ".join(card.split()),
        "hasPart": [_ref(name) for name in sorted(files) if name.startswith(folder)],
    }
    return entity | ({"license": _ref(_spdx(licence))} if licence else {})


def _actions(snapshot: Snapshot) -> Iterator[Entity]:
    """What made the results: each notebook under each profile, and the compilation of the article."""
    results: list[str] = []
    for profile in COMMITTED:
        folders = [folder.relative_to(ROOT).as_posix() for folder in result_folders(ROOT, profile)]
        beside = [
            name
            for name in sorted(snapshot.files)
            if str(PurePosixPath(name).parent) in folders and name.endswith(".json")
        ]
        by_notebook: dict[str, list[str]] = {}
        for name in beside:
            by_notebook.setdefault(snapshot.json(name)["notebook"], []).append(name)
        for notebook, names in sorted(by_notebook.items()):
            made = [
                product
                for name in names
                for end in RESULT_ENDINGS
                if (product := str(PurePosixPath(name).with_suffix(end))) in snapshot.files
            ]
            results += made
            yield _run(snapshot, profile, notebook, names, made)
    sources = [name for name in sorted(snapshot.files) if fnmatch(name, "paper/*.typ") or fnmatch(name, "paper/*.bib")]
    reported = [name for name in sorted(snapshot.files) if name.startswith("paper/reported/")]
    yield {
        "@id": "#paper",
        "@type": "CreateAction",
        "name": "The article compiled from its sources and the results",
        "agent": _ref(AUTHORS),
        "instrument": _ref(PIPELINE),
        "object": [_ref(name) for name in (*sources, *reported, *results)],
        "result": _ref("paper/paper.pdf"),
    }


def _run(snapshot: Snapshot, profile: str, notebook: str, names: list[str], made: list[str]) -> Entity:
    sources = [snapshot.json(name) for name in names]
    models = list(dict.fromkeys(model for source in sources for model in source["models"]))
    versions = sorted({" ".join(f"{k} {v}" for k, v in source["versions"].items()) for source in sources})
    shipped = [f"{model}/" for model in models if f"{model}/README.md" in snapshot.files]
    return {
        "@id": f"#{notebook}-{profile}",
        "@type": "CreateAction",
        "name": f"Notebook {notebook} run with profile {profile}",
        "description": f"Models: {', '.join(models) or 'none'}. Versions: {'; '.join(versions)}. "
        f"Hash of code, parameters and inputs: {', '.join(sorted({source['content'] for source in sources}))}",
        "agent": _ref(AUTHORS),
        "instrument": [_ref(f"notebooks/{notebook}.ipynb"), _ref(PIPELINE)],
        "object": [*map(_ref, shipped), _ref(f"notebooks/profiles/{profile}.yaml"), _ref("constraints.txt")],
        "result": [_ref(name) for name in made],
    }


def _ref(identifier: str) -> Entity:
    return {"@id": identifier}


def _spdx(licence: str) -> str:
    return f"https://spdx.org/licenses/{licence}"


def _git(root: Path, *arguments: str) -> bytes:
    """What git prints, in UTC; only of a repository that begins at `root`."""
    environment = os.environ | {"TZ": "UTC", "GIT_CEILING_DIRECTORIES": str(root.parent)}
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=True, env=environment).stdout


if __name__ == "__main__":
    main()
