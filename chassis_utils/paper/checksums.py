"""The list of checksums of what is committed: an edit by hand of a result shows without a run.

`paper/checksums.txt` is in the format of `sha256sum`: `sha256sum -c paper/checksums.txt` compares too. A run records
what it puts in place and what the paper is compiled from, `make refresh` the notebooks. After a deliberate change by
hand, of the tables that the earlier studies reported for example, `python -m chassis_utils.paper.checksums` takes all
files as they are.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from chassis_utils.files import ROOT, write_atomically

LIST = "paper/checksums.txt"
PAPER = ("paper/*.typ", "paper/*.bib", "paper/paper.pdf")
LISTED = (*PAPER, "paper/reported/*", "paper/tables/**/*.*", "figures/**/*.*", "notebooks/[0-9]*.ipynb")


def altered(root: Path) -> list[str]:
    """The files, by their path from `root`, that are not what was recorded: changed, missing or never recorded."""
    recorded, found = _recorded(root), _found(root)
    return sorted(name for name in recorded | found if recorded.get(name) != found.get(name))


def record(root: Path, paths: Iterable[Path]) -> None:
    """Write the checksums of those of `paths` that belong on the list; all others stay as they were recorded."""
    places = {path.relative_to(root).as_posix() for path in paths}
    recorded = {name: digest for name, digest in _recorded(root).items() if name not in places}
    recorded |= {name: digest for name, digest in _found(root).items() if name in places}
    lines = [f"{digest}  {name}\n" for name, digest in sorted(recorded.items())]
    write_atomically(root / LIST, "".join(lines))


def _recorded(root: Path) -> dict[str, str]:
    if not (root / LIST).exists():
        return {}
    pairs = (line.split("  ", 1) for line in (root / LIST).read_text(encoding="utf-8").splitlines())
    return {name: digest for digest, name in pairs}


def _found(root: Path) -> dict[str, str]:
    files = {path for pattern in LISTED for path in root.glob(pattern) if not path.name.startswith(".")}
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    record(ROOT, [ROOT / name for name in altered(ROOT)])
