"""Where files lie, and the one way in which they are replaced.

A name that a user gives is looked up from the working directory, as by every library. Notebooks, which run from
any working directory, name what the repository ships by its path from the repository root: such a name is looked up
there second. Files are written beside their place and moved into it, so a reader never meets half a file and an
interrupted run leaves the last good one.
"""

import hashlib
import os
import tempfile
import warnings
from pathlib import Path

from platformdirs import user_cache_path

ROOT = Path(__file__).resolve().parent.parent  # of the repository, where the package runs from one
IN_REPOSITORY = (ROOT / "pyproject.toml").is_file()  # an installed wheel has no repository around it
BUILD = ROOT / "build" if IN_REPOSITORY else user_cache_path("chassis-utils")
CACHE = BUILD / "cache"
MODELS = ROOT / "models"


def locate(name: str | Path) -> Path:
    """The file or folder of that name: from the working directory, else from the repository root.

    Where neither is there, the path from the working directory is returned, for the caller to refuse.
    """
    here = Path(name).expanduser()
    if here.exists() or not IN_REPOSITORY:
        return here
    shipped = ROOT / here
    return shipped if shipped.exists() else here


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Write `content` (text as UTF-8) to `path` in one move; folders are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    path.chmod(0o644)
    return path


def write_checked(path: Path, payload: bytes) -> None:
    """Write `payload` behind its SHA-256, for `read_checked`."""
    write_atomically(path, hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)


def read_checked(path: Path) -> bytes | None:
    """What `write_checked` wrote; None where there is no such file, or it has been damaged, which is said."""
    if not path.is_file():
        return None
    digest, _, payload = path.read_bytes().partition(b"\n")
    if hashlib.sha256(payload).hexdigest().encode() == digest:
        return payload
    warnings.warn(f"{path.name} in the cache is damaged: it is made anew", stacklevel=2)
    return None
