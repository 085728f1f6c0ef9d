"""A whole model with cheaper MLPs, fitted in closed form: how fast, and how much worse at predicting text.

    python benchmarks/compressed.py --base models/port-llama --shares 0.8 0.6 0.5

Every MLP projection of every layer is replaced at once, by a layer with that share of its weights, nearest to it on the
inputs that it has in the untouched model (second moments S of them, gathered in one pass over training documents):

- `SVD`: the low-rank layer nearest to the weights, which looks at no text;
- `activation-aware SVD`: the low-rank layer nearest on S, the whitening of SVD-LLM (arXiv 2403.07378);
- `block-circulant`: blocks of two, which hold half of the weights, nearest on S (exact at every frequency);
- `circulant and low rank`: blocks of `--block`, and low rank with what is left of the weights, fitted in turns.

Perplexity is that of a token of held-out documents, tokens per second those of decoding with a cache, on one thread,
timed in turn.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from measure import Row, print_rows, row
from torch import Tensor, nn

from chassis_utils import files
from chassis_utils.circulant.layer import BlockCirculantLinear, average
from chassis_utils.circulant.low_rank import LowRankLinear
from chassis_utils.circulant.patch import as_linear, mlp_projections, patch
from chassis_utils.linalg.moments import gram_matrix
from chassis_utils.linalg.regression import solve_symmetric
from chassis_utils.lm.bits_per_byte import bits_per_byte
from chassis_utils.lm.forward import batches, pad
from chassis_utils.lm.model import LanguageModel, load
from chassis_utils.text import corpus, prompts
from chassis_utils.timing import median_seconds

DAMPING = 1e-4  # of second moments, times their mean eigenvalue
LONGEST = 1000  # characters of a training text
DECODED = 16  # tokens that are timed behind a prompt of 64


class Sum(nn.Module):
    """The sum of two layers of one shape."""

    def __init__(self, first: nn.Module, second: LowRankLinear) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.in_features, self.out_features = second.in_features, second.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Both outputs together."""
        return self.first(x) + self.second(x)


