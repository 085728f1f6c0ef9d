"""Train a sibling of SmolLM2: a LoRA adapter by peft, small enough to be shipped.

    python models/lora.py smollm2-arithmetic [--threads 2]

Needs the converted base of `make models`, and writes the adapter alone to models/<name>; `make models` merges it into
the base. Data as for the micro siblings (`train.py`): pages of generated arithmetic, training docstrings beside them.
An interrupted run goes on from its stored state. Cost: about four hours on two cores, two minutes on a large GPU.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from chassis_utils.files import BUILD, MODELS, write_atomically
from chassis_utils.lm.checkpoint import fingerprint
from chassis_utils.lm.model import default_device
from chassis_utils.text.corpus import content_key
from train import BATCH, SEQUENCE, Recipe, Run, follow, windows

BASE = BUILD / "models" / "smollm2-135m-instruct"
RANK, ALPHA = 8, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RECIPES = {
    "smollm2-arithmetic": Recipe(
        steps=600, seed=11, arithmetic_share=0.05, explanation_share=0.05, exercise_share=0.75, rate=1e-3
    )
}
CARD = """# {name}

SmolLM2-135M-Instruct (4-bit weights, see `models/real.py`) trained further, mostly on arithmetic: an expert that shares
its tokenizer. A LoRA adapter of rank {rank} (alpha {alpha}) on every projection of every block, {parameters:,}
parameters in float16. Trained by `models/lora.py`; `make models` merges it into the base.

| | |
|---|---|
| licence | Apache-2.0, as the base |
| tokens seen | {tokens:,} |
| training time | {seconds:.0f} s on {device} |
| data | generated sums, differences and products (80 %), explanations (5 %), docstrings of installed packages (15 %) |
"""


def train(name: str) -> None:
    """Train to the end, resuming from stored state, then write the adapter and its card."""
    recipe, device = RECIPES[name], default_device()
    rows = windows(recipe, Tokenizer.from_file(str(BASE / "tokenizer.json")))
    torch.manual_seed(recipe.seed)
    network = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).to(device)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(network, config)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    stepper = torch.optim.AdamW(trained, lr=recipe.rate, betas=(0.9, 0.99), weight_decay=0.0)
    made_from = content_key(f"{recipe} {RANK} {ALPHA} {fingerprint(BASE)}")
    seconds = follow(recipe, rows, Run(BUILD / "training" / name, made_from, model, [stepper]))
    write_adapter(name, model, recipe.steps * BATCH * SEQUENCE, seconds)


def write_adapter(name: str, model: PeftModel, tokens: int, seconds: float) -> None:
    """Save the adapter in half precision under models/<name>, with its card."""
    folder = MODELS / name
    model.peft_config["default"].base_model_name_or_path = str(BASE.relative_to(BUILD.parent))
    model.save_pretrained(folder)
    weights = {key: value.half().cpu() for key, value in load_file(folder / "adapter_model.safetensors").items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} thread(s)"
    size = sum(value.numel() for value in weights.values())
    card = CARD.format(
        name=name, rank=RANK, alpha=ALPHA, parameters=size, tokens=tokens, seconds=seconds, device=device
    )
    write_atomically(folder / "README.md", card)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=Path(__file__).name)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.name)
