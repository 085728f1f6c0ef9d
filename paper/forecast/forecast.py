"""How long a profile would take on this machine, and what it needs: `make plan PROFILE=original`.

Each notebook is rehearsed: run with the profile's sizes, but on the shipped models, while `counting` counts what it
computes. The counts are scaled to the profile's models, and each kind is timed on this machine in the sizes of those
models (`cost`). What no count explains, stays as it is; where the counts would take longer than the rehearsal did, all
is taken to be faster by so much. Rehearsals are kept in `build/plan-<profile>`: an interrupted forecast goes on, and on
another machine that has this folder it takes a minute. Memory is that of models, moments and states; disk that of all
states ever kept. Notebook 51 is left out: it runs at sizes of its own, whatever the models.

Cost: about that of `make paper`, once. Accuracy: see the guide.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import torch
from cost import Model, seconds
from tqdm import tqdm

from chassis_utils.files import BUILD, ROOT
from chassis_utils.lm.checkpoint import default_device
from chassis_utils.paper.notebook import MODEL_PARAMETERS, Notebook
from chassis_utils.paper.pipeline import StepFailed, execute
from chassis_utils.paper.plan import PlanError, Step, plan

OF_ITS_OWN = ("51_benchmarks",)  # sizes
FIXED_WORK = ("12_fft_speed",)  # whatever the models
OTHER_METRICS = 1.25  # with them, comparing logits takes so many times its KL
EACH_LAYER = ("21_layerwise_lenses", "32_prompted_expert", "33_depth", "34_sibling_at_depth")  # whose work is so many
GROWTH = {"moments": (2, False), "cubes": (3, False), "metric": (2, True), "product": (1, True), "solve": (2, True)}
DTYPES = ("float32", "float64", "bfloat16", "float16")
GIB = 2**30
PROCESS = 0.6 * GIB  # of an interpreter and its libraries
FIRST = """from pathlib import Path
import sys
from chassis_utils import files
files.CACHE = Path({cache!r})  # empty at first: each state is read by the notebook that needs it first
sys.path.insert(0, {here!r})
import counting
sys.path.pop(0)"""
Work = dict[tuple[str, str, int], float]  # counts by role of the model and, as in `seconds`, kind and rows


def rehearsed(step: Step, folder: Path) -> dict[str, float]:
    """The counts of a notebook under this step's sizes on the shipped models; run where they are not known."""
    notebook = Notebook.read(step.notebook)
    sizes = {name: value for name, value in step.parameters.items() if name not in MODEL_PARAMETERS}
    sizes |= {"profile": folder.name} if "profile" in notebook.parameters else {}
    kept = folder / f"{step.notebook.stem}-{notebook.content(ROOT, notebook.defaults | sizes)}.json"
    if not kept.exists():
        counting = nbformat.read(step.notebook, as_version=4)
        first = FIRST.format(cache=str(folder / "cache"), here=str(Path(__file__).parent))
        cells = [nbformat.v4.new_code_cell(first), *counting.cells]
        counting.cells = [*cells, nbformat.v4.new_code_cell(f"counting.write({str(kept)!r})")]
        copy = folder / step.notebook.name
        nbformat.write(counting, copy)
        os.environ["CHASSIS_RESULTS"] = str(folder)
        try:
            execute(copy, copy, sizes)
        except StepFailed as error:
            raise PlanError(f"{step.notebook.name} cannot be rehearsed on the shipped models: {error}") from None
    return json.loads(kept.read_text(encoding="utf-8"))


def work_of(counts: dict[str, float], models: dict[str, Model], shipped: dict[str, Model], layers: bool) -> Work:
    """What `counts`, made with the `shipped` models, come to with others; `layers`: all is done for each layer."""
    base = "base" if "base" in models else "fft_base"
    by_vocabulary = {model.vocabulary: role for role, model in reversed(shipped.items())}
    deeper = (models[base].depth + 1) / (shipped[base].depth + 1) if layers else 1.0
    work: Work = defaultdict(float)
    for name, count in counts.items():
        kind, *rest = name.split()
        role = by_vocabulary.get(int(rest[-1]), base) if rest and rest[-1].isdigit() else base
        if kind == "pass":
            role = "expert" if "Phi" in rest[0] and "expert" in models else base
            tokens = shipped[role].bytes_per_token / models[role].bytes_per_token
            work[role, kind, int(rest[1])] += count * tokens * models[role].depth / shipped[role].depth
            continue
        wider, more = (getattr(models[role], n) / getattr(shipped[role], n) for n in ("width", "vocabulary"))
        if kind == "head":
            work[role, rest[0].removeprefix("torch."), int(rest[1])] += deeper * count
        elif kind == "logits":
            work[role, kind, 32] += deeper * OTHER_METRICS * count * more
        elif kind in GROWTH:
            power, of_vocabulary = GROWTH[kind]
            work[role, "square", 512] += deeper * count * wider**power * (more if of_vocabulary else 1)
    return work


