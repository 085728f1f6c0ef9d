"""Closed-form adapters for frozen language models, and what a paper about them needs.

    >>> from chassis_utils import Port, fit, load
    >>> base, expert = load("models/port-llama"), load("models/sibling-math")
    >>> adapter = fit(base, expert, [f"What is {i} + {i + 3}? It is {2 * i + 3}." for i in range(64)])
    >>> port = Port(base)
    >>> port.plug("math", adapter)
    >>> answer = port.generate("What is 21 + 34?", use="math")

The names below are imported when they are first asked for. Notebooks import from the rooms instead: the pipeline
follows their imports to know what a result depends on.
"""

import warnings
from importlib import import_module
from typing import Any

# Bars are drawn on terminals only, so nobody needs the widgets that tqdm misses in a notebook.
warnings.filterwarnings("ignore", message="IProgress not found")

PUBLIC = {  # name -> where it is defined
    "load": "lm.model",
    "collect": "lm.states",
    "bits_per_byte": "lm.bits_per_byte",
    "Bridge": "bridge.bridge",
    "Sibling": "experts.sibling",
    "BridgedExpert": "experts.bridged",
    "Alongside": "experts.alongside",
    "fit": "adapters.fit",
    "Depth": "adapters.depth",
    "fit_prompt": "adapters.depth",
    "fit_sibling": "adapters.depth",
    "extract": "adapters.extraction",
    "Adapter": "adapters.adapter",
    "Port": "adapters.port",
    "BlockCirculantLinear": "circulant.layer",
    "replacements": "circulant.replace",
    "patch": "circulant.patch",
    "calibrate": "circulant.calibrate",
}
__all__ = list(PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"chassis_utils has no {name!r}: it gives {', '.join(PUBLIC)}")
    return getattr(import_module(f"chassis_utils.{PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *PUBLIC]
