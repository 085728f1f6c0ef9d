"""What a notebook says about itself: its parameters, what it reads and writes, and the content behind its results.

Its code is parsed, never imported. `content` hashes all that decides a result: code, parameters, the package modules
reached by import, checkpoints, prompt files and the pinned versions. Cost: milliseconds, and the hashing of files.
"""

import ast
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

DEFAULT_PROFILE = "micro"  # the profile whose results are committed and stand in the paper

MODEL_PARAMETERS = ("base", "fft_base", "expert", "sibling", "trained")  # a folder or a hub id
PROMPT_FILES = ("_file", "outside")  # how the names of parameters end that name a file of prompts


class PlanError(ValueError):
    """A run cannot start: one sentence with the value, the reason and the remedy."""


@dataclass(frozen=True)
class Parameter:
    """One line of the parameters cell."""

    annotation: ast.expr
    default: Any

    @property
    def kind(self) -> str:
        """The declared type, as an error names it."""
        like = f" with entries as in {self.default}" if isinstance(self.default, list) else ""
        return ast.unparse(self.annotation) + like

    def fits(self, value: Any) -> bool:
        """Whether a value is of the declared type, and the entries of a list of that of the default's."""
        kinds = tuple({type(entry) for entry in self.default}) if isinstance(self.default, list) else ()
        if float in kinds:
            kinds += (int,)
        return _fits(value, self.annotation) and (not kinds or all(type(entry) in kinds for entry in value))

    def range_problem(self, value: Any) -> str | None:
        """Why a value of the right type cannot be meant: sizes, counts and divergences are finite and above zero."""
        least = self.default if isinstance(self.default, list) else [self.default]
        entries = value if isinstance(value, list) else [value]
        if not entries and least:
            return "which names nothing: give at least one entry"
        for entry in entries:
            if type(entry) is float and not math.isfinite(entry):
                return "which is not finite: give a number"
            if type(entry) in (int, float) and entry <= 0 and (entry < 0 or 0 not in least):
                return f"which is {'below' if 0 in least else 'not above'} zero: give a larger number"
        return None


