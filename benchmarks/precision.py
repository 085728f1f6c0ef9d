"""Lenses of all layers from passes in bfloat16 against those from passes in float32.

    python benchmarks/precision.py --base models/port-llama

The network with its weights and states is in one precision or the other; what it gives is summed into float64 moments.
The target is its own last state. `held_out_kl` is the mean over all layers but the last, at the states that the float32
network has at prompts of other documents; `difference` is the largest difference between any moment and that of the
float32 passes, relative to the largest entry of its kind. Seconds are those of the passes and sums.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from measure import Row, apart, print_rows, row
from processes import difference
from torch import Tensor

from chassis_utils.adapters.lens import fit_lens, read_moments
from chassis_utils.linalg.moments import Moments
from chassis_utils.lm import states
from chassis_utils.lm.model import Head, load
from chassis_utils.metrics import Reference
from chassis_utils.text import prompts


def moments_of(base: str, dtype: torch.dtype, samples: int) -> dict[str, Any]:
    """Moments [layer][fold] from passes in this precision, and the seconds that they took."""
    model, chosen = load(base, dtype, device="cpu"), prompts.take("natural", "document", "train", samples)
    begin = time.perf_counter()
    moments = read_moments(model, model, prompts.texts(chosen), prompts.fold_numbers(chosen))
    return {"seconds": time.perf_counter() - begin, "moments": moments}


def held_out_kl(moments: list[list[Moments]], unseen: Tensor, head: Head) -> float:
    """The mean over the layers of the KL of their lenses at these states [layers, n, width]."""
    reference = Reference(head(unseen[-1]))
    pairs = list(zip(moments, unseen, strict=True))[:-1]  # that of the last layer is the identity
    found = [reference.kl(fit_lens(folds).logits(h, head)).mean() for folds, h in pairs]
    return float(torch.stack(found).mean())


def measured(arguments: Sequence[str]) -> Iterator[Row]:
    """The rows, for these arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="models/port-llama")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--tested", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    model, chosen = load(options.base, device="cpu"), prompts.take("natural", "document", "test", options.tested)
    unseen = states.collect(model, prompts.texts(chosen))
    first: Row = {}
    for dtype in (torch.float32, torch.bfloat16):
        found = apart(moments_of, options.threads, options.base, dtype, options.samples)
        first = first or dict(found)
        moments = found.pop("moments")
        found["held_out_kl"] = held_out_kl(moments, unseen, model.head)
        keys = {"samples": options.samples, "threads": options.threads}
        off = difference(moments, first["moments"])
        yield row("precision", str(dtype)[6:], first["seconds"], **found, **keys, difference=off)


if __name__ == "__main__":
    print_rows(measured)
