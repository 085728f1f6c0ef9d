"""The command line: `chassis fit` makes an adapter, `chassis run` executes a notebook with other parameters.

Both check what they are given before any long work, and end with one sentence where it does not do. The ranks of `fit`
are ranks as they are; those of most notebooks are the studies', at width 2048, and are scaled to the width of the base
(`as_reported.sizes`): `--rank 64` is 8 at width 256 and 2 at width 64.
"""

import argparse
import ast
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from chassis_utils.files import BUILD, ROOT, locate, require_folder
from chassis_utils.paper.notebook import MODEL_PARAMETERS, PROMPT_FILES, Notebook, PlanError, numbered_notebooks
from chassis_utils.paper.pipeline import StepFailed, execute


class _Parser(argparse.ArgumentParser):
    """One whose complaints are one sentence, like all others."""

    def error(self, message: str) -> NoReturn:
        raise PlanError(f"{message}: see `{self.prog} --help`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 where it succeeded, 2 where what it was given does not do."""
    try:
        return _command(arguments)
    except StepFailed as error:  # the sentence and the number of the cell, without its source
        lines = str(error).splitlines()
        print(f"error: {lines[0]} {lines[-1]}", file=sys.stderr)
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


def _command(arguments: Sequence[str] | None) -> int:
    parser = _Parser(prog="chassis", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fitting = commands.add_parser("fit", help="fit an adapter that makes BASE follow EXPERT")
    fitting.add_argument("base", help="folder or hub id of the frozen model")
    fitting.add_argument("expert", help="folder or hub id of the model to follow")
    fitting.add_argument("texts", help="text file, one text a line")
    fitting.add_argument("--rank", type=int, help="of the adapter, as it is; chosen on held-out texts unless given")
    fitting.add_argument("--out", default="adapter", help="folder to save the adapter in")
    running = commands.add_parser("run", help="execute one notebook: chassis run 21 --base path/to/model")
    running.add_argument("notebook", help="its number or name; parameters follow, ranks as at width 2048")
    options, others = parser.parse_known_args(arguments)
    if options.command == "run":
        return _run(options.notebook, others)
    if others:
        parser.error(f"unknown arguments: {' '.join(others)}")
    return _fit(options)


def _fit(options: argparse.Namespace) -> int:
    from chassis_utils.text.prompts import read_prompts, texts

    lines = texts(read_prompts(options.texts))
    require_folder(options.out)
    from chassis_utils.adapters.fit import fit  # torch takes seconds: only once the texts can be read
    from chassis_utils.lm.model import load

    adapter = fit(load(options.base), load(options.expert), lines, options.rank)
    adapter.save_pretrained(options.out)
    print(f"{adapter}\nsaved in {options.out}")
    return 0


def _run(name: str, arguments: Sequence[str]) -> int:
    paths = [path for path in numbered_notebooks(ROOT) if path.stem == name or path.stem.split("_")[0] == name]
    if not paths:
        known = ", ".join(path.stem for path in numbered_notebooks(ROOT)) or "none: run it in a checkout"
        raise PlanError(f"notebook {name!r} is unknown: choose one of {known}")
    notebook = Notebook.read(paths[0])
    parameters = _parameters(notebook, arguments)
    notebook.check(parameters, "the command line")
    _check_inputs(parameters)
    run = hashlib.sha256(repr(sorted(parameters.items())).encode()).hexdigest()[:8]  # other parameters, another file
    name = f"{notebook.path.stem}-{run}.ipynb" if parameters else notebook.path.name
    executed = BUILD / "interactive" / "notebooks" / name
    executed.parent.mkdir(parents=True, exist_ok=True)
    running = executed.with_name(f".{executed.name}")  # an earlier run stays until this one has succeeded
    try:
        execute(notebook.path, running, parameters)
        os.replace(running, executed)
    finally:
        running.unlink(missing_ok=True)
    print(f"executed notebook: {executed}")
    return 0


def _check_inputs(parameters: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a checkpoint or a prompt file that the notebook could not read."""
    from chassis_utils.text.corpus import read_texts
    from chassis_utils.text.prompts import read_prompts

    for name, value in parameters.items():
        folder = name == "prose" or (name == "prompts_file" and os.path.isdir(locate(value)))
        if value and folder:
            read_texts(locate(value))
        elif value and name.endswith(PROMPT_FILES):
            read_prompts(value)
    for name in (name for name in MODEL_PARAMETERS if name in parameters):
        from chassis_utils.lm.checkpoint import find_folder  # torch takes seconds

        find_folder(parameters[name])


def _parameters(notebook: Notebook, arguments: Sequence[str]) -> dict[str, Any]:
    """`--name value` pairs as the notebook's parameters; a value is a Python literal or, else, a string."""
    names, values = arguments[::2], arguments[1::2]
    if len(names) != len(values) or not all(name.startswith("--") for name in names):
        raise PlanError(f"{' '.join(arguments)!r} is no list of `--name value`: write for example --base path/to/model")
    parameters = {}
    for name, value in zip((name.removeprefix("--").replace("-", "_") for name in names), values, strict=True):
        try:
            literal = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that `literal_eval` documents
            literal = value
        if name in parameters:
            raise PlanError(f"--{name.replace('_', '-')} is given twice: give it once")
        text = name in notebook.parameters and isinstance(notebook.parameters[name].default, str)
        there = text and os.path.exists(locate(value))
        parameters[name] = str(locate(value)) if there else value if text else literal
    return parameters


if __name__ == "__main__":
    sys.exit(main())
