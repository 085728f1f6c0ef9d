"""States of a model at the last token of each prompt, or at any tokens of it, at every layer.

Prompts are padded on the right and masked, whatever the tokenizer's default, and states are read at real tokens, so a
batch gives what each prompt alone gives. Layer 0 is the embeddings, the last is the state after the final norm: the
head's input. Computed once: stored by the content of model and prompts in `build/cache/`, under a lock, `PART` texts to
a file, so that notebooks running side by side share one pass, also where one of them reads the first of another's
texts. Each takes the files in an order of its own, so that two that need the same ones seldom wait for each other.
Cost: one forward pass per prompt, of which prompts that begin alike share the beginning (`lm.tree`); n * layers * width
numbers.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from random import Random

import torch
from jaxtyping import Float
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from chassis_utils.files import CACHE, cached
from chassis_utils.limits import require_disk, require_memory
from chassis_utils.lm.forward import batches, encode, layer_states, pad
from chassis_utils.lm.model import LanguageModel
from chassis_utils.lm.tree import Tree
from chassis_utils.text.corpus import content_key

Positions = Sequence[Sequence[int]] | None  # tokens of each text, by their number in it; or the last of each
FORMAT = 6  # raised whenever the same inputs give other states
PART = 128  # texts whose states lie in one file


def collect(
    model: LanguageModel, texts: Sequence[str], positions: Positions = None, layers: Sequence[int] | None = None
) -> Float[Tensor, "layers n d"]:
    """States [layers, n, width] of each text at its last token, or at its tokens `positions[k]`, text after text.

    >>> from chassis_utils import collect, load
    >>> collect(load("models/port-llama"), ["Return the", "What is 2 + 3?"]).shape  # layers, texts, width
    torch.Size([9, 2, 256])

    All layers, 0 to `depth`, unless given. Raises `ValueError` for a text without tokens or longer than the model
    reads, a position outside its text, a layer that there is not, and states that are not finite; `OSError` for a
    full disk and `MemoryError` for too little memory, both before the pass begins.
    """
    ids = encode(model, texts)
    chosen = [[len(row) - 1] for row in ids] if positions is None else [list(row) for row in positions]
    layers = list(range(model.depth + 1)) if layers is None else list(layers)
    _check_places(model, texts, ids, chosen, layers)
    parts = [slice(start, start + PART) for start in range(0, len(ids), PART)]
    made_by = f"{FORMAT} {model.made_with}"
    files = [CACHE / f"states-{content_key(f'{made_by} {ids[part]} {chosen[part]} {layers}')}" for part in parts]
    size = len(layers) * sum(map(len, chosen)) * model.width * model.network.dtype.itemsize
    purpose, remedy = f"the states of {sum(map(len, chosen))} tokens", "use fewer prompts or a smaller model"
    require_memory(2 * size, purpose, remedy)  # once more while they are put together
    if not all(file.exists() for file in files):
        require_disk(size, CACHE, purpose)
    read: dict[int, Tensor] = {}
    with tqdm(total=len(ids), desc=f"states of {model.name}", disable=None, leave=False) as bar:
        for number in Random().sample(range(len(parts)), len(parts)):
            part = parts[number]
            made = partial(_read, model, texts[part], ids[part], chosen[part], layers)
            read[number] = load(cached(files[number], made))["states"]
            bar.update(len(ids[part]))
    return torch.cat([read[number] for number in range(len(parts))], dim=1)


def last_states(model: LanguageModel, texts: Sequence[str], positions: Positions = None) -> Float[Tensor, "n d"]:
    """The states of the last layer, which the head reads, as `collect` gives them.

    Those of last tokens come from the pass that gives all layers, which other callers share.
    """
    if positions is None:
        return collect(model, texts)[-1]
    return collect(model, texts, positions, layers=[model.depth])[0]


def _check_places(
    model: LanguageModel, texts: Sequence[str], ids: list[list[int]], chosen: list[list[int]], layers: list[int]
) -> None:
    if len(chosen) != len(ids):
        raise ValueError(f"{len(chosen)} lists of positions for {len(ids)} texts: give one for each text")
    unknown = [layer for layer in layers if layer not in range(model.depth + 1)]
    if unknown:
        raise ValueError(f"there are no states of layer {unknown[0]!r}: {model.name!r} has 0 to {model.depth}")
    for text, row, places in zip(texts, ids, chosen, strict=True):
        outside = [place for place in places if place not in range(len(row))]
        if outside:
            raise ValueError(f"position {outside[0]} lies outside the {len(row)} tokens of prompt {text[:40]!r}")


@torch.inference_mode()
def _read(
    model: LanguageModel, texts: Sequence[str], ids: list[list[int]], chosen: list[list[int]], layers: list[int]
) -> bytes:
    together = Tree.of(ids)
    if together.suits(model):
        states = together.states(model)
        nodes = [path[place] for path, places in zip(together.nodes, chosen, strict=True) for place in places]
        read = torch.stack([states[layer][nodes].cpu() for layer in layers])
    else:
        read = _in_batches(model, ids, chosen, layers)
    _check_finite(read, layers, [text for text, row in zip(texts, chosen, strict=True) for _ in row])
    return save({"states": read})


def _in_batches(
    model: LanguageModel, ids: list[list[int]], chosen: list[list[int]], layers: list[int]
) -> Float[Tensor, "layers n d"]:
    starts = list(accumulate((len(places) for places in chosen), initial=0))  # of each text's rows in the result
    read = torch.empty(len(layers), starts[-1], model.width, dtype=model.network.dtype)
    for batch in batches(ids):
        padded, mask = pad([ids[k] for k in batch], model.device)
        states = layer_states(model, padded, attention_mask=mask, use_cache=False)
        rows = torch.tensor([row for row, k in enumerate(batch) for _ in chosen[k]], dtype=torch.long)
        places = torch.tensor([place for k in batch for place in chosen[k]], dtype=torch.long)
        targets = [starts[k] + j for k in batch for j in range(len(chosen[k]))]
        for number, layer in enumerate(layers):
            read[number, targets] = states[layer][rows, places].cpu()
    return read


def _check_finite(read: Float[Tensor, "layers n d"], layers: list[int], texts: Sequence[str]) -> None:
    bad = (~torch.isfinite(read).all(-1)).nonzero()
    if len(bad):
        number, k = bad[0].tolist()
        raise ValueError(
            f"state of layer {layers[number]} is not finite for prompt {texts[k][:60]!r}: use float32 or drop it"
        )
