"""What a run of the paper consists of: one step per notebook, with all that it reads and writes.

A notebook declares itself. Its code is parsed, never imported, and tells
- the parameters, typed, from the cell tagged `parameters`;
- the package modules it reaches by import, directly or through others;
- the tables and figures it writes, and the tables of other notebooks that it reads;
- the checkpoints it loads: parameters that name a file or folder of the repository.
A profile (`notebooks/profiles/*.yaml`) sets parameters and nothing else. Whatever is wrong
is one sentence, said before anything runs.

Cost of a plan: milliseconds per notebook. Nothing heavy is imported before a step is executed.
"""

import ast
import json
import os
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from chassis_utils.paths import write_atomically

PAPER_PROFILE = "micro"  # the profile whose results are committed and stand in the paper
TABLE_SUFFIXES = (".csv", ".tex", ".md", ".json")  # the last one is the provenance
FIGURE_SUFFIXES = (".pdf", ".png", ".json")
PAPER_DATE = 1_767_225_600  # 2026-01-01, so that equal content compiles to equal bytes


class PlanError(ValueError):
    """The run cannot start: one sentence with the value, the reason and the remedy."""


class StepFailed(RuntimeError):
    """A notebook did not finish: the cell, its source and its error."""


@dataclass(frozen=True)
class Parameter:
    """One line of the parameters cell."""

    annotation: ast.expr
    default: Any


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

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed code."""
        return parse(self.code, self.path.name)

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """The lines of the parameters cell; each must be annotated and hold a literal."""
        tagged = [cell["source"] for cell in self.cells if "parameters" in cell["metadata"].get("tags", [])]
        found = {}
        for line in parse("\n".join(tagged), self.path.name).body:
            match line:
                case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=ast.expr() as value):
                    found[name] = Parameter(annotation, _literal(value, f"{self.path.name}: parameter {name}"))
                case _:
                    raise PlanError(
                        f"{self.path.name}: `{ast.unparse(line)}` in the parameters cell has no type: "
                        "write `name: type = value`, so that a profile's value can be checked"
                    )
        return found

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


@dataclass(frozen=True)
class Step:
    """One notebook under one profile."""

    notebook: Path
    code: str
    parameters: dict[str, Any]  # those that the profile sets
    reads: list[Path]  # modules, checkpoints, tables
    writes: list[Path]  # tables and figures, the executed notebook last
    staging: Path  # where they are written until the whole notebook has succeeded

    def staged(self, product: Path) -> Path:
        """Where `product` waits to be moved into place."""
        return self.staging / product.parent.name / product.name


def plan(root: Path, profile: str) -> list[Step]:
    """The steps of a run, in the order of the notebooks' names.

    Raises `PlanError` for an unknown profile, an unknown or mistyped parameter, a file that two
    notebooks write, and a table that nobody writes.
    """
    notebooks = [Notebook.read(path) for path in sorted((root / "notebooks").glob("*.ipynb"))]
    values = read_profile(root / "notebooks" / "profiles", profile)
    check_parameters(notebooks, values, profile)
    imports = {file: _imported(root, file) for file in (root / "chassis_utils").rglob("*.py")}
    steps = [_step(root, profile, notebook, values, imports) for notebook in notebooks]
    writers: dict[Path, str] = {}
    for step in steps:
        for path in step.writes:
            if path in writers:
                raise PlanError(
                    f"{path.relative_to(root)} is written by {writers[path]} and by {step.notebook.name}: "
                    "give one of the two another name"
                )
            writers[path] = step.notebook.name
    for step in steps:
        for path in step.reads:
            if path not in writers and not path.exists():
                raise PlanError(
                    f"{step.notebook.name} reads {path.relative_to(root)}, which is not there "
                    "and which no notebook writes: check the name"
                )
    return steps


def read_profile(folder: Path, profile: str) -> dict[str, Any]:
    """The parameters that a profile sets."""
    path = folder / f"{profile}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise PlanError(f"profile {profile!r} is unknown: choose one of {known}, or add {profile}.yaml beside them")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise PlanError(f"{path.name} holds {values!r}: a profile is a mapping of parameters to values")
    return values


def check_parameters(notebooks: list[Notebook], values: dict[str, Any], profile: str) -> None:
    """Refuse values for parameters that no notebook has, and values of another type."""
    known = sorted({name for notebook in notebooks for name in notebook.parameters})
    for name, value in values.items():
        if name not in known:
            raise PlanError(
                f"profile {profile!r} sets {name!r}, a parameter that no notebook has: "
                f"remove it or choose one of {', '.join(known)}"
            )
        for notebook in notebooks:
            parameter = notebook.parameters.get(name)
            if parameter and not _fits(value, parameter.annotation):
                raise PlanError(
                    f"profile {profile!r} sets {name!r} to {value!r}, but {notebook.path.name} declares it "
                    f"as {ast.unparse(parameter.annotation)}: give a value of that type"
                )


def reached(tree: ast.AST, root: Path, imports: dict[Path, set[Path]]) -> list[Path]:
    """Every package file that `tree` imports, directly or through others."""
    waiting, found = _imports(tree, root), set[Path]()
    while waiting:
        file = waiting.pop()
        found.add(file)
        waiting |= imports[file] - found
    return sorted(found)


def run_notebook(step: Step) -> None:
    """Execute the notebook in its staging folder, then move all results into place at once.

    Raises `StepFailed` and leaves the earlier results as they were when a cell fails or a
    declared result is missing.
    """
    import papermill  # seconds to import: only here, where a notebook really runs
    from papermill.exceptions import PapermillExecutionError

    shutil.rmtree(step.staging, ignore_errors=True)
    executed = step.staged(step.writes[-1])
    executed.parent.mkdir(parents=True)
    os.environ["CHASSIS_RESULTS"] = str(step.staging)
    quiet = {"progress_bar": False, "record_timing": False, "extra_arguments": ["--IPKernelApp.log_level=40"]}
    try:
        papermill.execute_notebook(step.notebook, executed, step.parameters, coalesce_streams=True, **quiet)
    except PapermillExecutionError as error:
        cell = textwrap.indent(error.source, "    ")
        raise StepFailed(f"{error.ename}: {error.evalue}\n\n{cell}\n\n(cell [{error.exec_count}])") from None
    missing = [product.name for product in step.writes if not step.staged(product).exists()]
    if missing:
        raise StepFailed(f"the notebook ended without writing {', '.join(missing)}")
    for product in step.writes:
        product.parent.mkdir(parents=True, exist_ok=True)
        os.replace(step.staged(product), product)
    shutil.rmtree(step.staging)


def compile_paper(root: Path) -> None:
    """Compile `paper/paper.typ` to PDF: the same bytes from the same content on every machine."""
    import typst

    source = root / "paper" / "paper.typ"
    pdf = typst.compile(source, root=root, ignore_system_fonts=True, timestamp=PAPER_DATE)
    write_atomically(source.with_suffix(".pdf"), pdf)


def parse(source: str, where: str) -> ast.Module:
    """Parse Python, with a readable error."""
    try:
        return ast.parse(source)
    except SyntaxError as error:
        raise PlanError(f"{where}: {(error.text or '').strip()!r} is not Python ({error.msg}): correct it") from None


def _step(root: Path, profile: str, notebook: Notebook, values: dict[str, Any], imports: dict[Path, set[Path]]) -> Step:
    build = root / "build" / profile
    tables, figures = build / "tables", build / "figures"
    if profile == PAPER_PROFILE:
        tables, figures = root / "paper" / "tables", root / "figures"
    written = [tables / f"{name}{end}" for name in notebook.names_given_to("save_table", 1) for end in TABLE_SUFFIXES]
    written += [
        figures / f"{name}{end}" for name in notebook.names_given_to("save_figure", 1) for end in FIGURE_SUFFIXES
    ]
    read = [tables / f"{name}.csv" for name in notebook.names_given_to("read_table", 0)]
    read += [root / "paper" / "reported" / f"{name}.csv" for name in notebook.names_given_to("read_reported", 0)]
    chosen = {name: value for name, value in values.items() if name in notebook.parameters}
    settings = {name: parameter.default for name, parameter in notebook.parameters.items()} | chosen
    files = {file for value in settings.values() for file in _input_files(root, value)}
    files |= {path for path in [root / "constraints.txt"] if path.exists()}  # other versions, other numbers
    return Step(
        notebook=notebook.path,
        code=notebook.code,
        parameters=chosen,
        reads=[*reached(notebook.tree, root, imports), *sorted(files | set(read) - set(written))],
        writes=[*written, build / "notebooks" / notebook.path.name],
        staging=build / "staging" / notebook.path.stem,
    )


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


def _imported(root: Path, file: Path) -> set[Path]:
    return _imports(parse(file.read_text(encoding="utf-8"), file.name), root)


def _input_files(root: Path, value: Any) -> Iterator[Path]:
    for name in value if isinstance(value, list) else [value]:
        if not isinstance(name, str) or not name:
            continue
        path = root / name
        if os.path.isdir(path):
            yield from (file for file in path.iterdir() if file.suffix in (".safetensors", ".json"))
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
