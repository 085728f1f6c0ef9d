"""Train the three micro checkpoints that the default profile runs on.

    python models/train.py port-llama [--threads 2]
    python models/train.py expert-phi
    python models/train.py sibling-math        # continues from port-llama

Text: docstrings of the installed packages (training side only, see
`chassis_utils.text.corpus`) and sentences from `generated_text.py`. Matrices are trained with
Muon (Jordan et al. 2024), everything else with AdamW, the rate falling linearly to zero.
The run stores its state every fifty steps in `build/training/` and, started again,
goes on from there. Seeds are fixed; bits per byte agree between runs to rounding.
"""

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM, PreTrainedModel

from chassis_utils.files import BUILD, MODELS, write_atomically
from chassis_utils.lm.checkpoint import fingerprint
from chassis_utils.text.corpus import content_key, read_documents
from checkpoint_card import write_checkpoint
from generated_text import arithmetic, exercises, explanations
from muon import Muon
from tokenizer_training import byte_level_bpe, sentencepiece_bpe

SEQUENCE, BATCH = 256, 16  # tokens of a window, windows of a step
WARM_UP, STORE_EVERY = 60, 50  # steps


@dataclass(frozen=True)
class Recipe:
    """One checkpoint: what it is made of and how long it is trained."""

    steps: int
    seed: int
    arithmetic_share: float  # of the windows
    explanation_share: float
    rate: float  # of Muon, in units of AdamW's (update RMS matched)
    start: str | None = None  # checkpoint that training continues from
    exercise_share: float = 0.0


RECIPES = {
    "port-llama": Recipe(steps=1150, seed=1, arithmetic_share=0.05, explanation_share=0.03, rate=6e-3),
    "expert-phi": Recipe(steps=850, seed=2, arithmetic_share=0.05, explanation_share=0.03, rate=6e-3),
    "sibling-math": Recipe(
        steps=800,
        seed=3,
        arithmetic_share=0.05,
        explanation_share=0.05,
        rate=3e-3,
        start="port-llama",
        exercise_share=0.75,
    ),
}


def new_model(name: str) -> PreTrainedModel:
    """The untrained model of a recipe, weights drawn from the recipe's seed."""
    torch.manual_seed(RECIPES[name].seed)
    if name == "expert-phi":
        return PhiForCausalLM(
            PhiConfig(
                vocab_size=5120,
                hidden_size=256,
                intermediate_size=1024,
                num_hidden_layers=8,
                num_attention_heads=8,
                partial_rotary_factor=0.5,
                max_position_embeddings=1024,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=None,
                tie_word_embeddings=False,
                resid_pdrop=0.0,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    )


def tokenizer_for(name: str) -> Tokenizer:
    """The tokenizer in `models/<name>`; where there is none, that of the start, or one trained on the corpus."""
    shipped, start = MODELS / name / "tokenizer.json", RECIPES[name].start
    if not shipped.exists():
        shipped.parent.mkdir(parents=True, exist_ok=True)
        if start:
            shutil.copy(MODELS / start / "tokenizer.json", shipped)
        else:
            texts = [document.text for document in read_documents("train")]
            texts += [arithmetic(random.Random(n)) for n in range(300)]
            train_bpe, size = (byte_level_bpe, 5120) if name == "expert-phi" else (sentencepiece_bpe, 4096)
            train_bpe(texts, size).save(str(shipped))
    return Tokenizer.from_file(str(shipped))


def windows(recipe: Recipe, tokenizer: Tokenizer) -> torch.Tensor:
    """All training windows in the order of training: int64 [steps * BATCH, SEQUENCE].

    Documents are shuffled, joined with the separator and cut; a fixed share of the
    windows comes from the generated sentences.
    """
    rng = random.Random(recipe.seed)
    needed = recipe.steps * BATCH
    shares = (
        (arithmetic, recipe.arithmetic_share),
        (explanations, recipe.explanation_share),
        (exercises, recipe.exercise_share),
    )
    generated = [(page, int(needed * share)) for page, share in shares]
    documents = [document.text for document in read_documents("train")]
    rng.shuffle(documents)
    parts = [_cut(tokenizer, iter(documents), needed - sum(count for _, count in generated))]
    parts += [_cut(tokenizer, (page(rng) for _ in iter(int, 1)), count) for page, count in generated]
    rows = torch.cat(parts)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed))]


def _cut(tokenizer: Tokenizer, texts: Iterator[str], count: int) -> torch.Tensor:
    separator = tokenizer.token_to_id("</s>") if tokenizer.token_to_id("</s>") is not None else 0  # 0: end of text
    ids: list[int] = []
    for text in texts:
        if len(ids) >= count * SEQUENCE:
            break
        ids += [*tokenizer.encode(text).ids, separator]
    rows = len(ids) // SEQUENCE
    if rows < count:  # the corpus is shorter than the run: go round again
        ids *= math.ceil(count / rows)
    return torch.tensor(ids[: count * SEQUENCE]).view(count, SEQUENCE)


