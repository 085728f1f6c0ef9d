"""A live model as a port: adapters plugged in by name, used for a whole batch or one per row.

Where the head multiplies a state h by W, a plugged adapter (`Adapter`) makes it read
h + (h A) B^T + b, or adds (h A) B^T + b and the intercept to W h. Two hooks on the network's output
embeddings do it, one before and one after; scale, cap, cache, sampling and beams follow as ever.
The hooks are there only inside `with port.use(...)`: before and after, the network is untouched.

Edits at several layers (`adapters.depth`) are plugged in as one adapter is: that of the last state acts like any other,
those in the middle behind the attention of their blocks, at every token but those that all prompts begin with.

A device (`experts.alongside`) is plugged in as an adapter is, and acts in `generate` alone, where the text is known:
there it is one more logits processor, behind the adapters.

Cost per token: two matmuls with the factors, whatever the number of adapters. Those of a mixed batch
stand side by side (once more in memory while in use) and a row keeps the columns of its own, so
its cost is that of the sum of their ranks.

Numerics: factors are rounded once to the network's dtype, `Adapter.edit` keeps float64. So an edit is
off by about eps |h| |A| |B|: below the rounding of W h itself unless the edit outweighs the state.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import LogitsProcessorList

from chassis_utils.adapters.adapter import Adapter, Space
from chassis_utils.adapters.depth import Depth
from chassis_utils.adapters.mixture import Devices, Edit, Mixture, share_of
from chassis_utils.experts.alongside import Alongside
from chassis_utils.lm.attention import behind_attention, counting
from chassis_utils.lm.chat import as_chat
from chassis_utils.lm.forward import continuations, written
from chassis_utils.lm.model import HEAD_TOLERANCE, PROBE, LanguageModel, require_model
from chassis_utils.lm.resume import replacing


@dataclass(frozen=True)
class _Plugged:
    """What one name stands for."""

    edits: dict[Space, Edit]
    middle: dict[int, Edit]  # by block
    skip: int = 0  # tokens that the edits in the middle leave alone
    device: Alongside | None = None

    @property
    def bytes(self) -> int:
        own = sum(edit.bytes for edit in (*self.edits.values(), *self.middle.values()))
        return own + (self.device.expert.network.get_memory_footprint() if self.device else 0)


@dataclass(frozen=True)
class _Selection:
    """What one `with` block asks for."""

    names: frozenset[str]
    state: Mixture | None
    vocabulary: Mixture | None
    middle: dict[int, Mixture | None]
    skips: Int[Tensor, "n"]
    devices: Devices


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
        self._plugged: dict[str, _Plugged] = {}
        self._selections: list[_Selection] = []  # of the `with` blocks that are open, the innermost last
        self._check_input()

    @property
    def names(self) -> list[str]:
        """Adapters and devices that can be used, in the order they were plugged in."""
        return list(self._plugged)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that each adapter holds on the network's device, and the weights of each device's expert on its own."""
        return {name: plugged.bytes for name, plugged in self._plugged.items()}

    def plug(self, name: str, adapter: Adapter | Depth | Alongside) -> None:
        """Make `adapter` ready for use under `name`, its numbers in the network's dtype and on its device.

        Raises `ValueError` for a name that is taken, an adapter fitted to another head and a device of another base.
        """
        if name in self._plugged:
            raise ValueError(f"an adapter is plugged in as {name!r} already: unplug it first, or use another name")
        if isinstance(adapter, Alongside):
            if adapter.base.fingerprint != self.model.fingerprint:
                raise ValueError(f"the device runs beside {adapter.base.name!r}: make one for {self.model.name!r}")
            self._plugged[name] = _Plugged({}, {}, device=adapter)
        elif isinstance(adapter, Depth):
            for edit in adapter.edits.values():
                edit.check(self.model.head)
            last, depth = adapter.edits.get(self.model.depth), self.model.depth
            middle = {k: self._prepared(edit) for k, edit in adapter.edits.items() if k < depth}
            self._plugged[name] = _Plugged({"state": self._prepared(last)} if last else {}, middle, adapter.skip)
        elif isinstance(adapter, Adapter):
            self._plugged[name] = _Plugged(self._edits(adapter), {})
        else:
            raise TypeError(f"{adapter!r:.60} is no adapter: give what `fit` or `Adapter.from_pretrained` returns")

    def unplug(self, name: str) -> None:
        """Forget an adapter; `ValueError` for an unknown name and inside a `with` block that uses it."""
        self._check_name(name)
        if any(name in selection.names for selection in self._selections):
            raise ValueError(f"adapter {name!r} is in use: leave the `with` block first")
        del self._plugged[name]

    @contextmanager
    def use(self, names: str | Sequence[str | None] | None) -> Iterator[None]:
        """Until the end of the `with` block, one adapter for every row, or one (or None) for each prompt.

        Adapters hold for `forward` and `generate`, devices for `generate`; n names share a batch of k n rows as beams
        and several returned sequences expand it, k rows for each. Of nested blocks the innermost holds alone.
        Raises `ValueError` for an unknown name and an empty list, and the network raises it for a
        batch that the number of names does not divide.
        """
        rows = [names] if names is None or isinstance(names, str) else list(names)
        selection, network = self._select(rows), self.model.network
        with ExitStack() as stack:
            if not self._selections:
                stack.enter_context(self._output.register_forward_pre_hook(self._before))
                stack.enter_context(self._output.register_forward_hook(self._after))
                stack.enter_context(replacing(network, "generate", partial(self._generate, network.generate)))
            self._selections.append(selection)
            stack.callback(self._selections.pop)
            stack.enter_context(self._in_the_middle(selection))
            yield

    def generate(self, prompt: str, use: str | None = None, tokens: int = 32) -> str:
        """The greedy continuation of a prompt under one adapter, or by the base alone.

        Raises `ValueError` for an unknown name and a prompt that the model cannot read. For batches, sampling and
        beams call the network's own `generate` inside `with port.use(...)`.
        """
        with self.use(use):
            return continuations(self.model, [prompt], tokens)[0]

    def answer(self, question: str, use: str | None = None, tokens: int = 64) -> str:
        """The greedy answer to a question that is put through the checkpoint's chat template, where it has one.

        Raises `ValueError` as `generate` does.
        """
        with self.use(use):
            return self.model.tokenizer.decode(written(self.model, as_chat(self.model, [question]), tokens)[0])

    def _generate(self, generate: Callable[..., Any], *inputs: Any, **settings: Any) -> Any:
        """The network's `generate` with the devices in use among its logits processors."""
        devices = self._selections[-1].devices
        if any(devices.rows):
            given = settings.get("logits_processor") or []
            settings["logits_processor"] = LogitsProcessorList([*given, devices])
        return generate(*inputs, **settings)

    def _prepared(self, adapter: Adapter) -> Edit:
        """Its factors as the network computes with them."""
        place = torch.empty(0, device=self.model.device, dtype=self._output.get_parameter("weight").dtype)
        return Edit(adapter.down.to(place), adapter.up.T.to(place).contiguous(), adapter.shift.to(place))

    def _edits(self, adapter: Adapter) -> dict[Space, Edit]:
        """What it does before the head and behind it."""
        adapter.check(self.model.head)
        if adapter.intercept is None:
            return {adapter.space: self._prepared(adapter)}
        if adapter.space == "vocabulary":  # both are added at the same place
            return {"vocabulary": self._prepared(replace(adapter, shift=adapter.shift + adapter.intercept))}
        no_up = adapter.intercept.new_empty(len(adapter.intercept), 0)
        alone = replace(adapter, down=adapter.down[:, :0], up=no_up, shift=adapter.intercept)
        return {"state": self._prepared(adapter), "vocabulary": self._prepared(alone)}

    @property
    def _output(self) -> nn.Module:
        return self.model.network.get_output_embeddings()

    def _select(self, rows: list[str | None]) -> _Selection:
        if not rows:
            raise ValueError("no adapter is named: give one name for all, or one name (or None) for each prompt")
        used = [name for name in rows if name is not None]
        for name in used:
            self._check_name(name)
        plugged = [_Plugged({}, {}) if name is None else self._plugged[name] for name in rows]
        state, vocabulary = (Mixture.of([one.edits.get(space) for one in plugged]) for space in ("state", "vocabulary"))
        layers = {layer for one in plugged for layer in one.middle}
        middle = {layer: Mixture.of([one.middle.get(layer) for one in plugged]) for layer in sorted(layers)}
        skips = torch.tensor([one.skip for one in plugged], device=self.model.device)
        devices = Devices([one.device for one in plugged])
        return _Selection(frozenset(used), state, vocabulary, middle, skips, devices)

    @contextmanager
    def _in_the_middle(self, selection: _Selection) -> Iterator[None]:
        """The edits behind the attention of blocks, while no inner `with` block asks for something else."""
        with ExitStack() as hooks:
            places = hooks.enter_context(counting(self.model)) if selection.middle else []

            def change(mixture: Mixture | None, x: Tensor) -> Tensor | None:
                if mixture is None or self._selections[-1] is not selection:
                    return None
                skips = selection.skips.repeat_interleave(share_of(len(x), len(selection.skips)))
                return mixture(x) * (places[0] >= skips[:, None])[..., None]

            for layer, mixture in selection.middle.items():
                hooks.enter_context(behind_attention(self.model, layer, partial(change, mixture)))
            yield

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
        with self._output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
            ids = torch.tensor(self.model.encode([PROBE]), device=self.model.device)
            states = self.model.network(ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
        if not torch.allclose(seen[0].to(states), states, rtol=HEAD_TOLERANCE, atol=0.0):
            raise ValueError(
                f"{self.model.name!r} changes its last state before the head reads it: "
                "adapters of that state cannot be plugged in, use `Adapter.logits`"
            )
