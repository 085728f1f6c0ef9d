"""The MLP projections of chosen layers replaced, one after another, by cheap layers fitted where they stand.

For each projection in forward order: its inputs x in the network as replaced so far, its
outputs y in the untouched one, at every real token of the training prompts, streamed into
moments with one fold for each group of prompts; penalty by K-fold; the layer of `closed_form` or `low_rank`
nearest on them; then the next, which sees what this one made of its inputs.

Cost: that of `activations` and the moments of `closed_form`; memory that of the moments, once for each fold, and of
`activations`. Fitted layers are stored in `build/cache/` by the content of model, prompts and code, so that the same
replacements are fitted once.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial, reduce
from operator import add
from pathlib import Path
from typing import TypeVar

from safetensors.torch import load, save
from torch import Tensor, nn
from tqdm import tqdm

from chassis_utils.circulant.activations import PairedForward
from chassis_utils.circulant.closed_form import CirculantMoments, activation_aware, choose_circulant_penalty
from chassis_utils.circulant.layer import BlockCirculantLinear
from chassis_utils.circulant.low_rank import LowRankLinear, equal_rank, low_rank, low_rank_aware
from chassis_utils.circulant.patch import as_linear, mlp_projections
from chassis_utils.files import CACHE, cached
from chassis_utils.linalg.moments import Moments
from chassis_utils.linalg.regression import choose_penalty
from chassis_utils.lm.checkpoint import require_weights
from chassis_utils.lm.model import LanguageModel
from chassis_utils.text.corpus import content_key
from chassis_utils.text.prompts import Prompt, fold_numbers

ROOMS = ("circulant", "linalg", "lm", "text")  # whose code decides what is fitted
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
    """Path -> layer for every MLP projection of `layers`, for `patch`; the model is left as it was.

    >>> from chassis_utils import load, replacements
    >>> [path.rpartition(".")[2] for path in replacements(load("models/port-llama"), [0], 8, how="average")]
    ['gate_proj', 'up_proj', 'down_proj']

    `how`: `average` and `aware` (block-circulant), `low_rank` and `low_rank_aware` (with at most as many weights),
    `zero` (the last projection of each MLP gives nothing). The aware ones are fitted on `prompts`; with `sequential`
    false, to the inputs of the untouched network.

    Raises `ValueError` for an unknown `how`, prompts that cannot be read or held out, activations that are not finite,
    and layers or block sizes that do not fit.
    """
    if how not in (*FIXED, *FITTED):
        raise ValueError(f"replacement {how!r} is unknown: use one of {', '.join((*FIXED, *FITTED))}")
    if not isinstance(layers, Iterable) or not list(layers):
        raise ValueError(f"layers {layers!r} name none to be replaced: give a list of at least one number")
    require_weights(model.network, f"replacing MLPs of {model.name!r}")
    mlps = [mlp_projections(model.network, layer) for layer in sorted(set(layers))]
    if how == "zero":
        return {path: _nothing(as_linear(module)) for path, module in (list(mlp.items())[-1] for mlp in mlps)}
    modules = {path: module for mlp in mlps for path, module in mlp.items()}
    if how in FIXED:
        return {path: _of_weights(as_linear(module), block_size, how) for path, module in modules.items()}
    stored = _fitted_once(model, layers, block_size, how, prompts, sequential)
    return {path: _restored(as_linear(module), path, stored) for path, module in modules.items()}


def _fitted_once(
    model: LanguageModel, layers: Sequence[int], block_size: int, how: str, prompts: Sequence[Prompt], sequential: bool
) -> dict[str, Tensor]:
    """The parameters of fitted layers, from the cache where they have been fitted before."""
    made_by = f"{_code()} {model.made_with}"
    folds = fold_numbers(list(prompts))
    fitted_on = [(prompt.text, fold) for prompt, fold in zip(prompts, folds, strict=True)]
    key = content_key(f"{made_by} {sorted(set(layers))} {block_size} {how} {sequential} {fitted_on}")

    def fit_all() -> bytes:
        fitted = _fitted_in_order(model, layers, block_size, how, prompts, sequential)
        tensors = {f"{path}.{name}": t for path, layer in fitted.items() for name, t in layer.state_dict().items()}
        return save({name: tensor.cpu() for name, tensor in tensors.items()})

    return load(cached(CACHE / f"replaced-{key}", fit_all))


@cache
def _code() -> str:
    """Stands for the code that fits: layers of another version are not taken from the cache."""
    package = Path(__file__).parent.parent
    files = sorted(file for room in ROOMS for file in (package / room).glob("*.py"))
    return content_key("".join(file.read_text("utf-8") for file in files))


def _restored(linear: nn.Linear, path: str, stored: Mapping[str, Tensor]) -> nn.Module:
    """The layer whose parameters are stored under `path`."""
    bias = stored[f"{path}.bias"]
    if f"{path}.c" in stored:
        return BlockCirculantLinear.of(linear, stored[f"{path}.c"], bias)
    return LowRankLinear.of(linear, stored[f"{path}.down"], stored[f"{path}.up"], bias)


def _fitted_in_order(
    model: LanguageModel, layers: Sequence[int], block_size: int, how: str, prompts: Sequence[Prompt], sequential: bool
) -> dict[str, nn.Module]:
    """One projection after another, each on what those before it leave (or, not `sequential`, on the untouched)."""
    pairs = [PairedForward(model, fold, min(layers)) for fold in by_fold(prompts)]
    layers_in_place: dict[str, nn.Module] = {}
    total = sum(len(mlp_projections(model.network, layer)) for layer in set(layers))
    bar = tqdm(total=total, desc=f"{how} layers of {model.name}", disable=None, leave=False)
    for layer in range(min(layers), max(layers) + 1):
        for path, module in mlp_projections(model.network, layer).items() if layer in layers else ():
            before = dict(layers_in_place) if sequential else {}
            layers_in_place[path] = _fitted(how, as_linear(module), pairs, path, before, block_size)
            bar.update()
        for pair in pairs if layer < max(layers) else ():
            pair.advance(layers_in_place if sequential else {})
    bar.close()
    return layers_in_place


def collect(
    pairs: Sequence[PairedForward],
    path: str,
    before: Mapping[str, nn.Module],
    moments_of: Callable[[Tensor, Tensor], Sums],
) -> list[Sums]:
    """The moments of `PairedForward.activations`, streamed; one for each pair."""
    return [reduce(add, (moments_of(x, y) for x, y in pair.activations(path, before))) for pair in pairs]


def by_fold(prompts: Sequence[Prompt]) -> list[list[str]]:
    """The texts of each fold, for one pair each."""
    numbers = fold_numbers(list(prompts))
    return [
        [prompt.text for prompt, number in zip(prompts, numbers, strict=True) if number == fold]
        for fold in range(max(numbers) + 1)
    ]


def _nothing(linear: nn.Linear) -> LowRankLinear:
    return LowRankLinear.of(linear, linear.weight[:0], linear.weight[:, :0], None)


def _of_weights(linear: nn.Linear, block_size: int, how: str) -> nn.Module:
    if how == "average":
        return BlockCirculantLinear.from_linear(linear, block_size)
    return low_rank(linear, equal_rank(linear, block_size))


def _fitted(
    how: str,
    linear: nn.Linear,
    pairs: Sequence[PairedForward],
    path: str,
    before: Mapping[str, nn.Module],
    block_size: int,
) -> nn.Module:
    if how == "aware":
        sums = collect(pairs, path, before, partial(CirculantMoments.of, block_size=block_size))
        return activation_aware(linear, reduce(add, sums), choose_circulant_penalty(linear, sums)[0])
    moments = collect(pairs, path, before, Moments.of)
    return low_rank_aware(linear, reduce(add, moments), choose_penalty(moments)[0], equal_rank(linear, block_size))
