"""Random damage to good files, decided by a seed; and how an error of this package is told from any other."""

import copy
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from chassis_utils.files import ROOT
from chassis_utils.paper.notebook import PlanError

OWN = (ValueError, TypeError, OSError, PlanError)  # and none of their other subclasses, which libraries raise
ODD = (None, True, -1, 0, 2**40, 1.5, float("nan"), "", "x", "\ud800", "\0", [], [[]], {}, {"type": "x"})
BYTES = (
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\0",
    b"\r",
    b"\n\n",
    b": ",
    b"- ",
    b"[",
    b"}",
    b'"',
    b"&a ",
    b"*a",
    b"!!int ",
    b"9",
)


def damaged(good: bytes, seed: int) -> bytes:
    """One to four cuts, repetitions, flips and insertions."""
    rng, content = Random(seed), bytearray(good)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice((1, 2, 8, 64)))
        kind = rng.choice(("cut", "cut off", "repeat", "flip", "insert", "odd"))
        if kind == "cut":
            del content[start:end]
        elif kind == "cut off":
            del content[max(start, len(content) // 2) :]
        elif kind == "repeat":
            content[start:start] = content[start:end] * rng.choice((1, 3))
        elif kind == "flip":
            content[start:end] = rng.randbytes(end - start)
        else:
            content[start:start] = rng.randbytes(end - start) if kind == "insert" else rng.choice(BYTES)
    return bytes(content)


def deformed(good: Any, seed: int) -> Any:
    """A copy of a JSON value with one to three entries replaced, removed, renamed or added."""
    rng, whole = Random(seed), copy.deepcopy(good)
    for _ in range(rng.randint(1, 3)):
        place = whole
        while True:  # down to a random depth, so that shallow entries come up as often as those of long lists
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            inner = [key for key in keys if isinstance(place[key], dict | list) and place[key]]
            if not inner or rng.random() < 0.4:
                break
            place = place[rng.choice(inner)]
        key = rng.choice(keys)
        kind = rng.choice(("replace", "replace", "remove", "rename", "swap"))
        if kind == "replace":
            place[key] = copy.deepcopy(rng.choice(ODD))
        elif kind == "remove":
            del place[key]
        elif kind == "rename" and isinstance(place, dict):
            place["renamed"] = place.pop(key)
        else:
            place[key] = copy.deepcopy(place[rng.choice(keys)])
        if not whole:
            break
    return whole


def as_json(value: Any) -> bytes:
    """The bytes of a JSON file."""
    return json.dumps(value).encode()


def problem(call: Callable[[], object]) -> str | None:
    """What is wrong with how a call ends: it may succeed, or end in one sentence that this package has raised."""
    try:
        call()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raised_here = Path(last.filename).is_relative_to(ROOT / "chassis_utils") and (last.line or "").startswith(
            "raise "
        )
        sentence, text = str(error), f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {error}"
        reason, _, remedy = sentence.rpartition(": ")
        good = type(error) in OWN and raised_here and "\n" not in sentence and reason and len(remedy.split()) > 1
        return None if good else text
    return None
