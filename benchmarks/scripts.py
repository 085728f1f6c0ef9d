"""The computations of the CHASSIS study's scripts as they were made: the peers of the package, not to be used.

States are collected anew for each step, in batches of prompts as they come, with all layers kept; every regression is
in float32 against the stored logits of all samples, so that one system of d unknowns is solved for V columns.
`chassis_utils.as_reported` computes the same numbers with less work, for the notebooks.
"""

import torch
from torch import Tensor

from chassis_utils.as_reported.adapters import KEPT, RIDGE
from chassis_utils.lm.forward import encode, pad
from chassis_utils.lm.model import LanguageModel

BATCH = 32  # prompts


@torch.inference_mode()
def collect(model: LanguageModel, texts: list[str]) -> Tensor:
    """States [layers, n, width] at the last token of each text."""
    ids, parts = encode(model, texts), []
    for first in range(0, len(ids), BATCH):
        rows = ids[first : first + BATCH]
        padded, mask = pad(rows, model.device)
        read = model.network(padded, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        parts.append(torch.stack([layer[torch.arange(len(rows)), mask.sum(1) - 1].cpu() for layer in read]))
    return torch.cat(parts, dim=1).float()


def ridge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [d, V] and intercept of centred ridge regression."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    centred, targets = x - x_mean, y - y_mean
    gram = centred.T @ centred + RIDGE * torch.eye(x.shape[1])
    weight = torch.linalg.solve(gram, centred.T @ targets)
    return weight, y_mean - x_mean @ weight


def kl(expert: Tensor, logits: Tensor) -> float:
    """Mean KL(expert || adapted) in nats, float32."""
    log_p, log_q = expert.log_softmax(-1), logits.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


class MethodA:
    """A lens, its columns of largest norm, a second ridge to what they add to the head, and that one's SVD."""

    def __init__(self, h: Tensor, logits: Tensor, unembedding: Tensor) -> None:
        weight, bias = ridge(h, logits)
        self.columns = weight.norm(dim=0).topk(max(1, round(KEPT * weight.shape[1]))).indices
        change = (h @ weight + bias)[:, self.columns] - h @ unembedding[self.columns].T
        second, self.shift = ridge(h, change)
        self.u, self.s, self.vt = torch.linalg.svd(second, full_matrices=False)

    def logits(self, h: Tensor, base: Tensor, rank: int) -> Tensor:
        """The base's logits with those columns edited."""
        edited = base.clone()
        edited[:, self.columns] += ((h @ self.u[:, :rank]) * self.s[:rank]) @ self.vt[:rank] + self.shift
        return edited
