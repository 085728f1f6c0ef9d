"""Where things live, all relative to the repository root, and the one way files are replaced.

A notebook runs from any working directory: paths are found from this file, never from
the current folder. Files are written beside their place and moved into it, so a reader
never meets half a file and an interrupted run leaves the last good one.
"""

import os
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
CACHE = BUILD / "cache"
MODELS = ROOT / "models"


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
