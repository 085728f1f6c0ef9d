"""The rooms of the package: imports point downward, and what the README promises is there."""

import ast
import doctest
import re
from importlib import import_module
from pathlib import Path

import pytest

import chassis_utils
from chassis_utils.files import ROOT

PACKAGE = ROOT / "chassis_utils"
ORDER = [  # from the ground up: a module imports from its own room and from those before it
    *("files", "limits", "timing", "metrics", "linalg", "text", "lm", "bridge", "experts", "adapters", "circulant"),
    *("as_reported", "paper", "__main__"),
]
LONGEST_MODULE, LONGEST_FUNCTION = 300, 40  # lines
LARGEST_PACKAGE = 6050  # lines of code: docstrings, comments and blank lines do not count


def room(module: str) -> str:
    """`chassis_utils.lm.model` lies in `lm`."""
    return module.split(".")[1]


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return {"chassis_utils." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in files}


def imports(source: str, known: set[str]) -> set[str]:
    """The package modules that a source imports, also inside its functions."""
    named = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return named & known


def upward(sources: dict[str, str]) -> list[str]:
    """Imports of a room above the importing one, and circles within a room."""
    edges = {name: imports(source, set(sources)) for name, source in sources.items()}
    wrong = [
        f"{name} imports {other}"
        for name, others in edges.items()
        for other in others
        if ORDER.index(room(other)) > ORDER.index(room(name))
    ]
    while edges:  # take away what imports nothing that is left
        free = {name for name, others in edges.items() if not others & set(edges) - {name}}
        if not free:
            return [*wrong, f"a circle among {', '.join(sorted(edges))}"]
        edges = {name: others for name, others in edges.items() if name not in free}
    return wrong


def test_imports_point_downward_and_run_in_no_circle() -> None:
    assert upward({name: path.read_text(encoding="utf-8") for name, path in modules().items()}) == []


@pytest.mark.parametrize(
    ("importing", "imported"),
    [("chassis_utils.lm.model", "chassis_utils.adapters.fit"), ("chassis_utils.metrics", "chassis_utils.lm.model")],
)
def test_an_upward_import_is_found(importing: str, imported: str) -> None:
    assert upward({importing: f"from {imported} import something", imported: ""}) == [f"{importing} imports {imported}"]


def test_a_circle_is_found() -> None:
    sources = {
        "chassis_utils.lm.a": "import chassis_utils.lm.b",
        "chassis_utils.lm.b": "def f():\n from chassis_utils.lm.a import x",
    }
    assert upward(sources) == ["a circle among chassis_utils.lm.a, chassis_utils.lm.b"]


@pytest.mark.parametrize("path", [path for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE], ids=str)
def test_a_room_opens_with_one_sentence_and_imports_nothing(path: Path) -> None:
    (sentence,) = ast.parse(path.read_text(encoding="utf-8")).body
    assert ast.unparse(sentence).strip("'\"").count("\n") == 0


def lines_of_code(source: str) -> int:
    """Lines that hold code."""
    documented = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    first = [node.body[0] for node in documented if ast.get_docstring(node)]
    docstrings = {line for node in first for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and k not in docstrings for k, line in lines)


def test_modules_and_functions_stay_short() -> None:
    sources = {name: path.read_text(encoding="utf-8") for name, path in modules().items()}
    lengths = {name: len(source.splitlines()) for name, source in sources.items()}
    assert {name: length for name, length in lengths.items() if length > LONGEST_MODULE} == {}
    assert sum(map(lines_of_code, sources.values())) <= LARGEST_PACKAGE
    functions = {
        f"{name}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: length for name, length in functions.items() if length > LONGEST_FUNCTION} == {}


def readme_names() -> set[str]:
    """What the README's Python examples import from the root of the package."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block))]
    roots = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "chassis_utils"]
    return {alias.name for node in roots for alias in node.names}


def test_the_root_gives_what_the_readme_imports() -> None:
    assert {"load", "fit", "Port"} <= readme_names() <= set(chassis_utils.PUBLIC)


@pytest.mark.parametrize("name", chassis_utils.PUBLIC)
def test_a_public_name_has_an_example_that_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    public = getattr(chassis_utils, name)
    module = import_module(f"chassis_utils.{chassis_utils.PUBLIC[name]}")
    examples = doctest.DocTestFinder(recurse=False).find(public, name, module)
    assert any(example.examples for example in examples)
    for example in examples:
        assert doctest.DocTestRunner().run(example).failed == 0


def test_an_unknown_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(AttributeError, match="has no 'Adaptor': it gives load, "):
        _ = chassis_utils.Adaptor
