"""A live model as a port: adapters plugged in by name, used for a whole batch or one per row.

Where the head multiplies a state h by W, a plugged adapter (`Adapter`) makes it read
h + (h A) B^T + b, or adds (h A) B^T + b and the intercept to W h. Two hooks on the network's output
embeddings do it, one before and one after; scale, cap, cache, sampling and beams follow as ever.
The hooks are there only inside `with port.use(...)`: before and after, the network is untouched.

A device (`experts.alongside`) is plugged in as an adapter is, and acts in `generate` alone, where the text is known:
there it is one more logits processor, behind the adapters.

Cost per token: two matmuls with the factors, whatever the number of adapters. Those of a mixed batch
stand side by side (once more in memory while in use) and a row keeps the columns of its own, so
its cost is that of the sum of their ranks.

Numerics: factors are rounded once to the network's dtype, `Adapter.edit` keeps float64. So an edit is
off by about eps |h| |A| |B|: below the rounding of W h itself unless the edit outweighs the state.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from chassis_utils.adapters.adapter import Adapter, Space
from chassis_utils.experts.alongside import Alongside
from chassis_utils.lm.forward import continuations
from chassis_utils.lm.model import HEAD_TOLERANCE, PROBE, LanguageModel, require_model


@dataclass(frozen=True)
class _Edit:
    """(x A) B^T + b as the network computes it."""

    down: Shaped[Tensor, "d rank"]
    up: Shaped[Tensor, "rank out"]
    shift: Shaped[Tensor, "out"]

    @property
    def bytes(self) -> int:
        return self.down.nbytes + self.up.nbytes + self.shift.nbytes


@dataclass(frozen=True)
class _Mixture:
    """One edit, or none, for each of n rows."""

    down: Shaped[Tensor, "d ranks"]
    up: Shaped[Tensor, "ranks out"]
    foreign: Bool[Tensor, "n 1 1 ranks"]  # columns that belong to the edits of other rows
    shifts: Shaped[Tensor, "n 1 1 out"]

    @classmethod
    def of(cls, edits: Sequence[_Edit | None]) -> "_Mixture | None":
        """The mixture of the edits of each row; nothing where no row has one."""
        distinct = list({id(edit): edit for edit in edits if edit is not None}.values())
        if not distinct:
            return None
        owners = [edit for edit in distinct for _ in range(edit.down.shape[1])]
        first = distinct[0].shift
        foreign = torch.tensor([[owner is not edit for owner in owners] for edit in edits], device=first.device)
        shifts = torch.stack([torch.zeros_like(first) if edit is None else edit.shift for edit in edits])
        return cls(
            torch.cat([edit.down for edit in distinct], dim=1),
            torch.cat([edit.up for edit in distinct]),
            foreign.bool()[:, None, None],  # without any column it would be a float
            shifts[:, None, None],
        )

    def __call__(self, h: Shaped[Tensor, "rows t d"]) -> Shaped[Tensor, "rows t out"]:
        """What is added; row i of n stands for its whole share of the batch, as beams expand it."""
        shares = h.unflatten(0, (len(self.shifts), _share(len(h), len(self.shifts))))
        code = (shares @ self.down).masked_fill(self.foreign, 0.0)
        return (code @ self.up + self.shifts).flatten(0, 1)


@dataclass(frozen=True)
class _Selection:
    """What one `with` block asks for."""

    names: frozenset[str]
    state: _Mixture | None
    vocabulary: _Mixture | None
    devices: "_Devices"


@dataclass(frozen=True)
class _Devices(LogitsProcessor):
    """One device, or none, for each of n rows; as beams expand them, row i of n stands for its whole share."""

    rows: Sequence[Alongside | None]

    def __call__(self, input_ids: Int[Tensor, "n t"], scores: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
        share, mixed = _share(len(scores), len(self.rows)), scores.clone()
        for device in dict.fromkeys(device for device in self.rows if device is not None):
            here = [row for row in range(len(scores)) if self.rows[row // share] is device]
            mixed[here] = device(input_ids[here], scores[here])
        return mixed


def _share(batch: int, chosen: int) -> int:
    """Rows of a batch that belong to each of the chosen ones."""
    if batch % chosen:
        raise ValueError(
            f"{chosen} rows have been chosen for a batch of {batch}: give one name for all, or one for each prompt"
        )
    return batch // chosen


class Port:
    """A frozen base and the adapters plugged into it.

    >>> from chassis_utils import Adapter, Port, load
    >>> base = load("models/port-llama")
    >>> port = Port(base)
    >>> port.plug("nothing", Adapter.untouched(base.head))
    >>> port.generate("Return the", use="nothing") == port.generate("Return the")
    True

    Raises `ValueError` for a network that changes its last state before the head reads it.
    """

    def __init__(self, model: LanguageModel) -> None:
        require_model(model)
        self.model = model
        self._plugged: dict[str, dict[Space, _Edit]] = {}  # a device edits nothing
        self._devices: dict[str, Alongside] = {}
        self._selections: list[_Selection] = []  # of the `with` blocks that are open, the innermost last
        self._check_input()

    @property
    def names(self) -> list[str]:
        """Adapters and devices that can be used, in the order they were plugged in."""
        return list(self._plugged)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that each adapter holds on the network's device, and the weights of each device's expert on its own."""
        edits = {name: sum(edit.bytes for edit in edits.values()) for name, edits in self._plugged.items()}
        return edits | {name: device.expert.network.get_memory_footprint() for name, device in self._devices.items()}

    def plug(self, name: str, adapter: Adapter | Alongside) -> None:
        """Make `adapter` ready for use under `name`, its numbers in the network's dtype and on its device.

        Raises `ValueError` for a name that is taken, an adapter fitted to another head and a device of another base.
        """
        if name in self._plugged:
            raise ValueError(f"an adapter is plugged in as {name!r} already: unplug it first, or use another name")
        if isinstance(adapter, Alongside):
            if adapter.base.fingerprint != self.model.fingerprint:
                raise ValueError(f"the device runs beside {adapter.base.name!r}: make one for {self.model.name!r}")
            self._plugged[name], self._devices[name] = {}, adapter
            return
        if not isinstance(adapter, Adapter):
            raise TypeError(f"{adapter!r:.60} is no adapter: give what `fit` or `Adapter.from_pretrained` returns")
        adapter.check(self.model.head)
        weight = self._output.get_parameter("weight")

        def prepared(down: Tensor, up: Tensor, shift: Tensor) -> _Edit:
            return _Edit(down.to(weight), up.T.to(weight).contiguous(), shift.to(weight))

        edits = {adapter.space: prepared(adapter.down, adapter.up, adapter.shift)}
        if adapter.intercept is not None:
            if adapter.space == "state":
                nothing = adapter.down[:, :0], adapter.intercept.new_empty(len(adapter.intercept), 0)
                edits["vocabulary"] = prepared(*nothing, adapter.intercept)
            else:  # both are added at the same place
                edits["vocabulary"] = prepared(adapter.down, adapter.up, adapter.shift + adapter.intercept)
        self._plugged[name] = edits

    def unplug(self, name: str) -> None:
        """Forget an adapter; `ValueError` for an unknown name and inside a `with` block that uses it."""
        self._check_name(name)
        if any(name in selection.names for selection in self._selections):
            raise ValueError(f"adapter {name!r} is in use: leave the `with` block first")
        del self._plugged[name]
        self._devices.pop(name, None)

    @contextmanager
    def use(self, names: str | Sequence[str | None] | None) -> Iterator[None]:
        """Until the end of the `with` block, one adapter for every row, or one (or None) for each prompt.

        Adapters hold for `forward` and `generate`, devices for `generate`; n names share a batch of k n rows as beams
        and several returned sequences expand it, k rows for each. Of nested blocks the innermost holds alone.
        Raises `ValueError` for an unknown name and an empty list, and the network raises it for a
        batch that the number of names does not divide.
        """
        rows = [names] if names is None or isinstance(names, str) else list(names)
        selection = self._select(rows)
        handles = []
        if not self._selections:
            handles.append(self._output.register_forward_pre_hook(self._before))
            handles.append(self._output.register_forward_hook(self._after))
            generate = vars(self.model.network).get("generate")  # another port's; else the class has it
            self.model.network.generate = partial(self._generate, self.model.network.generate)
        self._selections.append(selection)
        try:
            yield
        finally:
            self._selections.pop()
            for handle in handles:
                handle.remove()
            if handles and generate is None:
                del self.model.network.generate
            elif handles:
                self.model.network.generate = generate

    def generate(self, prompt: str, use: str | None = None, tokens: int = 32) -> str:
        """The greedy continuation of a prompt under one adapter, or by the base alone.

        Raises `ValueError` for an unknown name and a prompt that the model cannot read. For batches, sampling and
        beams call the network's own `generate` inside `with port.use(...)`.
        """
        with self.use(use):
            return continuations(self.model, [prompt], tokens)[0]

    def _generate(self, generate: Callable[..., Any], *inputs: Any, **settings: Any) -> Any:
        """The network's `generate` with the devices in use among its logits processors."""
        devices = self._selections[-1].devices
        if any(devices.rows):
            given = settings.get("logits_processor") or []
            settings["logits_processor"] = LogitsProcessorList([*given, devices])
        return generate(*inputs, **settings)

    @property
    def _output(self) -> nn.Module:
        return self.model.network.get_output_embeddings()

    def _select(self, rows: list[str | None]) -> _Selection:
        if not rows:
            raise ValueError("no adapter is named: give one name for all, or one name (or None) for each prompt")
        used = [name for name in rows if name is not None]
        for name in used:
            self._check_name(name)
        plugged = [{} if name is None else self._plugged[name] for name in rows]
        state, vocabulary = (_Mixture.of([edits.get(space) for edits in plugged]) for space in ("state", "vocabulary"))
        devices = _Devices([None if name is None else self._devices.get(name) for name in rows])
        return _Selection(frozenset(used), state, vocabulary, devices)

    def _before(self, output: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        edit = self._selections[-1].state
        return None if edit is None else (inputs[0] + edit(inputs[0]), *inputs[1:])

    def _after(self, output: nn.Module, inputs: tuple[Tensor, ...], product: Tensor) -> Tensor | None:
        edit = self._selections[-1].vocabulary
        return None if edit is None else product + edit(inputs[0])

    def _check_name(self, name: str) -> None:
        if name not in self._plugged:
            raise ValueError(f"no adapter is plugged in as {name!r}: there are {self.names}")

    @torch.inference_mode()
    def _check_input(self) -> None:
        """An edit is one of the last state only where the head reads that state as it is (MiniCPM3 scales it)."""
        seen: list[Tensor] = []
        handle = self._output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            ids = torch.tensor(self.model.encode([PROBE]), device=self.model.device)
            states = self.model.network(ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
        finally:
            handle.remove()
        if not torch.allclose(seen[0].to(states), states, rtol=HEAD_TOLERANCE, atol=0.0):
            raise ValueError(
                f"{self.model.name!r} changes its last state before the head reads it: "
                "adapters of that state cannot be plugged in, use `Adapter.logits`"
            )
