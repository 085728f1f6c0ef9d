"""Train siblings: LoRA adapters by peft, small enough to be shipped.

    python models/lora.py smollm2-arithmetic [--threads 2]
    python models/lora.py smollm2-french
    python models/lora.py port-llama-french

SmolLM2 is the converted one of `make models`. The adapter alone is written to models/<name>. Arithmetic has the data of
the micro siblings (`train.py`): pages of generated arithmetic, training docstrings beside them. A style has the base's
own answers behind a system prompt, to questions of the groups that notebooks 32 and 33 fit on, as chats without that
prompt; they are cut off after 48 tokens, and nothing is learned of where an answer ends. An interrupted run goes on
from its stored state. Cost on two cores: four hours for arithmetic (two minutes on a large GPU), half an hour for
SmolLM2's French, two minutes for the micro one.
"""

import argparse
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from chassis_utils.experts.prompted import PromptedExpert
from chassis_utils.files import BUILD, MODELS, ROOT, write_atomically
from chassis_utils.lm.checkpoint import default_device, fingerprint
from chassis_utils.lm.model import load
from chassis_utils.text.corpus import content_key
from chassis_utils.text.questions import cross
from train import BATCH, SEQUENCE, Recipe, Run, follow, windows

SMOLLM2, MICRO = BUILD / "models" / "smollm2-135m-instruct", MODELS / "port-llama"
RANK, ALPHA = 8, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GROUPS = (0, 1, 2, 3, 4, 5, 8, 9)  # of questions: those of 6 and 7 are for tests
QUESTIONS, ANSWER = 640, 48  # how many, and tokens of an answer at most


@dataclass(frozen=True)
class Sibling:
    """An adapter: what it is trained on, from which base."""

    base: Path
    recipe: Recipe
    system: str | None = None  # what the base was told when it wrote the answers; none for arithmetic


FRENCH = "Answer every question in French."
STYLE = Recipe(steps=64, seed=12, arithmetic_share=0.0, explanation_share=0.0, rate=2e-3)
ARITHMETIC = Recipe(steps=600, seed=11, arithmetic_share=0.05, explanation_share=0.05, exercise_share=0.75, rate=1e-3)
SIBLINGS = {
    "smollm2-arithmetic": Sibling(SMOLLM2, ARITHMETIC),
    "smollm2-french": Sibling(SMOLLM2, STYLE, FRENCH),
    "port-llama-french": Sibling(MICRO, STYLE, FRENCH),
}
CARD = """# {name}

{base} trained further: an expert that shares its tokenizer. A LoRA adapter of rank {rank} (alpha {alpha}) on every
projection of every block, {parameters:,} parameters in float16. Trained by `models/lora.py`.

| | |
|---|---|
| licence | {licence} |
| tokens seen | {tokens:,} |
| training time | {seconds:.0f} s on {device} |
| data | {data} |
"""
DATA = "generated sums, differences and products (80 %), explanations (5 %), docstrings of installed packages (15 %)"
TOLD = '{questions} chats: the base\'s own greedy answers when told "{system}", without that prompt'


def answers(sibling: Sibling) -> torch.Tensor:
    """Windows of chats in the order of training: int64 [steps * BATCH, SEQUENCE], repeated as often as is needed."""
    files = (ROOT / "notebooks" / "questions" / name for name in ("topics.txt", "forms.txt"))
    asked = [question.text for question in cross(*files, GROUPS, QUESTIONS, "train", mixed=True)]
    chats = PromptedExpert(load(str(sibling.base)), sibling.system or "").answered(asked, ANSWER).base_rows
    generator, needed = torch.Generator().manual_seed(sibling.recipe.seed), sibling.recipe.steps * BATCH * SEQUENCE
    ids: list[int] = []
    while len(ids) < needed:
        ids += chain.from_iterable(chats[k] for k in torch.randperm(len(chats), generator=generator).tolist())
    return torch.tensor(ids[:needed]).view(-1, SEQUENCE)


def train(name: str) -> None:
    """Train to the end, resuming from stored state, then write the adapter and its card."""
    sibling, device = SIBLINGS[name], default_device()
    recipe, base = sibling.recipe, sibling.base
    rows = answers(sibling) if sibling.system else windows(recipe, Tokenizer.from_file(str(base / "tokenizer.json")))
    torch.manual_seed(recipe.seed)
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(network, config)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    stepper = torch.optim.AdamW(trained, lr=recipe.rate, betas=(0.9, 0.99), weight_decay=0.0)
    made_from = content_key(f"{recipe} {RANK} {ALPHA} {fingerprint(base)} {sibling.system}")
    seconds = follow(recipe, rows, Run(BUILD / "training" / name, made_from, model, [stepper]))
    write_adapter(name, model, recipe.steps * BATCH * SEQUENCE, seconds)


def write_adapter(name: str, model: PeftModel, tokens: int, seconds: float) -> None:
    """Save the adapter in half precision under models/<name>, with its card."""
    folder, sibling = MODELS / name, SIBLINGS[name]
    model.peft_config["default"].base_model_name_or_path = str(sibling.base.relative_to(ROOT))
    model.save_pretrained(folder)
    weights = {key: value.half().cpu() for key, value in load_file(folder / "adapter_model.safetensors").items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} thread(s)"
    known = {"name": name, "rank": RANK, "alpha": ALPHA, "tokens": tokens, "seconds": seconds, "device": device}
    known["parameters"] = sum(value.numel() for value in weights.values())
    ours = sibling.base == MICRO
    known["base"] = "`port-llama`" if ours else "SmolLM2-135M-Instruct (4-bit weights, see `models/real.py`)"
    known["licence"] = "MIT, as the base" if ours else "Apache-2.0, as the base"
    known["data"] = TOLD.format(questions=QUESTIONS, system=sibling.system) if sibling.system else DATA
    write_atomically(folder / "README.md", CARD.format(**known))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=Path(__file__).name)
    parser.add_argument("name", choices=SIBLINGS)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.name)
