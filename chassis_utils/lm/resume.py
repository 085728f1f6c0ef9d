"""Passes that begin inside the network, where an earlier pass over the same prompts has been.

What stands below the first changed layer computes the same in every pass. Its output is kept once, and handed on by
the modules that made it in place of running them. The rest of the pass (masks, positions, later blocks, head, hooks)
is the network's own, so its results are those of a full pass to the bit.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from chassis_utils.lm.forward import pad
from chassis_utils.lm.model import LanguageModel


class Reached(Exception):
    """Raised by a hook that has seen what a pass was made for."""


def run_until(model: LanguageModel, ids: Int[Tensor, "n t"], mask: Int[Tensor, "n t"]) -> None:
    """A pass that ends where a hook raises `Reached`."""
    with suppress(Reached):
        model.network(ids, attention_mask=mask, use_cache=False)


@torch.no_grad()
def output_of(model: LanguageModel, ids: Int[Tensor, "n t"], mask: Int[Tensor, "n t"], layer: int) -> Any:
    """What block `layer` returns; the pass ends there."""
    outputs: list[Any] = []

    def catch(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        outputs.append(output)
        raise Reached

    with model.blocks[layer].register_forward_hook(catch):
        run_until(model, ids, mask)
    return outputs[0]


def first_layer(model: LanguageModel, paths: Iterable[str]) -> int:
    """The lowest block that holds a module of these paths; 0 where one lies in none, or there is no path."""
    names = {module: name for name, module in model.network.named_modules()}
    prefixes = [f"{names[block]}." for block in model.blocks]
    layers = [next((k for k, prefix in enumerate(prefixes) if path.startswith(prefix)), 0) for path in paths]
    return min(layers, default=0)


@contextmanager
def replacing(module: nn.Module, method: str, new: Callable[..., Any]) -> Iterator[None]:
    """A method of this module is another function."""
    before = vars(module).get(method)  # what another library or another port has put there; else the class has it
    setattr(module, method, new)
    try:
        yield
    finally:
        delattr(module, method)
        if before is not None:
            setattr(module, method, before)


def giving(module: nn.Module, output: Any) -> AbstractContextManager[None]:
    """`module` returns `output` whatever it is called with, and is not run."""
    return replacing(module, "forward", lambda *_, **__: output)


def output_below(model: LanguageModel, rows: Sequence[list[int]], layer: int) -> Any:
    """What block `layer` - 1 returns for these prompts, padded on the right: for `resuming`."""
    return output_of(model, *pad(rows, model.device), layer - 1)


@contextmanager
def resuming(model: LanguageModel, layer: int, output: Any) -> Iterator[None]:
    """Passes over the prompts of `output_below` begin at block `layer`."""
    with ExitStack() as stack:
        for block in model.blocks[:layer]:
            stack.enter_context(giving(block, output))
        yield