def operations(models: dict[str, Model], work: Work) -> float:
    """Floating-point operations, two for each multiplication."""
    each = {
        role: {"pass": model.block, "square": 1, "logits": 0} | dict.fromkeys(DTYPES, model.vocabulary * model.width)
        for role, model in models.items()
    }
    return sum(2 * count * each[role][kind] for (role, kind, _), count in work.items())


def forecast(step: Step, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    counts, notebook = rehearsed(step, folder), Notebook.read(step.notebook)
    roles = [name for name in MODEL_PARAMETERS if name in notebook.parameters and name != "trained"]
    models = {role: Model.of((notebook.defaults | step.parameters)[role]) for role in roles}
    shipped = {role: Model.of(notebook.defaults[role]) for role in roles}
    row: dict[str, Any] = {"notebook": step.notebook.stem, "rehearsal_s": counts["seconds"]}
    if step.notebook.stem in FIXED_WORK or not roles:
        return row | {"hours": counts["seconds"] / 3600}
    layers = step.notebook.stem in EACH_LAYER
    ours, theirs = (work_of(counts, chosen, shipped, layers) for chosen in (models, shipped))
    explained, whole = seconds_of(shipped, theirs), counts["seconds"]
    # what no count explains, stays as it is; where the counts would take longer than all did, they take that much less
    expected = seconds_of(models, ours) * min(1.0, whole / explained) + max(0.0, whole - explained)
    base, small = next(iter(models.values())), next(iter(shipped.values()))
    return row | {
        "passes": counts.get("calls of blocks", 0) / small.depth,
        "mega_tokens": sum(n for (_, kind, _), n in ours.items() if kind == "pass") / base.depth / 1e6,
        "tera_operations": operations(models, ours) / 1e12,
        "hours": expected / 3600,
        **room(counts, models, base.width / small.width, (base.depth + 1) / (small.depth + 1)),
    }


def seconds_of(models: dict[str, Model], work: Work) -> float:
    """Seconds that this machine takes for it."""
    return sum(count * seconds(models[role], kind, rows) for (role, kind, rows), count in work.items())


def room(counts: dict[str, float], models: dict[str, Model], wider: float, deeper: float) -> dict[str, float]:
    """GiB in memory, of models, the head in float64, moments and states, and on the disk, of states."""
    heads = [model.vocabulary * model.width for model in models.values()]
    held = PROCESS + 4 * sum(model.weights for model in models.values())
    held += 8 * max(heads) * any(name.startswith("head torch.float64") for name in counts)
    held += 8 * counts.get("most moments", 0) * wider**2 * deeper + 4 * counts.get("most states", 0) * wider * deeper
    return {"memory_gib": held / GIB, "disk_gib": 4 * counts.get("kept", 0) * wider * deeper / GIB}


def main() -> int:
    """Print the table; 2 where the profile cannot be planned."""
    parser = argparse.ArgumentParser(prog="make plan", description=__doc__)
    parser.add_argument("--profile", default=os.environ.get("PROFILE", "original"))
    profile = parser.parse_args().profile
    folder = BUILD / f"plan-{profile}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        steps = [step for step in plan(ROOT, profile) if step.notebook.stem not in OF_ITS_OWN]
        rows = [forecast(step, folder) for step in tqdm(steps, desc="rehearsals", disable=None)]
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = pd.DataFrame(rows)
    adding = ["rehearsal_s", "passes", "mega_tokens", "tera_operations", "disk_gib", "hours"]
    table.loc[len(table)] = {"notebook": "all", "memory_gib": table["memory_gib"].max(), **table[adding].sum()}
    table.to_csv(folder / "forecast.csv", index=False)
    print(table.to_string(index=False, float_format="{:.3g}".format, na_rep=""))
    print(f"On {default_device()} with {torch.get_num_threads()} threads; one notebook after the other.")
    print(f"Left out, since it runs at sizes of its own: {', '.join(OF_ITS_OWN)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
