"""A network with all of its weights from a checkpoint's folder, or what is wrong with the folder. Cost: reading it."""

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from chassis_utils.lm.tokenizer import read_json


def check_place(dtype: torch.dtype, device: str) -> None:
    """Raise `ValueError` for a dtype or a device that cannot be computed with."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"dtype {dtype} is none to compute in: use torch.float32, torch.bfloat16 or torch.float16")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such kind; torch asserts that it was built for CUDA
        reason = str(error).partition("\n")[0][:100]
        raise ValueError(
            f"device {device!r} cannot be used ({reason}): use 'cpu', or 'cuda' where there is one"
        ) from None


def read_network(folder: Path, name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The network with all of its weights from the checkpoint; `ValueError` where config and weights do not give it."""
    read_json(folder / "config.json")  # says what is damaged
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # what its report says, is said below
    try:
        network, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
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
