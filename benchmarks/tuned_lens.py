"""Lenses of a model onto its own last layer: stochastic gradient descent against the closed form.

    python benchmarks/tuned_lens.py --base models/port-llama --layers 2 4 6

The peer is the tuned lens (Belrose et al. 2023, arXiv 2303.08112) with its published recipe: a residual affine map
before the final norm and the head, begun at the identity, trained on KL(model || lens) by SGD with Nesterov momentum
0.9, a rate that falls linearly to zero over 250 steps, weight decay 1e-3, gradients clipped at norm 1. The published
rate is 1; the rates asked for are all tried, each a row. Published steps take 2^18 tokens; here they take `--batch`
positions drawn from those that the closed form is fitted on. Both get the same states, whose reading is timed apart.

Held-out KL is measured on other documents, where training has got to each tenth of its steps; `seconds_level` is when
it is first as low as the closed form's, and NaN where it never is.
"""

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from measure import Clock, Row, print_rows, row
from torch import Tensor

from chassis_utils.adapters.lens import fit_lens, lens_moments
from chassis_utils.lm.forward import every_position
from chassis_utils.lm.model import LanguageModel, load
from chassis_utils.lm.states import collect
from chassis_utils.metrics import Reference, kl_loss
from chassis_utils.text import prompts

STEPS, MOMENTUM, DECAY, CLIP = 250, 0.9, 1e-3, 1.0  # of the tuned lens, as published


class TunedLens(torch.nn.Module):
    """h -> head(norm(h + A h + b)), A and b begun at zero."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model, self.map = model, torch.nn.Linear(model.width, model.width)
        torch.nn.init.zeros_(self.map.weight)
        torch.nn.init.zeros_(self.map.bias)

    def forward(self, h: Tensor) -> Tensor:
        """The logits."""
        return self.model.head(self.model.final_norm(h + self.map(h)))


def train(lens: TunedLens, h: Tensor, logits: Tensor, rate: float, batch: int, judge: Any) -> list[tuple[float, float]]:
    """Train, and return the seconds of training and the held-out KL after each tenth of the steps."""
    optimizer = torch.optim.SGD(lens.parameters(), lr=rate, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    generator, clock, course = torch.Generator().manual_seed(0), Clock(), []
    for step in range(1, STEPS + 1):
        with clock.running():
            rows = torch.randint(len(h), (batch,), generator=generator)
            optimizer.zero_grad()
            kl_loss(logits[rows], lens(h[rows])).backward()
            torch.nn.utils.clip_grad_norm_(lens.parameters(), CLIP)
            optimizer.step()
            schedule.step()
        if step % (STEPS // 10) == 0:
            course.append((clock.seconds, judge(lens)))
    return course


def positions(model: LanguageModel, part: str, count: int) -> tuple[list[str], list[list[int]], list[int]]:
    """Texts, eight positions of each, and a fold for each position."""
    chosen = prompts.take("natural", "document", part, count // 8)
    texts = prompts.texts(chosen)
    places = [row[:: max(1, len(row) // 8)][:8] for row in every_position(model, texts)]
    by_text = prompts.fold_numbers(chosen) if part == "train" else [0] * len(texts)
    return texts, places, [fold for fold, row in zip(by_text, places, strict=True) for _ in row]


def compare(model: LanguageModel, layer: int, data: dict[str, Tensor], folds: list[int], options: Any) -> Iterator[Row]:
    """The rows of one layer; `data` holds its states, and the last ones."""
    expert = Reference(model.head(data["test", "last"]), model.head(model.final_norm(data["test", "h"])))
    keys = {"layer": layer, "samples": len(folds), "threads": torch.get_num_threads(), "base_kl": expert.base_kl}
    begin = time.perf_counter()
    lens = fit_lens(lens_moments(data["train", "h"], data["train", "last"], folds))
    seconds = time.perf_counter() - begin
    ours = float(expert.kl(lens.logits(data["test", "h"], model.head)).mean())
    yield row("tuned lens", "closed form", seconds, seconds=seconds, held_out_kl=ours, **keys)
    logits = model.head(data["train", "last"])

    @torch.inference_mode()
    def judge(trained: TunedLens) -> float:
        return float(expert.kl(trained(data["test", "h"])).mean())

    for rate in options.rates:
        course = train(TunedLens(model), data["train", "h"], logits, rate, options.batch, judge)
        level = min((s for s, kl in course if kl <= ours), default=math.nan)
        figures = {"held_out_kl": course[-1][1], "rate": rate, "seconds_level": level, "batch": options.batch}
        yield row("tuned lens", "tuned lens (SGD)", seconds, seconds=course[-1][0], **figures, **keys)


def measured(arguments: Sequence[str]) -> Iterator[Row]:
    """The rows, for these arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="models/port-llama")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--tested", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 0.1])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model = load(options.base)
    taken = {part: positions(model, part, n) for part, n in (("train", options.samples), ("test", options.tested))}
    begin = time.perf_counter()
    read = {part: collect(model, texts, places) for part, (texts, places, _) in taken.items()}
    yield row("tuned lens", "states", seconds=time.perf_counter() - begin, samples=len(taken["train"][2]))
    for layer in options.layers:
        data = {(part, name): states[k] for part, states in read.items() for name, k in (("h", layer), ("last", -1))}
        yield from compare(model, layer, data, taken["train"][2], options)


if __name__ == "__main__":
    print_rows(measured)
