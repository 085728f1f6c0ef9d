"""Models that tests run on: real checkpoints beside the repository, and tiny ones of any architecture."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PhiConfig, PretrainedConfig, PreTrainedModel

from chassis_utils.files import MODELS, ROOT
from chassis_utils.lm.model import LanguageModel, load
from chassis_utils.text.corpus import PARTS, Document, read_documents

settings.register_profile("chassis", deadline=None, max_examples=30, derandomize=True, database=None)
settings.load_profile("chassis")

VOCABULARY = 4096  # of the shipped tokenizer that the tiny models read with
SIZES = {  # of the tiny models
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
STORIES = ROOT.parent / "shared" / "models" / "stories260K"

Build = Callable[..., Path]


@pytest.fixture(scope="session")
def stories_folder() -> Path:
    """A real checkpoint that nobody here trained."""
    if not STORIES.is_dir():
        pytest.skip("shared/models/stories260K is absent: it is real test data kept beside the repository")
    return STORIES


@pytest.fixture(scope="session")
def stories(stories_folder: Path) -> LanguageModel:
    """The real checkpoint, loaded."""
    return load(str(stories_folder))


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Saves a randomly initialised model of a configuration, after an optional change to it."""

    def save(
        config: PretrainedConfig, change: Callable[[PreTrainedModel], object] = id, tokenizer: str = "port-llama"
    ) -> Path:
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in network.parameters():  # biases and norms too, which start at 0 and 1
                parameter += 0.2 * torch.randn_like(parameter)
            change(network)
        folder = tmp_path_factory.mktemp(config.model_type)
        network.save_pretrained(folder)
        shutil.copy(MODELS / tokenizer / "tokenizer.json", folder)
        return folder

    return save


@pytest.fixture(scope="session")
def documents() -> dict[str, list[Document]]:
    """The corpus by side, read once."""
    return {split: read_documents(split) for split in PARTS}


def tiny_llama(**changes: object) -> LlamaConfig:
    """Rotary positions, RMS norm."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaConfig(**{"vocab_size": VOCABULARY, "max_position_embeddings": 64} | sizes | changes)


@pytest.fixture(scope="session")
def tiny_llama_model(build: Build) -> LanguageModel:
    """A random Llama."""
    return load(str(build(tiny_llama())))


@pytest.fixture(scope="session")
def tiny_gpt2(build: Build) -> LanguageModel:
    """A random GPT-2: learned positions, tied head."""
    return load(str(build(GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=2))))


@pytest.fixture(scope="session")
def tiny_phi(build: Build) -> LanguageModel:
    """A random Phi: parallel block, partial rotary positions, a bias in the head."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return load(str(build(PhiConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes))))
