"""Edits at several layers and at the last state, fitted one after another to an expert's own states.

Where the expert shares the base's architecture, its state t_l at a layer says what the base's s_l should be there:

    h_l <- h_l + (h_l A_l) B_l^T + b_l,   fitted to t_l - s_l on s_l

by reduced-rank ridge, penalty and rank by K-fold over groups. In order of depth each is fitted on the states that the
edits before it leave in the real network (`lm.stream`), the one at the last state under the vocabulary metric. Rank 0
is the mean difference, a steering vector. A gate follows every fit: the KL on a fold kept out of all fits decides
whether the edit stays, in full, at half length or not at all. What stays is fitted once more, to all folds. Cost: two
passes over the rows, and for each layer and length one of the kept-out rows through the blocks that are left.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor, nn

from chassis_utils.adapters.adapter import Adapter
from chassis_utils.adapters.fit import AdapterPath, fit_moments
from chassis_utils.experts.prompted import Answered
from chassis_utils.linalg.moments import Moments, by_fold
from chassis_utils.linalg.regression import choose_rank, vocabulary_metric
from chassis_utils.lm.model import ROWS, Head, LanguageModel
from chassis_utils.lm.stream import Stream
from chassis_utils.metrics import clearly_lower, kl_divergence

LENGTHS = (1.0, 0.5)  # of an edit, tried beside none


@dataclass(frozen=True)
class Depth:
    """Edits by layer; the one at `depth` is that of the last state."""

    edits: Mapping[int, Adapter]
    judged: Mapping[int, float]  # the judges' mean KL before all edits (0) and after each layer's gate, nats

    @property
    def parameters(self) -> int:
        """Numbers stored."""
        return sum(adapter.parameters for adapter in self.edits.values())

    @contextmanager
    def in_place(self, model: LanguageModel, start: int) -> Iterator[None]:
        """Until the end of the `with` block the network edits its states at columns `start` and later.

        In a batch padded on the left `start` is the last column of the prompts. It holds for `forward` and `generate`,
        with and without a cache, and with beams. Raises `ValueError` for adapters of another head.
        """
        for adapter in self.edits.values():
            adapter.check(model.head)
        end = 0  # of the columns that the pass at hand reads

        def count(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            nonlocal end
            cache = named.get("past_key_values")
            ids = positional[0] if positional else named["input_ids"]
            end = ids.shape[1] + (cache.get_seq_length() if cache is not None else 0)

        def change(adapter: Adapter, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            h = inputs[0]
            before = max(0, h.shape[1] - (end - start))
            tail = h[:, before:]
            edit = adapter.edit(tail.flatten(0, 1).cpu()).to(h).view_as(tail)
            return (torch.cat([h[:, :before], tail + edit], dim=1), *inputs[1:])

        with ExitStack() as hooks:
            hooks.callback(model.body.register_forward_pre_hook(count, with_kwargs=True).remove)
            places = [*model.blocks, model.network.get_output_embeddings()]
            for layer, adapter in self.edits.items():
                hooks.callback(places[layer].register_forward_pre_hook(partial(change, adapter)).remove)
            yield


@dataclass(frozen=True)
class Lesson:
    """What edits are fitted to, or measured on: the base's rows, and the expert's states at the same tokens."""

    stream: Stream  # of the base's rows
    targets: Mapping[int, Float[Tensor, "n d"]]  # the expert's states by layer, `depth` among them
    owners: Sequence[int]  # the question of each sample
    folds: Sequence[int]  # of each sample; what shares one is never on both sides of a fit and its judgement

    @classmethod
    def of(cls, model: LanguageModel, answered: Answered, layers: Sequence[int], folds: Sequence[int]) -> "Lesson":
        """Read the expert's states at `layers` and the last; `folds` numbers each question's.

        Raises `ValueError` for layers that are none of 1 to `depth` - 1, and folds that are not one for each question.
        """
        wrong = [layer for layer in layers if not 0 < layer < model.depth]
        if wrong or len(folds) != len(answered.lengths):
            raise ValueError(
                f"layers {wrong or list(layers)} and {len(folds)} folds: {model.name} takes layers 1 to "
                f"{model.depth - 1}, and each of {len(answered.lengths)} questions a fold"
            )
        expert, targets = Stream.of(model, answered.expert_rows, answered.lengths), {}
        for layer in sorted({*layers, model.depth}):
            expert = expert.on_to(layer)
            targets[layer] = expert.samples()
        owners = answered.owners()
        stream = Stream.of(model, answered.base_rows, answered.lengths)
        return cls(stream, targets, owners, [folds[k] for k in owners])

    @property
    def head(self) -> Head:
        """The head that base and expert share."""
        return self.stream.model.head

    @property
    def names(self) -> list[str]:
        """The question of each sample, the cluster of standard errors."""
        return [str(owner) for owner in self.owners]

    def at(self, layer: int) -> "Lesson":
        """The same with the base's rows read up to a layer."""
        return self if layer == self.stream.layer else replace(self, stream=self.stream.on_to(layer))

    def edited(self, adapter: Adapter) -> "Lesson":
        """The same with an edit where the base's rows are."""
        return replace(self, stream=self.stream.edited(adapter.edit))

    def moments(self) -> list[Moments]:
        """Of each fold, from the base's states here to what they lack."""
        h = self.stream.samples()
        return by_fold(h, self.targets[self.stream.layer].double() - h.double(), self.folds)

    def last(self, edits: Mapping[int, Adapter] | None = None) -> Shaped[Tensor, "n d"]:
        """The states that the head reads, under the edit here and under further ones by layer."""
        lesson = self
        for layer, adapter in sorted((edits or {}).items()):
            lesson = lesson.at(layer).edited(adapter)
        return lesson.stream.finished()

    def kl(self, edits: Mapping[int, Adapter] | None = None) -> Float64[Tensor, "n"]:
        """KL(expert || base under these edits) at each sample, nats."""
        pairs = zip(self.targets[self.stream.model.depth].split(ROWS), self.last(edits).split(ROWS), strict=True)
        return torch.cat([kl_divergence(self.head(target), self.head(h)) for target, h in pairs])


