"""The synthetic part of the CHASSIS study from prompts to held-out KL: its scripts against this package.

    python benchmarks/synthetic.py --base models/port-llama

Four steps: lenses of all layers; ranks at three layers; the hidden-to-hidden map at every rank (for the package this is
the edit at the last layer, one of the three); a stress test of four expert ranks on three families of prompts. The
scripts collect states anew for each step and solve against the whole vocabulary; the package reads every prompt once,
and one decomposition gives every rank. Its penalties are chosen on folds, which the scripts do not do. `held_out_kl` is
the mean over all that is measured on test prompts (held-out numbers in the study's own templates, its split `index`):
lower is closer to the expert. Gradient refinement and stacking have their own notebooks and are no part of this.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import scripts
import torch
from measure import Row, apart, print_rows, row

from chassis_utils.adapters.fit import fit_moments, fit_states
from chassis_utils.adapters.lens import fit_lens, lens_moments
from chassis_utils.as_reported.sizes import scaled_layer, scaled_rank
from chassis_utils.experts.synthetic import SyntheticExpert
from chassis_utils.linalg.moments import by_fold
from chassis_utils.linalg.regression import vocabulary_metric
from chassis_utils.lm import states
from chassis_utils.lm.model import LanguageModel, load
from chassis_utils.metrics import Reference
from chassis_utils.text import prompts

RANKS, EXPERT_RANKS = (4, 8, 16, 32, 64, 128), (16, 32, 64, 128)  # at width 2048
LAYERS = (10, 15)  # of 22, beside the last
FAMILIES = ("mixed", "math", "physics")
Key = tuple[str, str]  # a family of prompts and a part, train or test


def prepared(base: str, samples: int, tested: int) -> tuple[LanguageModel, dict[Key, list[Any]]]:
    """The model, and the prompts of each family and part."""
    sizes = {"train": samples, "test": tested}
    data = {(f, part): prompts.take(f, "index", part, n) for f in FAMILIES for part, n in sizes.items()}
    return load(base), data


def by_scripts(base: str, samples: int, tested: int) -> dict[str, Any]:
    """The study's way."""
    model, data = prepared(base, samples, tested)
    texts = {key: prompts.texts(chosen) for key, chosen in data.items()}
    weight, expert, found = model.head.weight, SyntheticExpert.draw(model.width, scaled_rank(model.width)), []
    begin = time.perf_counter()

    def read(family: str) -> tuple[torch.Tensor, torch.Tensor]:
        return scripts.collect(model, texts[family, "train"]), scripts.collect(model, texts[family, "test"])

    def logits(h: torch.Tensor, edited: SyntheticExpert) -> torch.Tensor:
        return edited.states(h).float() @ weight.T

    train, test = read("mixed")  # lenses
    target, truth = logits(train[-1], expert), logits(test[-1], expert)
    for h, unseen in zip(train, test, strict=True):
        lens, bias = scripts.ridge(h, target)
        found.append(scripts.kl(truth, unseen @ lens + bias))
    train, test = read("mixed")  # ranks
    target, truth = logits(train[-1], expert), logits(test[-1], expert)
    for layer in [scaled_layer(model.depth, each) for each in LAYERS] + [model.depth]:
        method = scripts.MethodA(train[layer], target, weight)
        own = test[layer] @ weight.T
        found += [scripts.kl(truth, method.logits(test[layer], own, scaled_rank(model.width, r))) for r in RANKS]
    train, test = read("mixed")  # hidden to hidden
    truth = logits(test[-1], expert)
    mapped, bias = scripts.ridge(train[-1], expert.states(train[-1]).float())
    u, s, vt = torch.linalg.svd(mapped)
    for rank in RANKS:
        r = scaled_rank(model.width, rank)
        found.append(scripts.kl(truth, (test[-1] + test[-1] @ (u[:, :r] * s[:r]) @ vt[:r] + bias) @ weight.T))
    for expert_rank in EXPERT_RANKS:  # stress test
        drawn = SyntheticExpert.draw(model.width, scaled_rank(model.width, expert_rank))
        for family in FAMILIES:
            train, test = read(family)
            method = scripts.MethodA(train[-1], logits(train[-1], drawn), weight)
            own = test[-1] @ weight.T
            edited = method.logits(test[-1], own, scaled_rank(model.width))
            found.append(scripts.kl(logits(test[-1], drawn), edited))
    return {"seconds": time.perf_counter() - begin, "held_out_kl": sum(found) / len(found)}


def _states(model: LanguageModel, texts: Mapping[Key, list[str]]) -> dict[Key, torch.Tensor]:
    """The states of all families, from one reading in which prompts that begin alike stand side by side."""
    every = sorted({text for chosen in texts.values() for text in chosen})
    read, number = states.collect(model, every), {text: k for k, text in enumerate(every)}
    return {key: read[:, [number[text] for text in chosen]] for key, chosen in texts.items()}


def by_package(base: str, samples: int, tested: int) -> dict[str, Any]:
    """The package's way, from an empty cache."""
    model, data = prepared(base, samples, tested)
    texts = {key: prompts.texts(chosen) for key, chosen in data.items()}
    head, expert, found = model.head, SyntheticExpert.draw(model.width, scaled_rank(model.width)), []
    with tempfile.TemporaryDirectory() as folder:
        states.CACHE = Path(folder)
        begin = time.perf_counter()
        h = _states(model, texts)
        folds = {family: prompts.fold_numbers(data[family, "train"]) for family in FAMILIES}
        train, test = h["mixed", "train"], h["mixed", "test"]
        target, reference = expert.states(train[-1]), Reference(head(expert.states(test[-1])))
        for layer, (read, unseen) in enumerate(zip(train, test, strict=True)):
            edit = layer == model.depth
            lens = fit_lens(lens_moments(read, target, folds["mixed"], edit), edit)
            found.append(float(reference.kl(lens.logits(unseen, head)).mean()))
        metric = vocabulary_metric(head.weight, head.mean_probabilities(target))
        for layer in [scaled_layer(model.depth, each) for each in LAYERS] + [model.depth]:
            edits = by_fold(train[layer], target - train[-1].double(), folds["mixed"])
            path = fit_moments(edits, head, metric).path
            for rank in RANKS:
                adapted = test[-1].double() + path.at(scaled_rank(model.width, rank))(test[layer])
                found.append(float(reference.kl(head(adapted)).mean()))
        for expert_rank in EXPERT_RANKS:
            drawn = SyntheticExpert.draw(model.width, scaled_rank(model.width, expert_rank))
            for family in FAMILIES:
                last, unseen = h[family, "train"][-1], h[family, "test"][-1]
                path = fit_states(last, drawn.states(last), head, folds[family])
                adapted = path.at(scaled_rank(model.width)).logits(unseen, head)
                found.append(float(Reference(head(drawn.states(unseen))).kl(adapted).mean()))
        return {"seconds": time.perf_counter() - begin, "held_out_kl": sum(found) / len(found)}


def measured(arguments: Sequence[str]) -> Iterator[Row]:
    """The rows, for these arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="models/port-llama")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--tested", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    given = options.base, options.samples, options.tested
    theirs = apart(by_scripts, options.threads, *given)
    keys = {"samples": options.samples, "threads": options.threads}
    yield row("synthetic part", "study's scripts", theirs["seconds"], **theirs, **keys)
    yield row("synthetic part", "package", theirs["seconds"], **apart(by_package, options.threads, *given), **keys)


if __name__ == "__main__":
    print_rows(measured)
