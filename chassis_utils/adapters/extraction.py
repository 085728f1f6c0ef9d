"""What further training changed in the weights, at low rank: a closed form for those who hold both checkpoints.

For each linear layer of the blocks whose weights differ, D = W' - W, the change of rank r that is nearest to D on the
layer's own inputs x: it minimises the sum of ||x D^T - x D_r^T||^2 (reduced-rank regression of the one on the other,
as in activation-aware SVD). What else differs, norms, embeddings and head, stays the base's. Cost: a pass of the base
over the texts, and for each layer a few d^3.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from tqdm import tqdm

from chassis_utils.adapters.lora import LoRA, injected
from chassis_utils.experts.sibling import Sibling
from chassis_utils.linalg.moments import Moments
from chassis_utils.linalg.regression import reduced_rank
from chassis_utils.lm.forward import batches, encode, pad
from chassis_utils.lm.model import LanguageModel

RIDGE = 1e-6  # of the inputs' mean eigenvalue, added to all: a direction that no input has counts little, not nothing


def extract(base: LanguageModel, sibling: LanguageModel, texts: Sequence[str], rank: int) -> LoRA:
    """The change of `rank` in every linear layer that takes `base` towards `sibling`, on the tokens of `texts`.

    The result's `save` writes it as a folder that peft reads. Raises `ValueError` for checkpoints of other tokenizers
    or sizes, equal ones, a rank below one, and texts that cannot be read.

    >>> from chassis_utils import extract, load
    >>> base, sibling = load("models/port-llama"), load("models/sibling-math")
    >>> extract(base, sibling, [f"What is {i} + {i + 3}?" for i in range(9)], rank=4).parameters
    147968
    """
    Sibling(base, sibling)  # refuses another tokenizer
    changes = _changes(base, sibling)
    if not changes or rank < 1:
        raise ValueError(
            f"{len(changes)} linear layers of {base.name!r} and {sibling.name!r} differ, and the rank is {rank}: "
            "give checkpoints of the same sizes, one trained further, and a rank of one or more"
        )
    grams = _grams(base, texts, list(changes))
    made = injected(base, rank, sorted({path.rpartition(".")[2] for path in changes}), seed=0)
    with torch.no_grad():
        for path, change in tqdm(changes.items(), desc="layers", disable=None, leave=False):
            down, up = _nearest(change, grams[path], rank)
            layer = made.network.get_submodule(path)
            layer.lora_A["default"].weight.copy_(down)
            layer.lora_B["default"].weight.copy_(up / layer.scaling["default"])
    return LoRA(replace(made, fingerprint=f"{base.fingerprint}+{rank} of {sibling.fingerprint}"))


def _changes(base: LanguageModel, sibling: LanguageModel) -> dict[str, Float64[Tensor, "d_y d_x"]]:
    """By path, how the weights of the blocks' linear layers differ."""
    ours, theirs = (dict(model.network.named_modules()) for model in (base, sibling))
    inside = {id(module) for block in base.blocks for module in block.modules()}
    changes = {}
    for path, module in ours.items():
        other = theirs.get(path)
        if id(module) not in inside or not isinstance(module, nn.Linear) or not isinstance(other, nn.Linear):
            continue
        if module.weight.shape == other.weight.shape and not torch.equal(module.weight, other.weight):
            changes[path] = other.weight.detach().double() - module.weight.detach().double()
    return changes


@torch.no_grad()
def _grams(model: LanguageModel, texts: Sequence[str], paths: Sequence[str]) -> dict[str, Float64[Tensor, "d_x d_x"]]:
    """The sum of x x^T over the inputs of each layer, at every token."""
    rows, grams, real = encode(model, texts), dict[str, Tensor](), list[Tensor]()

    def note(path: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(*real[0].shape, -1)[real[0]].double()
            grams[path] = grams.get(path, 0) + x.T @ x

        return add

    with ExitStack() as hooks:
        for path in paths:
            hooks.callback(model.network.get_submodule(path).register_forward_pre_hook(note(path)).remove)
        for batch in batches(rows):
            ids, mask = pad([rows[k] for k in batch], model.device)
            real[:] = [mask.bool()]
            model.body(ids, attention_mask=mask, use_cache=False)
    return grams


def _nearest(
    change: Float64[Tensor, "d_y d_x"], gram: Float64[Tensor, "d_x d_x"], rank: int
) -> tuple[Float64[Tensor, "r d_x"], Float64[Tensor, "d_y r"]]:
    """The factors of the change of `rank` nearest to `change` on inputs with this Gram matrix; padded with zeros."""
    gram = gram + RIDGE * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    x_sum, y_sum = (gram.new_zeros(size) for size in reversed(change.shape))
    count = gram.new_tensor(len(gram) + 1.0)  # enough for a regression without a penalty
    path = reduced_rank(Moments(count, x_sum, y_sum, gram, gram @ change.T, change @ gram @ change.T), 0.0)
    down, up = gram.new_zeros(rank, len(gram)), gram.new_zeros(len(change), rank)
    kept = min(rank, len(path.singular_values))
    down[:kept], up[:, :kept] = path.left[:, :kept].T, path.right[:, :kept]
    return down, up
