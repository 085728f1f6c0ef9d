"""Prompts on their way through a network, block by block: as it is, and with layers replaced, side by side.

Both start at the same block with the same states. At each block the inputs that a linear layer of its MLP gets in the
network as replaced so far, and the outputs that it has in the untouched one, can be read; then both states move on.
What lies before a block is never run again, and a run of a block gives all that it can: a layer costs one run as it
is, one as replaced, and of its MLP alone another for each of its projections whose input an earlier replacement
changes. Memory: for each token two states of the model's width, and what two runs of a block note.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from chassis_utils.circulant.patch import mlp_projections, patch
from chassis_utils.linalg.moments import bad_rows
from chassis_utils.lm.forward import batches, encode, pad
from chassis_utils.lm.model import LanguageModel
from chassis_utils.lm.resume import Reached, giving, run_until


@dataclass
class _Run:
    """One run through a block: what was replaced, the states behind it, and what its parts read and gave."""

    replaced: frozenset[str]
    states: Float[Tensor, "n t d"]
    inputs: dict[str, Tensor]  # of each projection
    outputs: dict[str, Tensor]
    earlier: dict[nn.Module, Any]  # outputs of the block's parts before its first projection: attention, norms

    def holds(self, path: str, replaced: frozenset[str]) -> bool:
        """Whether the input of `path` is the same under these replacements: it is that of each new one too."""
        new = replaced - self.replaced
        return path in self.inputs and all(self.inputs.get(other) is self.inputs[path] for other in new)


@dataclass
class _Batch:
    """Prompts of similar length at the entry of a block, and the last runs through it."""

    prompts: list[str]
    real: Bool[Tensor, "n t"]
    untouched: Float[Tensor, "n t d"]
    replaced: Float[Tensor, "n t d"]
    others: tuple[Any, ...]  # positional arguments of the blocks after the states
    named: dict[str, Any]
    as_it_is: _Run | None = None
    as_replaced: _Run | None = None


class PairedForward:
    """`prompts` at the entry of block `layer`, in the untouched network and in the replaced one.

    Raises `ValueError` for prompts that the model cannot read and a layer that it does not have.
    """

    def __init__(self, model: LanguageModel, prompts: Sequence[str], layer: int = 0) -> None:
        if not 0 <= layer < model.depth:
            raise ValueError(f"there is no layer {layer}: this network has layers 0 to {model.depth - 1}")
        self.model, self.layer = model, layer
        ids = encode(model, prompts)
        self._batches = [self._enter([prompts[k] for k in batch], [ids[k] for k in batch]) for batch in batches(ids)]

    def activations(
        self, path: str, before: Mapping[str, nn.Module]
    ) -> Iterator[tuple[Float[Tensor, "tokens d_x"], Float[Tensor, "tokens d_y"]]]:
        """Inputs of the layer at `path` in this block with `before` in place, and its outputs without, by batch.

        Rows are the real tokens, in the model's dtype and on its device. Raises `ValueError` for a path that is no
        linear layer of this block's MLP, and where an activation is not finite, with the prompt.
        """
        projections = mlp_projections(self.model.network, self.layer)
        if path not in projections:
            raise ValueError(f"{path!r} is no layer that block {self.layer} runs: name one of this block")
        inside = self._inside(before)
        for batch in self._batches:
            batch.as_it_is = batch.as_it_is or self._through(batch, batch.untouched)
            if batch.as_replaced is None and batch.replaced is batch.untouched:
                batch.as_replaced = batch.as_it_is
            if batch.as_replaced is None or not batch.as_replaced.holds(path, frozenset(inside)):
                batch.as_replaced = self._through(batch, batch.replaced, inside)
            seen = batch.as_replaced.inputs[path], batch.as_it_is.outputs[path]
            x, y = (tensor.reshape(*batch.real.shape, -1)[batch.real] for tensor in seen)  # OPT flattens the batch
            for rows in (x, y):
                bad = bad_rows(rows)
                if len(bad):
                    prompt = batch.prompts[int(batch.real.nonzero()[bad[0], 0])][:60]
                    raise ValueError(
                        f"activations of {path!r} are not finite for prompt {prompt!r}: use float32 or drop it"
                    )
            yield x, y

    def advance(self, before: Mapping[str, nn.Module]) -> None:
        """On to the next block, through this one as it is, and with `before` in place."""
        inside = self._inside(before)
        for batch in self._batches:
            as_it_is = batch.as_it_is or self._through(batch, batch.untouched)
            apart = inside or batch.replaced is not batch.untouched
            batch.replaced = (self._through(batch, batch.replaced, inside) if apart else as_it_is).states
            batch.untouched = as_it_is.states
            batch.as_it_is, batch.as_replaced = None, None
        self.layer += 1

    def _inside(self, before: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        return {path: before[path] for path in mlp_projections(self.model.network, self.layer) if path in before}

    @torch.no_grad()
    def _enter(self, prompts: list[str], ids: list[list[int]]) -> _Batch:
        """Run the untouched network up to the block, and keep what it is called with."""
        padded, mask = pad(ids, self.model.device)
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def catch(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            calls.append((positional, named))
            raise Reached

        with self.model.blocks[self.layer].register_forward_pre_hook(catch, with_kwargs=True):
            run_until(self.model, padded, mask)
        ((states, *others), named), *_ = calls
        return _Batch(prompts, mask.bool(), states, states, tuple(others), named)

    @torch.no_grad()
    def _through(
        self, batch: _Batch, states: Float[Tensor, "n t d"], inside: Mapping[str, nn.Module] | None = None
    ) -> _Run:
        """Run the block with `inside` in place, and note what its projections read and give.

        What an earlier run from the same states found before the first projection is not run again.
        """
        run = _Run(frozenset(inside or {}), states, {}, {}, {})
        block, same = self.model.blocks[self.layer], batch.as_replaced if states is batch.replaced else None

        def note(path: str, _: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            run.inputs[path], run.outputs[path] = given[0], output.clone()  # Falcon adds to the last one in place

        def note_earlier(part: nn.Module, _: Any, output: Any) -> None:
            if not run.inputs:
                run.earlier[part] = output

        with ExitStack() as stack:
            stack.enter_context(patch(self.model.network, inside or {}))
            for path, module in mlp_projections(self.model.network, self.layer).items():
                stack.enter_context(module.register_forward_hook(partial(note, path)))
            for part in block.children():
                stack.enter_context(part.register_forward_hook(note_earlier))
            for part, output in same.earlier.items() if same else ():
                stack.enter_context(giving(part, output))
            output = block(states, *batch.others, **batch.named)
        run.states = output[0] if isinstance(output, tuple | list) else output
        return run