def fit_depth(taught: Lesson, judges: Lesson, layers: Sequence[int], rank: int) -> Depth:
    """Edits of at most `rank` at `layers`, `depth` meaning the last state, fitted in closed form and gated.

    Each is fitted to `taught` and kept where the KL on `judges`, of which the fits know nothing, is clearly lower with
    it: by more than a standard error, samples of one question counting as one. What is kept is fitted again to both.
    Raises `ValueError` for a layer whose targets the lessons lack, a rank beyond the width, and a single fold.
    """
    lacking = sorted(set(layers) - (set(taught.targets) & set(judges.targets)))
    if lacking or len(set(taught.folds)) < 2:
        what = f"no states of layer {lacking[0]}" if lacking else "a single fold to fit on"
        raise ValueError(f"the lessons hold {what}: read them with these layers, and two folds at least")
    kept: dict[int, tuple[float, int, float]] = {}
    best, parts = judges.kl(), (taught, judges)
    judged = {0: float(best.mean())}
    for layer in sorted(layers):
        taught, judges = taught.at(layer), judges.at(layer)
        path = _fit([taught])
        chosen = _rank(path, rank)
        tried = {length: judges.edited(path.at(chosen).scaled(length)) for length in LENGTHS}
        kls = {length: lesson.kl() for length, lesson in tried.items()}
        length = min(kls, key=lambda length: float(kls[length].mean()))
        if clearly_lower(kls[length], best, judges.names):
            kept[layer] = length, chosen, path.penalty / len(taught.owners)
            taught, judges, best = taught.edited(path.at(chosen).scaled(length)), tried[length], kls[length]
        judged[layer] = float(best.mean())
    return Depth(_fit_all(parts, kept), judged)


def _fit_all(parts: tuple[Lesson, ...], kept: Mapping[int, tuple[float, int, float]]) -> dict[int, Adapter]:
    """The edits of these lengths, ranks and penalties per sample, fitted to all parts together."""
    edits: dict[int, Adapter] = {}
    samples = sum(len(part.owners) for part in parts)
    for layer, (length, rank, penalty) in kept.items():
        parts = tuple(part.at(layer) for part in parts)
        edits[layer] = _fit(parts, penalty * samples).at(rank).scaled(length)
        parts = tuple(part.edited(edits[layer]) for part in parts)
    return edits


def _fit(parts: Sequence[Lesson], penalty: float | None = None) -> AdapterPath:
    """The edits of every rank where the parts' rows are; the penalty by K-fold unless given."""
    model, layer = parts[0].stream.model, parts[0].stream.layer
    folds = [fold for part in parts for fold in part.moments()]
    metric = None
    if layer == model.depth:
        target = torch.cat([part.targets[layer] for part in parts])
        metric = vocabulary_metric(model.head.weight, model.head.mean_probabilities(target))
    return fit_moments(folds, model.head, metric, penalty)


def _rank(path: AdapterPath, most: int) -> int:
    """The rank by K-fold: 0, a power of two or `most`."""
    ranks = sorted({0, *(2**k for k in range(most.bit_length()) if 2**k < most), most})
    return choose_rank(path.folds, path.penalty, path.metric, ranks)[0] if most else 0