@torch.no_grad()
def second_moments(model: LanguageModel, texts: list[str]) -> dict[str, Tensor]:
    """X^T X of the inputs of each projection at the real tokens, float64, damped; equal inputs share one."""
    paths = [path for layer in range(model.depth) for path in mlp_projections(model.network, layer)]
    read = {path: model.network.get_submodule(path) for path in paths if not path.endswith("up_proj")}  # gate's inputs
    sums = {path: torch.zeros(module.in_features, module.in_features).double() for path, module in read.items()}
    kept: list[Tensor] = []

    def add(path: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sums[path] += gram_matrix(inputs[0][kept[-1]])

    hooks = [module.register_forward_pre_hook(partial(add, path)) for path, module in read.items()]
    ids = model.encode(texts)
    for batch in batches(ids):
        padded, mask = pad([ids[k] for k in batch], model.device)
        kept.append(mask.bool())
        model.body(padded, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    damped = {path: s + DAMPING * s.diagonal().mean() * torch.eye(len(s)).double() for path, s in sums.items()}
    return {path: damped[path.replace("up_proj", "gate_proj")] for path in paths}


def rank_of(linear: nn.Linear, share: float) -> int:
    """The largest rank with no more than that share of the weights."""
    return max(0, int(share * linear.weight.numel() / sum(linear.weight.shape)))


def factors(weight: Tensor, s: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factors (up, down) whose first r columns and rows are nearest to `weight` at rank r: plainly, or on S = L L^T.

    The second is W L truncated, times L^-1.
    """
    root = torch.eye(weight.shape[1]).double() if s is None else torch.linalg.cholesky(s)
    u, values, vt = torch.linalg.svd(weight @ root, full_matrices=False)
    return u * values, torch.linalg.solve_triangular(root, vt, upper=False, left=False)


def aware_circulant(weight: Tensor, s: Tensor, block: int) -> Tensor:
    """The first columns of the circulant blocks nearest to `weight` on S: P(W S) P(S)^-1, solved at each frequency."""
    ws, ss = (torch.fft.rfft(average(matrix, block)).permute(2, 0, 1) for matrix in (weight @ s, s))
    solved = torch.stack([solve_symmetric(each, wanted.mH).mH for each, wanted in zip(ss, ws, strict=True)])
    return torch.fft.irfft(solved.permute(1, 2, 0), n=block)


def circulant_layer(linear: nn.Linear, c: Tensor) -> BlockCirculantLinear:
    """The layer with these first columns."""
    return BlockCirculantLinear.of(linear, c.to(linear.weight.dtype), torch.zeros(linear.out_features))


def both(linear: nn.Linear, s: Tensor, share: float, options: Any) -> Sum:
    """Circulant blocks and low rank, each fitted in turn to what the other leaves."""
    weight = linear.weight.double()
    rank, low = rank_of(linear, share - 1 / options.block), torch.zeros_like(weight)
    for _ in range(options.turns):
        circulant = circulant_layer(linear, aware_circulant(weight - low, s, options.block))
        up, down = factors(weight - circulant.to_dense().double(), s)
        low = up[:, :rank] @ down[:rank]
    return Sum(circulant, LowRankLinear.of(linear, down[:rank], up[:, :rank], None))


def of_share(linear: nn.Linear, s: Tensor, options: Any) -> dict[tuple[str, float], nn.Module]:
    """The layers of every kind and share that take the place of one projection."""
    weight, made = linear.weight.double(), {}
    for kind, (up, down) in {"SVD": factors(weight), "activation-aware SVD": factors(weight, s)}.items():
        for share in options.shares:
            rank = rank_of(linear, share)
            made[kind, share] = LowRankLinear.of(linear, down[:rank], up[:, :rank], None)
    for share in options.shares:
        made["circulant and low rank", share] = both(linear, s, share, options)
    made["block-circulant", 0.5] = circulant_layer(linear, aware_circulant(weight, s, 2))
    return made


def decode(model: LanguageModel, layers: dict[str, nn.Module], prompt: Tensor) -> None:
    """Read a prompt, and write on behind it."""
    with patch(model.network, layers):
        model.network.generate(prompt, max_new_tokens=DECODED, min_new_tokens=DECODED, do_sample=False, pad_token_id=0)


@torch.no_grad()
def compare(model: LanguageModel, fitted_on: list[str], tested: list[str], options: Any) -> Iterator[Row]:
    """The rows of all shares and kinds."""
    moments = second_moments(model, fitted_on)
    linear = {path: as_linear(model.network.get_submodule(path)) for path in moments}
    kinds: dict[tuple[str, float], dict[str, nn.Module]] = {("dense", 1.0): {}}
    for path, s in moments.items():
        for name, layer in of_share(linear[path], s, options).items():
            kinds.setdefault(name, {})[path] = layer
    tokens, size = sum(map(len, model.encode(tested))), sum(module.weight.numel() for module in linear.values())
    prompt = torch.tensor(model.encode(tested)[0][:64])[None]
    perplexity = {}
    for name, layers in kinds.items():
        with patch(model.network, layers):
            perplexity[name] = math.exp(float(bits_per_byte(model, tested).bits.sum()) * math.log(2) / tokens)
    torch.set_num_threads(1)
    seconds = median_seconds({name: partial(decode, model, layers, prompt) for name, layers in kinds.items()}, 3)
    for (kind, share), taken in seconds.items():
        held = sum(
            p.numel() for layer in kinds[kind, share].values() for n, p in layer.named_parameters() if "bias" not in n
        )
        keys = {"share": share, "share_of_model": 1 - (size - held) / model.parameters if held else 1.0, "threads": 1}
        figures = {"seconds": taken, "perplexity": perplexity[kind, share], "tokens_per_s": DECODED / taken}
        yield row("compressed model", kind, seconds["dense", 1.0], **figures, **keys)


def measured(arguments: Sequence[str]) -> Iterator[Row]:
    """The rows, for these arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="models/port-llama")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.6, 0.5])
    parser.add_argument("--block", type=int, default=8, help="size of the circulant blocks beside low rank")
    parser.add_argument("--turns", type=int, default=3, help="of fitting circulant blocks and low rank")
    parser.add_argument("--threads", type=int, default=1, help="of fitting; decoding is timed on one")
    parser.add_argument("--fitted", type=int, default=512, help="training prompts")
    parser.add_argument("--documents", type=int, default=24, help="held-out documents that perplexity is measured on")
    parser.add_argument("--prose", default="", help="a folder of texts in place of the shipped models' corpus")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model = load(options.base, device="cpu")
    yield from compare(model, *read_texts(options), options)


def read_texts(options: Any) -> tuple[list[str], list[str]]:
    """Training texts, and held-out documents: of the shipped models' corpus, or of a folder."""
    count = options.documents
    if not options.prose:
        held_out = [document.text for document in corpus.read_unseen("test")[:count]]
        return prompts.texts(prompts.take("natural", "document", "train", options.fitted)), held_out
    texts = [document.text for document in corpus.read_texts(files.locate(options.prose))]
    return [text[first : first + LONGEST] for text in texts[count:] for first in range(0, len(text), LONGEST)][
        : options.fitted
    ], texts[:count]


if __name__ == "__main__":
    print_rows(measured)
