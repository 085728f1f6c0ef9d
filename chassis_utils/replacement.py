"""The MLP projections of chosen layers replaced, one after another, by cheap layers fitted where they stand.

For each projection in forward order: its inputs x in the network as replaced so far, its
outputs y in the untouched one, at every real token of the training prompts, streamed into
moments with one fold for each group of prompts; penalty by K-fold; the layer of `projections`
nearest on them; then the next, which sees what this one made of its inputs.

Cost: two passes over the prompts for each projection, up to that projection only, and
the moments of `projections`; memory that of the moments, once for each fold.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from operator import add
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from chassis_utils.circulant import BlockCirculantLinear
from chassis_utils.models import LanguageModel
from chassis_utils.moments import Moments
from chassis_utils.patching import as_linear, mlp_projections, patch
from chassis_utils.projections import (
    CirculantMoments,
    LowRankLinear,
    activation_aware,
    choose_circulant_penalty,
    equal_rank,
    low_rank,
    low_rank_aware,
)
from chassis_utils.prompts import Prompt, fold_numbers
from chassis_utils.regression import choose_penalty
from chassis_utils.states import batches, encode, pad

FIXED = ("zero", "average", "low_rank")  # of the weights alone
FITTED = ("aware", "low_rank_aware")  # on activations
Sums = TypeVar("Sums", Moments, CirculantMoments)


def replacements(
    model: LanguageModel,
    layers: Sequence[int],
    block_size: int,
    how: str,
    prompts: Sequence[Prompt] = (),
    sequential: bool = True,
) -> dict[str, nn.Module]:
    """Path -> layer for every MLP projection of `layers`, for `patching.patch`; the model is left as it was.

    `how`: `average` and `aware` (block-circulant), `low_rank` and `low_rank_aware` (with at
    most as many weights), `zero` (the last projection of each MLP gives nothing). The aware ones are
    fitted on `prompts`; with `sequential` false, to the inputs of the untouched network.

    Raises `ValueError` for an unknown `how`, prompts that cannot be read or held out, activations that
    are not finite, and layers or block sizes that do not fit.
    """
    if how not in (*FIXED, *FITTED):
        raise ValueError(f"replacement {how!r} is unknown: use one of {', '.join((*FIXED, *FITTED))}")
    mlps = [mlp_projections(model.network, layer) for layer in sorted(set(layers))]
    if how == "zero":
        return {path: _nothing(as_linear(module)) for path, module in (list(mlp.items())[-1] for mlp in mlps)}
    modules = {path: module for mlp in mlps for path, module in mlp.items()}
    if how in FIXED:
        return {path: _of_weights(as_linear(module), block_size, how) for path, module in modules.items()}
    folds = _by_fold(prompts)
    found: dict[str, nn.Module] = {}
    for path, module in tqdm(modules.items(), desc=f"{how} layers of {model.name}", disable=None, leave=False):
        before = dict(found) if sequential else {}
        if how == "aware":
            sums = collect(model, path, before, folds, partial(CirculantMoments.of, block_size=block_size))
            found[path] = _circulant(as_linear(module), sums)
        else:
            found[path] = _low_rank(as_linear(module), collect(model, path, before, folds, Moments.of), block_size)
    return found


def collect(
    model: LanguageModel,
    path: str,
    before: Mapping[str, nn.Module],
    folds: Sequence[Sequence[str]],
    moments_of: Callable[[Tensor, Tensor], Sums],
) -> list[Sums]:
    """The moments of `activations` over the prompts of each fold, streamed."""
    return [reduce(add, (moments_of(x, y) for x, y in activations(model, path, before, fold))) for fold in folds]


def activations(
    model: LanguageModel, path: str, before: Mapping[str, nn.Module], prompts: Sequence[str]
) -> Iterator[tuple[Float[Tensor, "tokens d_x"], Float[Tensor, "tokens d_y"]]]:
    """Inputs of the layer at `path` with the replacements `before` in place, and its outputs without, by batch.

    Rows are the real tokens, in the model's dtype and on its device. Raises `ValueError` for prompts that
    cannot be read, and where a row is not finite, with the prompt.
    """
    ids = encode(model, prompts)
    for batch in batches(ids):
        padded, mask = pad([ids[k] for k in batch], model.device)
        y = _run_to(model.network, path, padded, mask)[1]
        with patch(model.network, before):
            x = _run_to(model.network, path, padded, mask)[0]
        real = mask.bool()
        bad = (real & ~(torch.isfinite(x).all(-1) & torch.isfinite(y).all(-1))).nonzero()
        if len(bad):
            text = prompts[batch[int(bad[0, 0])]]
            raise ValueError(f"activations of {path!r} are not finite for prompt {text[:60]!r}: use float32 or drop it")
        yield x[real], y[real]


class _Reached(Exception):
    """The layer that was waited for has run: nothing behind it is needed."""


@torch.no_grad()
def _run_to(
    network: PreTrainedModel, path: str, ids: Int[Tensor, "n t"], mask: Int[Tensor, "n t"]
) -> tuple[Float[Tensor, "n t d_x"], Float[Tensor, "n t d_y"]]:
    """Input and output of one layer."""
    seen: list[Tensor] = []

    def catch(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.extend((inputs[0], output))
        raise _Reached

    hook = network.get_submodule(path).register_forward_hook(catch)
    try:
        network(ids, attention_mask=mask, use_cache=False)
    except _Reached:
        pass
    finally:
        hook.remove()
    x, y = seen
    return x, y


def _by_fold(prompts: Sequence[Prompt]) -> list[list[str]]:
    numbers = fold_numbers(list(prompts))
    return [
        [prompt.text for prompt, number in zip(prompts, numbers, strict=True) if number == fold]
        for fold in range(max(numbers) + 1)
    ]


def _nothing(linear: nn.Linear) -> LowRankLinear:
    sizes = (linear.in_features, linear.out_features)
    return LowRankLinear(*sizes, rank=0, bias=False, device=linear.weight.device, dtype=linear.weight.dtype)


def _of_weights(linear: nn.Linear, block_size: int, how: str) -> nn.Module:
    if how == "average":
        return BlockCirculantLinear.from_linear(linear, block_size)
    return low_rank(linear, equal_rank(linear, block_size))


def _circulant(linear: nn.Linear, folds: Sequence[CirculantMoments]) -> BlockCirculantLinear:
    penalty, _ = choose_circulant_penalty(linear, folds)
    return activation_aware(linear, reduce(add, folds), penalty)


def _low_rank(linear: nn.Linear, folds: Sequence[Moments], block_size: int) -> LowRankLinear:
    penalty, _ = choose_penalty(folds)
    return low_rank_aware(linear, reduce(add, folds), penalty, equal_rank(linear, block_size))
