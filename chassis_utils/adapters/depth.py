"""Edits behind the attention of every block and at the last state, fitted one after another to an expert's own states.

The expert is the base behind a system prompt, or a sibling: the base trained further. Both read the same tokens, so the
expert's state t_l behind the attention of block l says what the base's x_l should be there (behind a prompt that is
where they part, since the attention alone sees it):

    x_l <- x_l + (x_l A_l) B_l^T + b_l,   fitted to t_l - x_l on x_l

by reduced-rank ridge, the penalty by K-fold over groups. In order of depth each is fitted on the states that the edits
before it leave in the real network (`lm.stream`); the one at the last state, under the vocabulary metric, sees the
tokens of answers alone. Rank 0 is the mean difference, a steering vector. A gate ends the fit: questions kept out of
it decide, by the KL, whether the edits stay. Cost: a pass over the rows with the attention of each block twice, and
for each layer a few d^3.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Float64, Int, Shaped
from torch import Tensor
from tqdm import tqdm

from chassis_utils.adapters.adapter import Adapter, HeldOut
from chassis_utils.adapters.fit import AdapterPath, check_rank, fit_moments, pulled_back
from chassis_utils.experts.prompted import Answered, PromptedExpert
from chassis_utils.experts.sibling import Sibling
from chassis_utils.files import write_together
from chassis_utils.limits import require_memory
from chassis_utils.linalg.moments import by_fold
from chassis_utils.linalg.regression import vocabulary_metric
from chassis_utils.lm.attention import check_attention
from chassis_utils.lm.model import ROWS, Head, LanguageModel
from chassis_utils.lm.stream import Stream
from chassis_utils.lm.tokenizer import read_json
from chassis_utils.metrics import clearly_lower, kl_divergence
from chassis_utils.text.prompts import deal, require_texts

CONFIG = "depth.json"
FOLDS = 6  # of the questions; one of them judges
SHARE = 0.01  # of the base's parameters, that all edits may have together


@dataclass(frozen=True)
class Depth:
    """Edits by block, and, as that of `depth`, of the last state; none where the gate found them no better.

    `Port.plug` takes them as one adapter.

    >>> import tempfile
    >>> from chassis_utils import Depth, fit_prompt, load
    >>> base = load("models/port-llama")
    >>> told = fit_prompt(base, "Words about arrays.", [f"The size of {c}." for c in "abcdefghijklmn"], tokens=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     told.save_pretrained(folder)
    ...     Depth.from_pretrained(folder, base.head).parameters == told.parameters
    True
    """

    edits: Mapping[int, Adapter]
    skip: int  # tokens at the beginning of a row that are left alone
    held_out: HeldOut  # as the gate found it

    @property
    def parameters(self) -> int:
        """Numbers stored."""
        return sum(adapter.parameters for adapter in self.edits.values())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write each edit to a folder of its own, and last what joins them; `OSError` where that is not possible."""
        folder = Path(folder)
        for layer, adapter in self.edits.items():
            adapter.save_pretrained(folder / f"layer_{layer}")
        config = {"layers": sorted(self.edits), "skip": self.skip, "held_out": asdict(self.held_out)}
        write_together({folder / CONFIG: json.dumps(config, indent=2) + "\n"})

    @classmethod
    def from_pretrained(cls, folder: str | Path, head: Head) -> "Depth":
        """Read what `save_pretrained` wrote; `ValueError` for what is missing or damaged, and another head."""
        path = Path(folder) / CONFIG
        if not path.is_file():
            raise ValueError(f"{path.parent.name!r} holds no {CONFIG}: name a folder that edits at depth were saved to")
        config = read_json(path)
        try:
            layers, held_out = list(map(int, config["layers"])), HeldOut(**config["held_out"])
            edits = {layer: Adapter.from_pretrained(path.parent / f"layer_{layer}", head) for layer in layers}
            return cls(edits, int(config["skip"]), held_out)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{CONFIG} of {path.parent.name!r} is damaged ({error}): save it anew") from None


@dataclass(frozen=True)
class Lesson:
    """What edits are fitted to, or measured on: the base's rows, and the expert's states at the same tokens."""

    stream: Stream  # of the base's rows
    expert: Head
    targets: Mapping[int, Float[Tensor, "n d"]]  # the expert's states by layer, `depth` among them
    owners: Int[Tensor, "n"]  # the question of each sample
    answering: Bool[Tensor, "n"]  # whether the next token is one of the answer
    folds: Int[Tensor, "n"]  # what shares one is never on both sides of a fit and its judgement
    skip: int

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        answered: Answered,
        layers: Sequence[int],
        folds: Sequence[int],
        sibling: LanguageModel | None = None,
    ) -> "Lesson":
        """Read the expert's states behind the attention of `layers` and at the end; `folds` numbers each question's.

        The expert is the model itself, which reads its own rows, unless a sibling is given. Raises `ValueError` for
        layers that are none of 0 to `depth` - 1, folds that are not one for each question, a sibling of other sizes,
        and blocks that read on from something else than their attention's sum; `MemoryError` where the states do not
        fit.
        """
        wrong = [layer for layer in layers if not 0 <= layer < model.depth]
        if wrong or len(folds) != len(answered.lengths):
            raise ValueError(
                f"layers {wrong or list(layers)} and {len(folds)} folds: {model.name} takes layers 0 to "
                f"{model.depth - 1}, and each of {len(answered.lengths)} questions a fold"
            )
        told = sibling or model
        if (told.depth, told.width) != (model.depth, model.width):
            raise ValueError(
                f"{told.name!r} has {told.depth} blocks of width {told.width}, {model.name!r} {model.depth} of "
                f"{model.width}: edits at depth take a checkpoint of the base's own sizes, others `fit`"
            )
        for read in (model, *([sibling] if sibling else [])):
            check_attention(read)
        size = sum(answered.lengths) * model.width * model.network.dtype.itemsize
        held = len({*layers, model.depth}) + 2  # and what the two streams keep
        require_memory(size * held, f"the states of {sum(answered.lengths)} tokens", "give fewer or shorter texts")
        expert, targets = Stream.of(told, answered.expert_rows, answered.lengths), {}
        for layer in sorted({*layers, model.depth}):
            expert = expert.on_to(layer) if layer else expert
            targets[layer] = expert.samples()
        owners, answering = answered.samples()
        stream = Stream.of(model, answered.base_rows, answered.lengths)
        return cls(stream, told.head, targets, owners, answering, torch.tensor(folds)[owners], answered.skip)

    @property
    def head(self) -> Head:
        """The base's."""
        return self.stream.model.head

    @property
    def names(self) -> list[str]:
        """The question of each sample of an answer, the cluster of standard errors."""
        return [str(owner) for owner in self.owners[self.answering].tolist()]

    def at(self, layer: int) -> "Lesson":
        """The same with the base's rows read up to a layer."""
        return self if layer == self.stream.layer else replace(self, stream=self.stream.on_to(layer))

    def under(self, model: LanguageModel) -> "Lesson":
        """The same with the base's rows read, from the beginning, by a changed copy of it."""
        return replace(self, stream=replace(self.stream, model=model, layer=0, edit=None))

    def edited(self, adapter: Adapter) -> "Lesson":
        """The same with an edit where the base's rows are."""
        return replace(self, stream=self.stream.edited(adapter.edit))

    def fit(self) -> AdapterPath:
        """The edits of every rank where the base's rows are; the penalty by K-fold."""
        layer, last = self.stream.layer, self.stream.layer == self.stream.model.depth
        here = self.answering | (not last)
        h, target = self.stream.samples()[here], self.targets[layer][here]
        edits, metric = target.double() - h.double(), None
        if last:
            likely = self.expert.mean_probabilities(target)
            metric = vocabulary_metric(self.head.weight, likely)
            if self.expert.fingerprint != self.head.fingerprint:
                pairs = zip(h.split(ROWS), target.split(ROWS), strict=True)  # the logits of all are too many at once
                changes = (self.head.unfinish(self.expert(t)) - self.head.product(x) for x, t in pairs)
                edits = pulled_back(changes, self.head, likely)
        return fit_moments(by_fold(h, edits, self.folds[here].tolist()), self.head, metric)

    def last(self, edits: Mapping[int, Adapter] | None = None) -> Shaped[Tensor, "m d"]:
        """The states that the head reads for the tokens of answers, under the edit here and further ones by layer."""
        lesson = self
        for layer, adapter in sorted((edits or {}).items()):
            lesson = lesson.at(layer).edited(adapter)
        return lesson.stream.finished()[self.answering]

    def target(self) -> Shaped[Tensor, "m d"]:
        """The states that the expert's head reads for them."""
        return self.targets[self.stream.model.depth][self.answering]

    base_kl = cached_property(lambda self: self.kl())  # of no edits, which every fit with these judges asks for

    def kl(self, edits: Mapping[int, Adapter] | None = None) -> Float64[Tensor, "m"]:
        """KL(expert || base under these edits) at each token of the answers, nats."""
        pairs = zip(self.target().split(ROWS), self.last(edits).split(ROWS), strict=True)
        return torch.cat([kl_divergence(self.expert(target), self.head(h)) for target, h in pairs])