def optimizers(model: PreTrainedModel, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, head, norms and biases."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    tables = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." not in n]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [
        Muon(matrices, lr=rate, weight_decay=0.05),
        torch.optim.AdamW(tables, lr=rate, betas=(0.9, 0.95), weight_decay=0.01),
        torch.optim.AdamW(vectors, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(name: str) -> None:
    """Train to the end, resuming from stored state, then write the checkpoint and its card."""
    recipe = RECIPES[name]
    rows = windows(recipe, tokenizer_for(name))
    model, made_from = new_model(name), repr(recipe)
    if recipe.start:
        start = MODELS / recipe.start
        model.load_state_dict(type(model).from_pretrained(start, dtype=torch.float32).state_dict())
        made_from += fingerprint(start)
    run = Run(BUILD / "training" / name, content_key(made_from), model, optimizers(model, recipe.rate))
    seconds = follow(recipe, rows, run)
    tokens = recipe.steps * BATCH * SEQUENCE
    write_checkpoint(name, model.eval(), tokens=tokens, seconds=seconds, threads=torch.get_num_threads())


def follow(recipe: Recipe, rows: torch.Tensor, run: "Run") -> float:
    """Train to the end from where the run was interrupted; returns the seconds spent in all."""
    step, seconds = run.restore()
    begin = time.perf_counter() - seconds
    run.model.train()
    average = float("nan")
    while step < recipe.steps:
        loss = run.step(rows[step * BATCH : (step + 1) * BATCH], rate_at(step, recipe))
        average = loss if math.isnan(average) else 0.98 * average + 0.02 * loss
        step, seconds = step + 1, time.perf_counter() - begin
        if step % 10 == 0:
            print(f"step {step}/{recipe.steps} loss {average:.4f} nats/token, {seconds:.0f} s", flush=True)
        if step % STORE_EVERY == 0:
            run.store(step, seconds)
    return seconds


def rate_at(step: int, recipe: Recipe) -> float:
    """Learning rate: up over `WARM_UP` steps, down linearly to zero at the end."""
    return recipe.rate * min(1.0, (step + 1) / WARM_UP) * (1 - step / recipe.steps)


@dataclass(frozen=True)
class Run:
    """A model in training, its optimizers, and the folder that an interrupted run resumes from."""

    folder: Path
    recipe: str  # hash of what decides the result: a stored state of another recipe is not resumed
    model: PreTrainedModel
    steppers: list[torch.optim.Optimizer]

    def step(self, batch: torch.Tensor, rate: float) -> float:
        """One update on a batch of windows; returns its loss in nats per token."""
        batch = batch.to(self.model.device)
        loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for stepper in self.steppers:
            for group in stepper.param_groups:
                group["lr"] = rate
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        return loss.item()

    def store(self, step: int, seconds: float) -> None:
        """Write weights and optimizer states; the progress file goes last and names them."""
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        tensors = {f"model.{name}": weight.detach().contiguous() for name, weight in trained.items()}
        for i, stepper in enumerate(self.steppers):
            for k, state in stepper.state_dict()["state"].items():
                tensors |= {f"stepper.{i}.{k}.{key}": value.contiguous() for key, value in state.items()}
        write_atomically(self.folder / f"{step}.safetensors", save(tensors))
        progress = {"step": step, "seconds": seconds, "recipe": self.recipe}
        write_atomically(self.folder / "progress.json", json.dumps(progress))
        for old in self.folder.glob("*.safetensors"):
            if old.stem != str(step):
                old.unlink()

    def restore(self) -> tuple[int, float]:
        """Load the newest stored state of this recipe; returns (steps done, seconds spent), else zeros."""
        file = self.folder / "progress.json"
        progress = json.loads(file.read_text()) if file.exists() else {"recipe": None}
        if progress["recipe"] != self.recipe:
            return 0, 0.0
        tensors = load_file(self.folder / f"{progress['step']}.safetensors")
        weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        self.model.load_state_dict(weights, strict=False)  # what is not trained is not stored
        for i, stepper in enumerate(self.steppers):
            whole = stepper.state_dict()
            for name, tensor in tensors.items():
                if name.startswith(f"stepper.{i}."):
                    k, key = name.split(".")[2:]
                    whole["state"].setdefault(int(k), {})[key] = tensor
            stepper.load_state_dict(whole)
        return progress["step"], progress["seconds"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.name)