@dataclass(frozen=True)
class Notebook:
    """A notebook's code, and what it says about itself."""

    path: Path
    cells: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> "Notebook":
        """Read the code cells; outputs and text play no part."""
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = [{**cell, "source": "".join(cell["source"])} for cell in cells if cell["cell_type"] == "code"]
        return cls(path, code)

    @property
    def code(self) -> str:
        """All code: what must change for the notebook to be run again."""
        return "\n\n".join(cell["source"] for cell in self.cells)

    @property
    def code_digest(self) -> str:
        """12 hex digits of the code alone."""
        return hashlib.sha256(self.code.encode()).hexdigest()[:12]

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed code."""
        return parse(self.code, self.path.name)

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """The lines of the parameters cell; each must be annotated and hold a literal."""
        tagged = [cell["source"] for cell in self.cells if "parameters" in cell["metadata"].get("tags", [])]
        declared = {}
        for line in parse("\n".join(tagged), self.path.name).body:
            match line:
                case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=ast.expr() as value):
                    declared[name] = Parameter(annotation, _literal(value, f"{self.path.name}: parameter {name}"))
                case _:
                    raise PlanError(
                        f"{self.path.name}: `{ast.unparse(line)}` in the parameters cell has no type: "
                        "write `name: type = value`, so that a profile's value can be checked"
                    )
        return declared

    @property
    def defaults(self) -> dict[str, Any]:
        """The value of each parameter where nothing sets it."""
        return {name: parameter.default for name, parameter in self.parameters.items()}

    def check(self, values: Mapping[str, Any], source: str) -> None:
        """Raise `PlanError` where `source` sets a parameter that this notebook lacks, or to what it cannot mean."""
        for name, value in values.items():
            if name not in self.parameters:
                raise PlanError(
                    f"{source} sets {name!r}, a parameter that {self.path.name} does not have: "
                    f"remove it or choose one of {', '.join(self.parameters)}"
                )
            if not self.parameters[name].fits(value):
                raise PlanError(
                    f"{source} sets {name!r} to {value!r:.200}, but {self.path.name} declares it "
                    f"as {self.parameters[name].kind}: give a value of that type"
                )
            problem = self.parameters[name].range_problem(value)
            if problem:
                raise PlanError(f"{source} sets {name!r} to {value!r:.200}, {problem}")
        chosen = self.defaults | dict(values)
        if "ablated" in chosen and chosen["ablated"] not in chosen["edits"]:
            raise PlanError(
                f"{source} leaves 'ablated' at {chosen['ablated']!r}, which is none of the edits {chosen['edits']}: "
                "set it to one of them"
            )
        if not re.fullmatch(r"[\w-]+", chosen.get("profile", DEFAULT_PROFILE)):
            raise PlanError(
                f"{source} sets 'profile' to {chosen['profile']!r:.200}, which names no folder of results: "
                "use letters, digits, - and _"
            )

    def names_given_to(self, function: str, position: int) -> list[str]:
        """The names in calls of `report.<function>`: literal strings, by position or as `name=`."""
        names = []
        for call in ast.walk(self.tree):
            if not isinstance(call, ast.Call) or ast.unparse(call.func).removeprefix("report.") != function:
                continue
            keyword = [argument.value for argument in call.keywords if argument.arg == "name"]
            (name,) = keyword or call.args[position : position + 1] or [call]
            if not isinstance(name, ast.Constant) or not isinstance(name.value, str):
                raise PlanError(
                    f"{self.path.name}: the name in `{ast.unparse(call)}` is computed: "
                    "write it as a literal string, so that the file is known before the notebook runs"
                )
            names.append(name.value)
        return names

    def inputs(self, root: Path, settings: Mapping[str, Any]) -> list[Path]:
        """The files behind its results: modules reached by import, files that `settings` name, pinned versions."""
        values = [*settings.values(), "constraints.txt"]  # other versions, other numbers
        named = {file for value in values for file in _input_files(root, value)}
        return [*reached(self.tree, root), *sorted(named)]

    def content(self, root: Path, settings: Mapping[str, Any]) -> str:
        """12 hex digits of all that decides its results under these parameters."""
        digest = hashlib.sha256(self.code.encode())
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        for path in self.inputs(root, settings):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:12]


def numbered_notebooks(root: Path) -> list[Path]:
    """The notebooks of the paper, in order."""
    return sorted((root / "notebooks").glob("[0-9]*.ipynb"))


def parse(source: str, where: str) -> ast.Module:
    """Parse Python, with a readable error."""
    try:
        return ast.parse(source)
    except SyntaxError as error:
        raise PlanError(f"{where}: {(error.text or '').strip()!r} is not Python ({error.msg}): correct it") from None


def reached(tree: ast.AST, root: Path) -> list[Path]:
    """Every package file that `tree` imports, directly or through others."""
    waiting, seen = _imports(tree, root), set[Path]()
    while waiting:
        file = waiting.pop()
        seen.add(file)
        waiting |= _imports(parse(file.read_text(encoding="utf-8"), file.name), root) - seen
    return sorted(seen)


def _imports(tree: ast.AST, root: Path) -> set[Path]:
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    parts = [name.split(".") for name in names if name.split(".")[0] == "chassis_utils"]
    modules = {root.joinpath(*part[:depth]) for part in parts for depth in range(1, len(part) + 1)}
    files = {file for module in modules for file in (module.with_suffix(".py"), module / "__init__.py")}
    return {file for file in files if file.is_file()}


def _input_files(root: Path, value: Any) -> Iterator[Path]:
    for name in value if isinstance(value, list) else [value]:
        if not isinstance(name, str) or not name:
            continue
        path = root / name
        if os.path.isdir(path):
            yield from (file for file in path.iterdir() if file.suffix in (".safetensors", ".json", ".txt"))
        elif os.path.isfile(path):
            yield path


def _literal(value: ast.expr, where: str) -> Any:
    try:
        return ast.literal_eval(value)
    except ValueError:
        raise PlanError(f"{where} is `{ast.unparse(value)}`, which is computed: write a literal value") from None


def _fits(value: Any, annotation: ast.expr) -> bool:
    match annotation:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _fits(value, left) or _fits(value, right)
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return isinstance(value, list) and all(_fits(entry, item) for entry in value)
        case ast.Constant(value=None):
            return value is None
        case ast.Name(id="float"):
            return type(value) in (int, float)
        case _:
            return type(value).__name__ == ast.unparse(annotation)