def fit_depth(taught: Lesson, judges: Lesson, layers: Sequence[int], rank: int) -> Depth:
    """Edits of `rank` behind the attention of `layers`, `depth` meaning the last state, fitted in closed form.

    They are fitted to `taught` and kept where the KL on `judges`, of which the fits know nothing, is clearly lower with
    them: by more than a standard error, samples of one question counting as one.
    Raises `ValueError` for a layer whose targets the lessons lack, a rank beyond the width, and a single fold.
    """
    lacking = sorted(set(layers) - set(taught.targets))
    if lacking or len(taught.folds.unique()) < 2:
        what = f"no states of layer {lacking[0]}" if lacking else "a single fold to fit on"
        raise ValueError(f"the lesson holds {what}: read it with these layers, and two folds at least")
    edits: dict[int, Adapter] = {}
    for layer in tqdm(sorted(layers), desc="layers", disable=None, leave=False):
        taught = taught.at(layer)
        edits[layer] = taught.fit().at(rank)
        taught = taught.edited(edits[layer])
    base, kl = judges.base_kl, judges.kl(edits)
    kept = clearly_lower(kl, base, judges.names)
    return Depth(edits if kept else {}, taught.skip, HeldOut.of(kl if kept else base, base, judges.names))


def fit_prompt(
    base: LanguageModel, system: str, questions: Sequence[str], rank: int | None = None, tokens: int = 48
) -> Depth:
    """One edit in every block and at the last state, that makes `base` answer as if it had read a system prompt.

    It is fitted to the base's own answers, of at most `tokens` tokens, behind the prompt; every sixth question judges.
    Unless given, `rank` is the largest for which the edits are at most a hundredth of the base's parameters.

    Raises `TypeError` for what are no models or texts; `ValueError` for an empty prompt, fewer than twelve questions,
    a rank beyond the width, questions that with their answers are too long, and blocks without a place for edits.

    >>> from chassis_utils import fit_prompt, load
    >>> asked = [f"Returns {what} of the {thing}." for what in ("a list", "the size") for thing in "abcdefghi"]
    >>> told = fit_prompt(load("models/port-llama"), "Words about arrays.", asked, tokens=8)
    >>> told.held_out.kl <= told.held_out.base_kl
    True
    """
    expert, questions = PromptedExpert(base, system), list(dict.fromkeys(require_texts(questions)))
    rank = _checked(base, rank, questions)
    return _fit(base, expert.answered(questions, tokens), deal(questions, FOLDS), rank)


