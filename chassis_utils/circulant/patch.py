"""Linear layers of a live model taken out and others put in their place, and back.

A layer is named by its path in the network (`model.layers.0.mlp.up_proj`). Patching sets
attributes: taking a patch off puts the very same modules back, so the outputs are those of before to the
bit. Cost: none but that of the layers.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from chassis_utils.circulant.layer import BlockCirculantLinear
from chassis_utils.circulant.low_rank import LowRankLinear
from chassis_utils.lm.model import blocks_path

LINEAR = (nn.Linear, Conv1D, BlockCirculantLinear, LowRankLinear)
MLP = ("mlp", "feed_forward", "ffn")  # its usual names in a block; OPT's block holds the two layers itself


def as_linear(module: nn.Module) -> nn.Linear:
    """The same map as an `nn.Linear` that shares its parameters; GPT-2's `Conv1D` holds them transposed.

    Raises `ValueError` for any other kind of module.
    """
    if isinstance(module, nn.Linear):
        return module
    if not isinstance(module, Conv1D):
        raise ValueError(f"a {type(module).__name__} is no linear layer: name an nn.Linear or a Conv1D")
    inputs, outputs = module.weight.shape
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(module.weight.detach().T, requires_grad=False)
    linear.bias = module.bias
    return linear


def mlp_projections(network: PreTrainedModel, layer: int) -> dict[str, nn.Module]:
    """Path -> module of the linear layers in the MLP of one block, patched or not, in the order of the block.

    Raises `ValueError` for a layer that the network does not have, and for blocks without an MLP or with one that is
    not made of linear layers alone, as a mixture of experts.
    """
    path = blocks_path(network)
    blocks = network.get_submodule(path)
    if layer not in range(len(blocks)):
        raise ValueError(f"there is no layer {layer!r}: this network has layers 0 to {len(blocks) - 1}")
    block, prefix = blocks[layer], f"{path}.{layer}"
    name = next((name for name in MLP if hasattr(block, name)), None)
    if name is None:
        below = list(block.named_children())
    else:
        prefix = f"{prefix}.{name}"
        below = list(block.get_submodule(name).named_modules())
        _check_dense(network, prefix)
    projections = {f"{prefix}.{own}": module for own, module in below if isinstance(module, LINEAR)}
    if not projections:
        raise ValueError(
            f"{prefix!r} of a {type(network).__name__} has no MLP of linear layers: name the paths yourself"
        )
    return projections


def _check_dense(network: PreTrainedModel, path: str) -> None:
    """Experts are matrices in a stack or MLPs in a list, and each sees but the tokens that are routed to it."""
    for module in network.get_submodule(path).modules():
        matrices = [p for p in module.parameters(recurse=False) if p.ndim > 1 and min(p.shape) > 1]
        if isinstance(module, nn.ModuleList) or (matrices and not isinstance(module, LINEAR)):
            raise ValueError(
                f"{path!r} of a {type(network).__name__} is a mixture of experts, each of which sees only some tokens: "
                "replace layers of a dense model, or name the paths of linear layers yourself"
            )


class Patch:
    """What `patch` put in; taken off by `remove`, or at the end of a `with` block."""

    def __init__(self, network: PreTrainedModel, replacements: Mapping[str, nn.Module]) -> None:
        self._network, self._inside = network, dict(replacements)
        self._outside = {path: network.get_submodule(path) for path in replacements}
        for path, module in self._inside.items():
            network.set_submodule(path, module)

    def remove(self) -> None:
        """Put the modules of before back; nothing where that has been done.

        Raises `RuntimeError` where another patch lies on top: take patches off in reverse order.
        """
        for path in self._outside:
            if self._network.get_submodule(path) is not self._inside[path]:
                raise RuntimeError(f"{path!r} has been patched again since: take that patch off first")
        for path, module in self._outside.items():
            self._network.set_submodule(path, module)
        self._outside = {}

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def patch(network: PreTrainedModel, replacements: Mapping[str, nn.Module]) -> Patch:
    """Put each module in the place that its path names, until the patch is removed.

    >>> from chassis_utils import load, patch, replacements
    >>> model = load("models/port-llama")
    >>> with patch(model.network, replacements(model, [0], block_size=8, how="average")):
    ...     patched = model.greedy("Return the", tokens=4)

    Raises `ValueError`, with nothing changed, for a path that the network does not have or
    that holds no linear layer, and for sizes that differ from those of the layer there.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"a {type(network).__name__} has no layers to be replaced: give the `network` of a loaded model"
        )
    for path, module in replacements.items():
        try:
            present = network.get_submodule(path)
        except AttributeError:
            raise ValueError(
                f"a {type(network).__name__} has no module {path!r}: see `mlp_projections` for its paths"
            ) from None
        new, old = _sizes(module), _sizes(present)
        if new != old:
            raise ValueError(f"{path!r} maps {old[0]} -> {old[1]}, its replacement {new[0]} -> {new[1]}")
    return Patch(network, replacements)


def _sizes(module: nn.Module) -> tuple[int, int]:
    linear: Any = module if hasattr(module, "in_features") else as_linear(module)
    return linear.in_features, linear.out_features
