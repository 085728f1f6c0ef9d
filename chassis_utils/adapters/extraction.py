"""What further training changed in the weights, at low rank: a closed form for those who hold both checkpoints.

For each linear layer of the blocks whose weights differ, D = W' - W, the change D_r of rank r that errs least on the
layer's own inputs x: it minimises the sum of ||x (D - D_r)^T||^2. With G = sum x^T x it is the best approximation of
D G^(1/2), of which one SVD gives every rank (the whitening of activation-aware SVD, as in SVD-LLM, arXiv 2403.07378).
All else that differs stays the base's: norms, embeddings, head, biases, layers of other shapes or other kinds. Unlike
a fit it passes no gate. Cost: a pass of the base over the rows, and for each layer a few d^3. Memory: d_x^2 numbers in
float64 for each input that layers read.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from tqdm import tqdm

from chassis_utils.adapters.lora import LoRA, digest, injected
from chassis_utils.experts.sibling import Sibling
from chassis_utils.limits import require_memory
from chassis_utils.linalg.moments import gram_matrix
from chassis_utils.lm.checkpoint import require_weights
from chassis_utils.lm.forward import batches, encode, pad
from chassis_utils.lm.model import LanguageModel

RIDGE = 1e-6  # of the inputs' mean eigenvalue, added to all: a direction that no input has counts little, not nothing


def extract(base: LanguageModel, sibling: LanguageModel, texts: Sequence[str], rank: int) -> LoRA:
    """The change of `rank` in every linear layer that takes `base` towards `sibling`, on the tokens of `texts`.

    The result's `save` writes it as a folder that peft reads. Raises `TypeError` for what are no models or texts;
    `ValueError` for checkpoints of other tokenizers, depth or width, without a linear layer that differs, a rank below
    one, and texts that cannot be read; `MemoryError` where the moments do not fit.

    >>> from chassis_utils import extract, load
    >>> base, sibling = load("models/port-llama"), load("models/sibling-math")
    >>> extract(base, sibling, [f"What is {i} + {i + 3}?" for i in range(9)], rank=4).parameters
    147968
    """
    Sibling(base, sibling)  # refuses what are no models, and another tokenizer
    return extract_rows(base, sibling, encode(base, texts), rank)


def extract_rows(base: LanguageModel, sibling: LanguageModel, rows: Sequence[list[int]], rank: int) -> LoRA:
    """The same on rows of token ids."""
    for model in (base, sibling):
        require_weights(model.network, f"to extract from {model.name!r}")
    paths = _changed(base, sibling, rank)
    grams = _grams(base, rows, paths)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        made = injected(base, rank, paths, seed=0)
        for path in tqdm(paths, desc="layers", disable=None, leave=False):
            ours, theirs = (model.network.get_submodule(path).weight.double() for model in (base, sibling))
            down, up = _nearest(theirs - ours, grams[path], rank)
            layer = made.network.get_submodule(path)
            layer.lora_A["default"].weight.copy_(down)
            layer.lora_B["default"].weight.copy_(up / layer.scaling["default"])
    return LoRA(replace(made, fingerprint=f"{base.fingerprint}+{digest(made)}"))


def _changed(base: LanguageModel, sibling: LanguageModel, rank: int) -> list[str]:
    """The linear layers of the blocks whose weights differ; `ValueError` where that cannot be said."""
    sizes = [(model.depth, model.width) for model in (base, sibling)]
    if not isinstance(rank, int) or rank < 1 or sizes[0] != sizes[1]:
        raise ValueError(
            f"rank {rank!r} for {sibling.name!r} of {sizes[1][0]} blocks of width {sizes[1][1]} and {base.name!r} of "
            f"{sizes[0][0]} of {sizes[0][1]}: give a rank of one or more, and a checkpoint of the base's own sizes"
        )
    inside, theirs = {id(m) for block in base.blocks for m in block.modules()}, dict(sibling.network.named_modules())
    paths = []
    for path, module in base.network.named_modules():
        other = theirs.get(path)
        if id(module) in inside and isinstance(module, nn.Linear) and isinstance(other, nn.Linear):
            same_shape = module.weight.shape == other.weight.shape
            paths += [path] if same_shape and not torch.equal(module.weight, other.weight) else []
    if not paths:
        raise ValueError(
            f"no torch.nn.Linear in the blocks of {base.name!r} differs from that of {sibling.name!r}: give a "
            "checkpoint that was trained further, of an architecture with such layers"
        )
    return paths


@torch.no_grad()
def _grams(
    model: LanguageModel, rows: Sequence[list[int]], paths: Sequence[str]
) -> dict[str, Float64[Tensor, "d_x d_x"]]:
    """The sum of x^T x over the inputs of each layer, at every token; layers that read the same tensor share one."""
    sizes = [model.network.get_submodule(path).weight.shape[1] for path in paths]
    require_memory(8 * sum(size**2 for size in sizes), f"the moments of {len(paths)} layers", "use a smaller model")
    grams, now = dict[str, Tensor](), dict[str, Any]()

    def note(path: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0] is now.get("input"):  # queries, keys and values, or gate and up
            grams[path] = grams[now["path"]]
            return
        if inputs[0].numel() != now["real"].numel() * inputs[0].shape[-1]:
            raise ValueError(f"{path!r} reads only some of the tokens: extraction takes no mixtures of experts")
        x = inputs[0].reshape(*now["real"].shape, -1)[now["real"]]
        grams[path] = gram_matrix(x) if path not in grams else grams[path].add_(gram_matrix(x))
        now.update(input=inputs[0], path=path)

    with ExitStack() as hooks:
        for path in paths:
            hooks.enter_context(model.network.get_submodule(path).register_forward_pre_hook(partial(note, path)))
        for batch in batches(rows):
            ids, mask = pad([rows[k] for k in batch], model.device)
            now.update(real=mask.bool(), input=None)
            model.body(ids, attention_mask=mask, use_cache=False)
    unread = [path for path in paths if path not in grams]
    if unread:
        raise ValueError(f"{unread[0]!r} reads none of these rows: extraction takes no mixtures of experts")
    return grams


def _nearest(
    change: Float64[Tensor, "d_y d_x"], gram: Float64[Tensor, "d_x d_x"], rank: int
) -> tuple[Float64[Tensor, "r d_x"], Float64[Tensor, "d_y r"]]:
    """The factors of the change of `rank` nearest to `change` on inputs with this Gram matrix; padded with zeros."""
    values, vectors = torch.linalg.eigh(gram)
    roots = (values.clamp_min(0.0) + RIDGE * gram.trace() / len(gram)).sqrt()
    u, s, vt = torch.linalg.svd((change @ vectors) * roots, full_matrices=False)
    down, up = gram.new_zeros(rank, len(gram)), gram.new_zeros(len(change), rank)
    kept = min(rank, len(s))
    down[:kept], up[:, :kept] = (vt[:kept] / roots) @ vectors.T, u[:, :kept] * s[:kept]
    return down, up