def fit_sibling(base: LanguageModel, sibling: LanguageModel, texts: Sequence[str], rank: int | None = None) -> Depth:
    """The same for a sibling of `base`, a checkpoint that was trained further: on every token of `texts` but the first.

    Memory: the sibling's state for each token and block. Raises as `fit_prompt`, `ValueError` for a checkpoint of
    another tokenizer or other sizes, and `MemoryError` where the states do not fit.

    >>> from chassis_utils import fit_sibling, load
    >>> sums = [f"How much is {i} + {i + 3}? It is {2 * i + 3}." for i in range(48)]
    >>> taught = fit_sibling(load("models/port-llama"), load("models/sibling-math"), sums)
    >>> taught.held_out.gap_closed > 0.5
    True
    """
    pair, texts = Sibling(base, sibling), list(dict.fromkeys(require_texts(texts)))
    rank = _checked(base, rank, texts)
    return _fit(base, pair.read(texts), deal(texts, FOLDS), rank, sibling)


def largest_rank(base: LanguageModel, share: float = SHARE) -> int:
    """The rank at which edits in every block and at the last state are at most that share of the base's parameters."""
    return min(max(0, int((share * base.parameters / (base.depth + 1) / base.width - 1) / 2)), base.width)


def _checked(base: LanguageModel, rank: int | None, texts: Sequence[str]) -> int:
    """The rank asked for, or the largest within `SHARE`; what cannot be fitted is refused before long work."""
    check_rank(rank, base.head)
    if len(texts) < 2 * FOLDS:
        raise ValueError(f"{len(texts)} different texts are too few: give {2 * FOLDS} at least, better hundreds")
    check_attention(base)
    return largest_rank(base) if rank is None else rank


def _fit(
    base: LanguageModel, answered: Answered, folds: Sequence[int], rank: int, sibling: LanguageModel | None = None
) -> Depth:
    """Edits in every block, fitted to all folds but the first, which judges."""
    numbers = [[k for k, fold in enumerate(folds) if bool(fold) == taught] for taught in (True, False)]
    taught, judges = (
        Lesson.of(base, answered.part(part), places, [folds[k] for k in part], sibling)
        for part, places in zip(numbers, (range(base.depth), []), strict=True)
    )
    return fit_depth(taught, judges, range(base.depth + 1), rank)
