"""Counts what a notebook computes while it runs; the first cell of a rehearsal imports this, before all else.

`COUNTS` holds, by kind and by the rows that one call had: tokens times blocks that were read (times the passes that
training makes of one), rows that a head multiplied; and by kind alone: logits that became probabilities,
multiplications of moments, of the vocabulary metric and of decompositions, and the most numbers of states and of
moments that were held at a time. Cost: microseconds for each call.
"""

import json
import time
import weakref
from collections import defaultdict
from collections.abc import Callable
from math import log2
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook

from chassis_utils.linalg import moments, regression
from chassis_utils.lm import states

BEGIN = time.perf_counter()
VOCABULARY = 2000  # outputs from which on a linear layer is taken for a head
WIDTH = 256  # of the shipped models
MOST_ROWS = 1024  # beyond which a product is no faster for more
COUNTS: dict[str, float] = defaultdict(float)
HELD: dict[str, float] = defaultdict(float)  # now, of what COUNTS has the most of


def write(path: str) -> None:
    """Write the counts and the seconds since the beginning."""
    counts = COUNTS | {"seconds": time.perf_counter() - BEGIN}
    Path(path).write_text(json.dumps(counts, indent=1), encoding="utf-8")


def counted(place: Any, name: str, count: Callable[..., None], of_result: bool = False) -> None:
    """Put a function that counts in the place of `place.name`; `count` is given its arguments, or its result."""
    call = getattr(place, name)

    def counting(*positional: Any, **named: Any) -> Any:
        result = call(*positional, **named)
        if of_result:
            count(result)
        else:
            count(*positional, **named)
        return result

    setattr(place, name, counting)


def add(kind: str, numbers: float) -> None:
    """Count so many more."""
    COUNTS[kind] += numbers


def rows_of(x: torch.Tensor) -> int:
    """The rows of a call, to the next power of two, so that there are few kinds."""
    return min(MOST_ROWS, 2 ** round(log2(max(1, x.shape[:-1].numel()))))


def of_block(module: torch.nn.Module, inputs: tuple[Any, ...], _: Any) -> None:
    """Tokens through a block, which is known by its attention."""
    if not inputs or not hasattr(module, "self_attn"):
        return
    trained = [parameter.requires_grad for parameter in module.parameters()] if torch.is_grad_enabled() else [False]
    passes = 1 + (any(trained) or inputs[0].requires_grad) + all(trained)  # backwards, to the inputs and to the weights
    COUNTS[f"pass {type(module).__name__} {rows_of(inputs[0])}"] += inputs[0].shape[:-1].numel() * passes
    COUNTS["calls of blocks"] += 1


def of_linear(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> None:
    """Rows that a head multiplies."""
    if len(weight) > VOCABULARY:
        COUNTS[f"head {weight.dtype} {rows_of(x)} {len(weight)}"] += x.shape[:-1].numel() * (
            2 if x.requires_grad else 1
        )


def of_logits(z: torch.Tensor, *_: Any, **__: Any) -> None:
    """Logits that become probabilities."""
    if z.shape[-1:] and z.shape[-1] > VOCABULARY:
        COUNTS[f"logits {z.shape[-1]}"] += z.numel()


def of_gram(x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
    """Multiplications of x^T x, of the vocabulary where it is weighed; one half is the mirror of the other."""
    COUNTS["moments" if weights is None else "metric"] += len(x) * x.shape[1] ** 2 / 2


def of_product(x: torch.Tensor, y: torch.Tensor) -> None:
    """Multiplications of a product whose columns are a vocabulary, or a share of one."""
    if x.dim() == y.dim() == 2 and y.shape[1] > WIDTH:
        COUNTS["product"] += x.numel() * y.shape[1]


def of_solve(factor: torch.Tensor, columns: torch.Tensor) -> None:
    """Multiplications of solving against such columns."""
    if columns.shape[1] > WIDTH:
        COUNTS["solve"] += factor.numel() * columns.shape[1]


def cubes(factor: float) -> Callable[..., None]:
    """A decomposition, in as many multiplications of products as it takes the time of: `factor` times d^3.

    Of a matrix that is not square the longer side is a share of the vocabulary.
    """

    def count(a: torch.Tensor, *_: Any, **__: Any) -> None:
        COUNTS["cubes" if a.shape[-2] == a.shape[-1] else "solve"] += factor * a.numel() * min(a.shape[-2:])

    return count


def keep(kind: str, owner: Any, numbers: int) -> None:
    """Numbers that are held until their owner is no longer there."""

    def change(by: int) -> None:
        HELD[kind] += by

    change(numbers)
    COUNTS[f"most {kind}"] = max(COUNTS[f"most {kind}"], HELD[kind])
    weakref.finalize(owner, change, -numbers)


def of_states(read: torch.Tensor) -> None:
    """States that are read, and held."""
    COUNTS["kept"] += read.numel()
    keep("states", read, read.numel())


register_module_forward_hook(of_block)
counted(functional, "linear", of_linear)
for method in ("softmax", "log_softmax"):
    counted(torch.Tensor, method, of_logits)
counted(functional, "cross_entropy", of_logits)
counted(torch.Tensor, "__matmul__", of_product)
counted(torch.Tensor, "addmm_", lambda _, x, y: of_product(x, y))
counted(torch, "cholesky_solve", lambda columns, factor: of_solve(factor, columns))
counted(moments, "gram_matrix", of_gram)
regression.gram_matrix = moments.gram_matrix
counted(moments, "_cross", lambda x, y: add("moments", x.numel() * y.shape[1]))
counted(
    moments.Moments, "__init__", lambda made, *_, **__: keep("moments", made, 2 * made.xx.numel() + made.xy.numel())
)
for function, factor in {"eigh": 7.0, "svd": 17.0, "cholesky_ex": 0.6}.items():
    counted(torch.linalg, function, cubes(factor))
counted(regression, "_held_out_errors", lambda rest, *_: add("cubes", 6 * rest.xx.numel() * len(rest.xx)))
counted(regression, "squared_error", lambda found, *_: add("cubes", 3 * found.xx.numel() * len(found.xx)))
counted(states, "collect", of_states, of_result=True)
