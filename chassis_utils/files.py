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
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

ROOT = Path(__file__).resolve().parent.parent  # of the repository, where the package runs from one
IN_REPOSITORY = (ROOT / "pyproject.toml").is_file()  # an installed wheel has no repository around it
BUILD = ROOT / "build" if IN_REPOSITORY else user_cache_path("chassis-utils")
CACHE = BUILD / "cache"
MODELS = ROOT / "models"
LONGEST_NAME = 255  # bytes of a file's name on common file systems


def locate(name: str | Path) -> Path:
    """The file or folder of that name: from the working directory, else from the repository root.

    Where neither is there, the path from the working directory is returned, for the caller to refuse.
    """
    here = Path(os.path.expanduser(name))  # unlike Path's, leaves an unknown `~user` as it is
    if os.path.exists(here) or not IN_REPOSITORY:  # unlike `Path.exists`, false for a name that is too long
        return here
    shipped = ROOT / here
    return shipped if os.path.exists(shipped) else here


def require_folder(path: str | Path) -> None:
    """Raise `OSError` unless `path` is a folder that files can be written to, or can be made one; nothing is made."""
    whole = Path(path).absolute()
    there = next(place for place in (whole, *whole.parents) if os.path.exists(place))
    if not there.is_dir() or not os.access(there, os.W_OK) or len(os.fsencode(whole.name)) > LONGEST_NAME:
        raise OSError(
            f"no folder can be made at {str(path)[:200]!r}: name one that is not there yet, or can be written to"
        )


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Write `content` (text as UTF-8) to `path` in one move; folders are made, errors raised as by `write_together`."""
    write_together({path: content})
    return path


def write_together(files: Mapping[Path, str | bytes], remedy: str = "make room, or name another folder") -> None:
    """Write files that belong together (text as UTF-8); folders are made as needed.

    All of them are written beside their places before the first is moved, so a full disk leaves every former file.
    Raises `OSError`, one sentence with `remedy`, where a file cannot be written.
    """
    written: dict[Path, str] = {}
    path = Path()
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, written[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode("utf-8") if isinstance(content, str) else content)
            os.chmod(written[path], 0o644)
        for path in files:
            os.replace(written[path], path)
    except OSError as error:
        raise OSError(
            f"{path.parent.name}/{path.name} could not be written ({error.strerror or error}): {remedy}; "
            "the former file is unchanged"
        ) from error
    finally:
        for name in written.values():
            Path(name).unlink(missing_ok=True)


def cached(path: Path, make: Callable[[], bytes]) -> bytes:
    """What `make` gives, stored at `path` the first time; who asks at the same time waits for it.

    Raises `OSError`, one sentence, where the cache cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock")).acquire()
    except OSError as error:
        raise OSError(
            f"the cache {str(path.parent)!r} cannot be written ({error.strerror}): make it a folder that can be"
        ) from error
    with lock:
        payload = _read_checked(path)
        if payload is None:
            payload = make()
            write_together(
                {path: hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload},
                f"make room where {str(path.parent)!r} lies, or make it a folder that can be written",
            )
        return payload


def _read_checked(path: Path) -> bytes | None:
    """What `cached` stored; None where there is no such file, or it has been damaged, which is said."""
    if not path.is_file():
        return None
    digest, _, payload = path.read_bytes().partition(b"\n")
    if hashlib.sha256(payload).hexdigest().encode() == digest:
        return payload
    warnings.warn(f"{path.name} in the cache is damaged: it is made anew", stacklevel=3)
    return None
