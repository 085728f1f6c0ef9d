"""The folder of a checkpoint, and the network with all of its weights from it, or what is wrong with it."""

import hashlib
import os
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import align_module_device
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from chassis_utils.files import locate
from chassis_utils.lm.tokenizer import read_json

ADAPTER = "adapter_config.json"  # in a folder that peft wrote
WEIGHTS = "*.safetensors"
REPORTING = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # what is missing is listed, not raised
SPREAD = "auto"  # a device: all that there are, and the disk, as accelerate deals a network's blocks to them


def find_folder(name: str) -> Path:
    """The folder that holds a checkpoint: local, or the hub's snapshot; checked for what loading needs."""
    return find_parts(name)[0]


def find_parts(name: str) -> tuple[Path, Path | None]:
    """The same, and beside it the folder of a LoRA: where `name` is one that peft wrote, the checkpoint is its base."""
    path, adapter = _downloaded(name), None
    if (path / ADAPTER).is_file():
        name, adapter = str(read_json(path / ADAPTER).get("base_model_name_or_path")), path
        path = _downloaded(name, f", the base of the LoRA {adapter.name!r},")
        if not (adapter / "adapter_model.safetensors").is_file():
            raise ValueError(f"the LoRA {adapter.name!r} has no adapter_model.safetensors: save it as safetensors")
    if not list(path.glob(WEIGHTS)):
        pickles = [file.name for suffix in ("bin", "pt", "pth", "ckpt") for file in path.glob(f"*.{suffix}")]
        kind = f"only a pickle ({pickles[0]}), which can run code when read" if pickles else "no weights"
        raise ValueError(f"checkpoint {name!r} holds {kind}: convert it to safetensors")
    for needed in ("config.json", "tokenizer.json"):
        if not (path / needed).is_file():
            raise ValueError(f"checkpoint {name!r} has no {needed}: save it beside the weights")
    return path, adapter


def _downloaded(name: str, what: str = "") -> Path:
    path = locate(name)
    if os.path.isdir(path):
        return path
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", WEIGHTS]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"model {name!r}{what} is neither a folder nor a hub model that can be reached: "
            "give a folder that holds one, or a hub id and a network"
        ) from error


def fingerprint(folder: Path, adapter: Path | None = None) -> str:
    """16 hex digits from the contents of config, tokenizer and weights, those of a LoRA included."""
    digest, parts = hashlib.sha256(), sorted([folder / "config.json", folder / "tokenizer.json", *folder.glob(WEIGHTS)])
    parts += [] if adapter is None else [adapter / ADAPTER, adapter / "adapter_model.safetensors"]
    for path in parts:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def default_device() -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_place(dtype: torch.dtype, device: str) -> None:
    """Raise `ValueError` for a dtype or a device that cannot be computed with."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"dtype {dtype} is none to compute in: use torch.float32, torch.bfloat16 or torch.float16")
    try:
        torch.empty(0, device=None if device == SPREAD else device)
    except (RuntimeError, AssertionError) as error:  # no such kind; torch asserts that it was built for CUDA
        reason = str(error).partition("\n")[0][:100]
        raise ValueError(
            f"device {device!r} cannot be used ({reason}): use 'cpu', 'auto', or 'cuda' where there is one"
        ) from None


def read_network(folder: Path, name: str, dtype: torch.dtype, spread: bool = False) -> PreTrainedModel:
    """The network with all of its weights from the checkpoint; `ValueError` where config and weights do not give it.

    It is on the CPU; `spread`, its blocks are on GPUs as far as these hold them, on the CPU, and the rest on the disk.
    """
    read_json(folder / "config.json")  # says what is damaged
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # what its report says, is said below
    try:
        network, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            device_map=SPREAD if spread else None,
            attn_implementation=_attention(dtype),
            **REPORTING,
        )
    except SafetensorError as error:
        raise ValueError(f"the weights of {name!r} are damaged ({error}): save or download them anew") from None
    except (StrictDataclassError, ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the config.json of {name!r} gives no network ({reason}): use the one of its weights"
        ) from None
    finally:
        logging.set_verbosity(level)
    lacking = [*found["missing_keys"], *(entry[0] for entry in found["mismatched_keys"])]
    if lacking:
        raise ValueError(
            f"the weights of {name!r} lack {len(lacking)} of those that its config.json asks for, {min(lacking)} among "
            "them, or have them in other sizes: use config and weights of one model"
        )
    return network


def _attention(dtype: torch.dtype) -> str | None:
    """The default of transformers, but where `ATEN_CPU_CAPABILITY` hides AVX-512 from torch and not from its oneDNN.

    There torch's fused attention in 16 bits packs 64 tokens and more for AMX, and fails.
    """
    return "eager" if dtype.itemsize == 2 and "ATEN_CPU_CAPABILITY" in os.environ else None


def require_weights(network: PreTrainedModel, purpose: str) -> None:
    """Raise `ValueError` where weights that `purpose` has to read or change are on the disk."""
    if any(parameter.is_meta for parameter in network.parameters()):
        raise ValueError(f"{purpose} needs all weights in memory, and some are on the disk: load it on one device")


def on_cpu(module: torch.nn.Module, name: str) -> Tensor:
    """A parameter of a module on the CPU, also where accelerate keeps it on the disk."""
    with align_module_device(module, "cpu") if module.get_parameter(name).is_meta else nullcontext():
        return module.get_parameter(name).detach().cpu()


def add_lora(network: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The network with a LoRA added to its weights; `ValueError` where it does not belong to them."""
    from peft import PeftModel  # seconds to import, which few need

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about a name that peft asks for
            return PeftModel.from_pretrained(network, adapter).merge_and_unload()
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the LoRA {adapter.name!r} does not fit its base ({reason}): use the one of its base"
        ) from None
