"""Replaced layers trained to give back the logits of the untouched network, and both compared prompt by prompt.

Loss: mean over next-token positions of KL(teacher || student), the teacher's logits computed once; only
the parameters of the replacements move, by AdamW. Its step is about its rate whatever the gradient, so
the rate is a share of each parameter's size: entries of a block are averages of B weights, 1/sqrt(B) as
large, and the study's absolute 1e-3 moves them by half their norm in one step.

Cost: a forward and a backward pass for each batch, from the lowest replaced block on; what `compare.Teacher` keeps;
six times the trained parameters.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from chassis_utils.circulant.compare import Teacher
from chassis_utils.circulant.patch import patch
from chassis_utils.lm.model import LanguageModel
from chassis_utils.lm.resume import first_layer

Row = dict[str, int | float]


@dataclass(frozen=True)
class Settings:
    """How to calibrate.

    `rate` is a share of each parameter's root mean square at the start; with `absolute` it is the
    same number for all, as in the study (1e-3). With `patience` None every step is made and the last
    state kept, as in the study; else training ends after so many checks on held-out prompts
    without a better one, and the best state is kept. `every_token` counts all positions, not the last.
    """

    steps: int = 200
    batch: int = 16
    rate: float = 0.003
    absolute: bool = False
    every_token: bool = False
    check_every: int = 10
    patience: int | None = 5

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name in ("absolute", "every_token") or (name == "patience" and value is None):
                continue
            if not isinstance(value, int | float if name == "rate" else int):
                raise TypeError(f"{name} {value!r} is a {type(value).__name__}: give a number, whole but for the rate")
            if not value > 0:
                raise ValueError(f"{name} {value} is not above zero: give a larger one")


def calibrate(
    model: LanguageModel,
    replacements: Mapping[str, nn.Module],
    train: Sequence[str] | Teacher,
    held_out: Sequence[str] | Teacher,
    settings: Settings | None = None,
) -> pd.DataFrame:
    """Train `replacements` in place, and return step, train_kl and held_out_kl (nats per position) at each check.

    >>> from chassis_utils import calibrate, load, replacements
    >>> from chassis_utils.circulant.calibrate import Settings
    >>> model = load("models/port-llama")
    >>> layers = replacements(model, [7], block_size=8, how="average")
    >>> history = calibrate(model, layers, ["Return the mean."], ["Raise an error."], Settings(steps=2, check_every=1))
    >>> list(history["step"])
    [0, 1, 2]

    Batches go round through `train` in its order, so a run is decided by its arguments. The model is unpatched before
    and after; an interruption or an error gives the replacements back as they were. Prompts may be given with the
    teacher's logits there, which several runs then share.

    Raises `ValueError` for replacements without parameters, prompts that cannot be read or that are both trained on
    and held out, a teacher of other positions than `settings` asks for, and a loss that is not finite; `MemoryError`
    where the teacher's logits do not fit.
    """
    settings = settings or Settings()
    run = _Run(replacements, settings)
    learned, measured = _teachers(model, train, held_out, settings)
    layer = first_layer(model, replacements)
    bar = tqdm(total=settings.steps, desc="calibration", disable=None, leave=False)
    with patch(model.network, replacements), run, bar:
        run.check(measured.mean(layer))
        while not run.finished:
            batch = [k % len(learned.ids) for k in range(run.step * settings.batch, (run.step + 1) * settings.batch)]
            run.descend(learned.loss(batch, layer))
            if run.step % settings.check_every == 0 or run.step == settings.steps:
                run.check(measured.mean(layer))
            bar.update()
    return pd.DataFrame(run.history)


class _Run:
    """Trained parameters, their optimiser, and the best state so far.

    At the end of its `with` block the state to keep is in place, after an error the one of the start.
    """

    def __init__(self, replacements: Mapping[str, nn.Module], settings: Settings) -> None:
        self.settings = settings
        self.parameters: dict[str, nn.Parameter] = {}
        groups = []
        for path, module in replacements.items():
            own = {name: parameter for name, parameter in module.named_parameters() if parameter.numel()}
            self.parameters |= {f"{path}.{name}": parameter for name, parameter in own.items()}
            groups += [{"params": [own[name]], "lr": rate} for name, rate in _rates(own, settings).items()]
        if not groups:
            raise ValueError("these replacements have no parameters, so there is nothing to calibrate: leave them")
        self.optimiser = torch.optim.AdamW(groups)
        self.step, self.losses = 0, list[float]()
        self.history: list[Row] = []
        self._start = self._best = self._copy()

    @property
    def best(self) -> Row:
        """The check with the least KL on held-out prompts, the first of equal ones."""
        return min(self.history, key=lambda row: row["held_out_kl"])

    @property
    def finished(self) -> bool:
        """Whether all steps are made, or the last checks brought nothing better."""
        since = len(self.history) - 1 - self.history.index(self.best)
        patience = self.settings.patience
        return self.step >= self.settings.steps or (patience is not None and since >= patience)

    def descend(self, loss: Float[Tensor, ""]) -> None:
        """One step."""
        self.losses.append(_finite(float(loss.detach()), self.step))
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1

    def check(self, held_out_kl: float) -> None:
        """Note where the run stands."""
        train_kl = math.fsum(self.losses) / len(self.losses) if self.losses else math.nan
        self.history.append({"step": self.step, "train_kl": train_kl, "held_out_kl": _finite(held_out_kl, self.step)})
        self.losses.clear()
        if self.best is self.history[-1]:
            self._best = self._copy()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            self._put(self._start)
        elif self.settings.patience is not None:
            self._put(self._best)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
            parameter.grad = None

    def _copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}


def _teachers(
    model: LanguageModel, train: Sequence[str] | Teacher, held_out: Sequence[str] | Teacher, settings: Settings
) -> tuple[Teacher, Teacher]:
    every = settings.every_token
    if any(isinstance(given, Teacher) and given.every_token != every for given in (train, held_out)):
        raise ValueError(f"every_token is {every} here and {not every} of the teacher given")
    learned, measured = (p if isinstance(p, Teacher) else Teacher(model, p, every) for p in (train, held_out))
    both = [ids for ids in learned.ids if ids in measured.ids]
    if both:
        prompt = model.tokenizer.decode(both[0])[:60]
        raise ValueError(f"prompt {prompt!r} is both trained on and held out: remove it from one list")
    return learned, measured


def _rates(own: Mapping[str, nn.Parameter], settings: Settings) -> dict[str, float]:
    """The step of each parameter of one layer; one that starts at zero is as large as the layer's largest."""
    if settings.absolute:
        return dict.fromkeys(own, settings.rate)
    sizes = {name: float(value.detach().double().square().mean().sqrt()) for name, value in own.items()}
    return {name: settings.rate * (size or max(sizes.values())) for name, size in sizes.items()}


def _finite(kl: float, step: int) -> float:
    if not math.isfinite(kl):
        raise ValueError(f"the loss is {kl} after step {step}: lower the rate")
    return kl
