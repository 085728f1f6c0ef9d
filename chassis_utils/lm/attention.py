"""The place in the middle of a block: behind its attention, before its MLP.

There the residual stream holds x = h + a, what the block has read and what its attention adds. Where a network and the
same network behind a system prompt read the same token, this is where they part: up to here the weights do the same,
and the attention alone sees the prompt.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from chassis_utils.lm.model import PROBE, LanguageModel, blocks_path

Change = Callable[[Tensor], Tensor | None]  # x [n, t, d] -> what is added to it, or nothing


@contextmanager
def behind_attention(model: LanguageModel, layer: int, change: Change) -> Iterator[None]:
    """Until the end of the `with` block, what `change` returns for x in block `layer` is added to it in every pass.

    Raises `ValueError` for blocks without attention, or with one whose output is changed before it is added (Gemma).
    """
    block, read = model.blocks[layer], list[Tensor]()

    def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        read[:] = [inputs[0]]

    def add(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        a = output if isinstance(output, Tensor) else output[0]
        more = change(read[0] + a)
        if more is None:
            return None
        return a + more if isinstance(output, Tensor) else type(output)([a + more, *output[1:]])

    with block.register_forward_pre_hook(note), _attention(model, layer).register_forward_hook(add):
        yield


@torch.inference_mode()
def check_attention(model: LanguageModel) -> None:
    """Raise `ValueError` where x = h + a is not what the block reads on behind its attention."""
    block, seen, inputs = model.blocks[0], list[Tensor](), list[Tensor]()
    with ExitStack() as hooks:
        for child in block.children():
            hooks.enter_context(child.register_forward_pre_hook(lambda _, given: inputs.extend(given[:1])))
        hooks.enter_context(behind_attention(model, 0, seen.append))  # which returns nothing
        model.body(torch.tensor(model.encode([PROBE]), device=model.device), use_cache=False)
    if not any(torch.equal(given.flatten(0, -2), seen[0].flatten(0, -2)) for given in inputs):  # OPT flattens the batch
        raise ValueError(
            f"the blocks of {model.name!r} do not read on from what their attention adds to its input: edits behind "
            "the attention have no place there, use the last state alone"
        )


@contextmanager
def counting(model: LanguageModel) -> Iterator[list[Int[Tensor, "n t"]]]:
    """A list that holds, in every pass, the place of each token in its own row, padding on the left not counted."""
    places: list[Tensor] = []

    def count(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = positional[0] if positional else named["input_ids"]
        cache, mask = named.get("past_key_values"), named.get("attention_mask")
        if mask is None or mask.ndim != 2:
            mask = ids.new_ones(len(ids), ids.shape[1] + (cache.get_seq_length() if cache is not None else 0))
        places[:] = [(mask.cumsum(1) - 1)[:, -ids.shape[1] :]]

    around = model.network.get_submodule(blocks_path(model.network).rpartition(".")[0])  # OPT calls it past its body
    with around.register_forward_pre_hook(count, with_kwargs=True):
        yield places


def _attention(model: LanguageModel, layer: int) -> nn.Module:
    named = [
        child for name, child in model.blocks[layer].named_children() if name.lower().endswith(("attn", "attention"))
    ]
    if not named:
        raise ValueError(f"block {layer} of {model.name!r} has no attention: use the last state alone")
    return named[0]
