"""Natural text that every installation already has: the docstrings of the pinned packages.

Nothing is committed and nothing is downloaded: the text is read from the installed
sources with `ast`, which never imports them. A document is one docstring. Its part
(`train`, `val` or `test`) is decided by a hash of its content: the same everywhere,
whatever the order of reading; equal docstrings count once.

Cost: about half a minute on two cores the first time, then one read of `build/cache/`.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from chassis_utils.files import CACHE, ROOT, cached

PACKAGES = {  # import name -> licence, as each distribution declares it; the slow ones first
    "transformers": "Apache-2.0",
    "torch": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "scipy": "BSD-3-Clause",
    "pandas": "BSD-3-Clause",
    "matplotlib": "PSF-based",
    "numpy": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
    "peft": "Apache-2.0",
    "IPython": "BSD-3-Clause",
    "seaborn": "BSD-3-Clause",
}
SHORTEST = 200  # characters; shorter docstrings are mostly one-line labels
HELD_OUT_SHARE = 0.06  # half of it `val`, half `test`
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Document:
    """One docstring."""

    text: str

    @cached_property
    def key(self) -> str:
        """16 hex digits of the content's hash: the document's name and its fold."""
        return content_key(self.text)

    @cached_property
    def paragraphs(self) -> frozenset[str]:
        """Its paragraphs, outer white space removed."""
        return frozenset(part.strip() for part in re.split(r"\n\s*\n", self.text))

    @property
    def part(self) -> str:
        """`train`, `val` or `test`, from the content hash alone."""
        share = int(self.key, 16) / 16**16
        if share >= HELD_OUT_SHARE:
            return "train"
        return "val" if share < HELD_OUT_SHARE / 2 else "test"


def content_key(text: str) -> str:
    """First 16 hex digits of the SHA-256 of `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def package_versions() -> dict[str, str]:
    """Installed version of every package whose docstrings are read."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in PACKAGES}  # no "+cpu"


def read_documents(part: str) -> list[Document]:
    """The documents of one part, in a fixed order.

    Raises `ValueError` for an unknown part and `ModuleNotFoundError` for a missing package.
    """
    if part not in PARTS:
        raise ValueError(f"part {part!r} is unknown: use one of {', '.join(PARTS)}")
    recipe = json.dumps([package_versions(), SHORTEST])
    stored = CACHE / f"corpus-{content_key(recipe)}"
    documents = map(Document, json.loads(cached(stored, _read_all)))
    return [document for document in documents if document.part == part]


def read_texts(folder: Path) -> list[Document]:
    """The text files (`*.txt`, UTF-8) of a folder, each a document; `ValueError` where there are none that can be read.

    The order is that of their content's hash, whatever the files are called.
    """
    documents = {}
    for path in folder.glob("*.txt"):
        try:
            document = Document(path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path.name} is no UTF-8 text, see its byte {error.start}: save it as UTF-8") from None
        documents[document.key] = document
    if len(documents) < 2:
        raise ValueError(
            f"folder {folder.name!r} holds {len(documents)} different texts (*.txt), too few to hold some out: "
            "put each document into a file of its own"
        )
    return [documents[key] for key in sorted(documents)]


def read_unseen(part: str) -> list[Document]:
    """The documents of a held-out part none of whose paragraphs occurs in a training document.

    Docstrings borrow paragraphs from each other; what is said to be held out shares none.
    """
    known = {paragraph for document in read_documents("train") for paragraph in document.paragraphs}
    return [document for document in read_documents(part) if not known & document.paragraphs]


def package_docstrings(package: str) -> list[str]:
    """Docstrings of `SHORTEST` characters or more in an installed package's source, tests left out."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"package {package!r} is read for its docstrings but is not installed: install it")
    root = Path(spec.origin).parent
    files = [path for path in sorted(root.rglob("*.py")) if not {"tests", "testing"} & {*path.relative_to(root).parts}]
    return [text for path in files for text in _file_docstrings(path) if len(text) >= SHORTEST]


def _read_all() -> bytes:
    """All docstrings as JSON."""
    with ThreadPoolExecutor(2) as pool:
        texts = [text for package in pool.map(_read_apart, PACKAGES) for text in package]
    return json.dumps(list(dict.fromkeys(texts))).encode()


def _read_apart(package: str) -> list[str]:
    """`package_docstrings` in a process of its own.

    It runs this module and not the user's script, which workers of `multiprocessing` would run once more.
    """
    command = [sys.executable, "-m", __name__, package]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
    if done.returncode:
        raise ModuleNotFoundError(done.stderr.strip().rpartition("\n")[2].partition(": ")[2])
    return json.loads(done.stdout)


def _file_docstrings(path: Path) -> list[str]:
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid escapes in other people's strings
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # templates, and sources for other Python versions
        return []
    docstrings: list[str | None] = []
    waiting: list[ast.Module | Definition] = [tree]
    while waiting:
        node = waiting.pop()
        docstrings.append(ast.get_docstring(node))
        waiting += [inner for inner in reversed(node.body) if isinstance(inner, Definition)]
    return [text for text in docstrings if text]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(package_docstrings(sys.argv[1])))  # ASCII, whatever the terminal's encoding
