"""A network with some layers replaced, compared with the untouched one prompt by prompt.

Cost: one forward pass of each, the patched one from its lowest patched block on. Kept are the teacher's logits (n *
vocabulary numbers, tokens * vocabulary where every token counts) and the states that enter such a block (tokens *
width for each block that patches have begun at).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from chassis_utils.circulant.patch import patch
from chassis_utils.limits import require_memory
from chassis_utils.lm.forward import batches, encode, read_logits, token_logits
from chassis_utils.lm.model import LanguageModel
from chassis_utils.lm.resume import first_layer, output_below, resuming
from chassis_utils.metrics import cosine, evaluation_row, kl_divergence, kl_loss, l2, top_overlap


class Teacher:
    """Prompts, and the logits of the untouched network there, on the CPU: at their last tokens or at every one.

    Raises `ValueError` for prompts that cannot be read, `MemoryError` where the logits do not fit.
    """

    def __init__(self, model: LanguageModel, prompts: Sequence[str], every_token: bool) -> None:
        self.model, self.ids, self.every_token = model, encode(model, prompts), every_token
        self.positions = [len(row) if every_token else 1 for row in self.ids]
        size = sum(self.positions) * len(model.head.weight) * model.network.dtype.itemsize
        purpose = f"the teacher's logits at {sum(self.positions)} tokens"
        require_memory(size, purpose, "use fewer prompts, or their last tokens alone")
        self.logits = read_logits(model, self.ids, every_token)
        self._below: dict[tuple[int, ...], Any] = {}  # by layer and prompts: what the block before it returned

    def student(self, batch: Sequence[int], layer: int) -> Float[Tensor, "positions vocab"]:
        """Logits of the network as it is now for these prompts; before block `layer` it has to be untouched.

        Prompts of similar length are read together: padding would be worked out, and trained through, for nothing.
        """
        logits: dict[int, Tensor] = {}
        for alike in batches([self.ids[k] for k in batch]):
            numbers = [batch[k] for k in alike]
            rows = [self.ids[k] for k in numbers]
            key = (layer, *numbers)
            if layer and key not in self._below:
                self._below[key] = output_below(self.model, rows, layer)
            with resuming(self.model, layer, self._below.get(key)):
                read = token_logits(self.model, rows, self.every_token)
            logits |= zip(alike, read.split([self.positions[k] for k in numbers]), strict=True)
        return torch.cat([logits[k] for k in range(len(batch))])

    def loss(self, batch: Sequence[int], layer: int) -> Float[Tensor, ""]:
        """Mean KL(teacher || student) over the positions of these prompts, in float32 at least; `layer` as above."""
        student = self.student(batch, layer)
        teacher = torch.cat([self.logits[k] for k in batch]).to(student.device)
        return kl_loss(teacher, student)

    @torch.no_grad()
    def mean(self, layer: int) -> float:
        """The same over all prompts."""
        totals = [float(self.loss(batch, layer)) * sum(self.positions[k] for k in batch) for batch in batches(self.ids)]
        return math.fsum(totals) / sum(self.positions)


def compare(teacher: Teacher, replacements: Mapping[str, nn.Module]) -> pd.DataFrame:
    """The untouched and the patched network on each prompt of a teacher of every token, a row a prompt.

    At the last token: kl (nats), l2, cosine, top1, top5_overlap (shares); `next` and `patched_next`, the
    token that each would say, and whether it is among the other's five most likely. At every position:
    tokens, how many have the same argmax, and the mean kl. Raises `ValueError` for a teacher of last tokens.
    """
    if not teacher.every_token:
        raise ValueError("this teacher holds last tokens alone: make one of every token")
    rows: dict[int, dict[str, object]] = {}
    layer = first_layer(teacher.model, replacements)
    with torch.no_grad(), patch(teacher.model.network, replacements):
        for batch in batches(teacher.ids):
            students = teacher.student(batch, layer)
            for k, student in zip(batch, students.split([teacher.positions[k] for k in batch]), strict=True):
                rows[k] = _row(teacher.logits[k], student.cpu())
    return pd.DataFrame([rows[k] for k in range(len(rows))])


def summarise(comparison: pd.DataFrame) -> dict[str, float]:
    """The figures of `fft_prompt_metrics.csv` from `compare`; its overlaps count of 5, ours are shares."""
    shares = comparison.assign(per_text_agreement=comparison["agreeing"] / comparison["tokens"])
    names = ("l2", "kl", "cosine", "top5_overlap", "per_text_agreement")
    figures = {f"{name}_{of}": float(shares[name].agg(of)) for name in names for of in ("mean", "std")}
    counts = {"top1_match": "top1", "token_agreement": "agreeing", "token_total": "tokens"}
    figures |= {name: float(comparison[column].sum()) for name, column in counts.items()}
    return figures | {"next_in_top5": float(comparison["next_in_top5"].sum()), "n_prompts": float(len(comparison))}


def patched_row(
    comparison: pd.DataFrame, base_kl: float, groups: Sequence[str] | None = None, **keys: object
) -> dict[str, object]:
    """The evaluation row of a comparison at the last tokens behind `keys`, and what all tokens say.

    `base_kl` is what the gap is measured on: the KL of the network with these MLPs deleted.
    """
    kl = torch.tensor(comparison["kl"].to_numpy())
    top1, top5_overlap = float(comparison["top1"].mean()), float(comparison["top5_overlap"].mean())
    return evaluation_row(kl, base_kl, top1, top5_overlap, groups, **keys) | {
        "kl_every_token": float(comparison["kl_every_token"].mean()),
        "token_agreement": float(comparison["agreeing"].sum() / comparison["tokens"].sum()),
    }


def _row(teacher: Float[Tensor, "t vocab"], student: Float[Tensor, "t vocab"]) -> dict[str, object]:
    one, other = teacher[-1:], student[-1:]
    kl = kl_divergence(teacher, student)
    here, there = int(one.argmax()), int(other.argmax())
    return {
        "kl": float(kl[-1]),
        "l2": float(l2(one, other)),
        "cosine": float(cosine(one, other)),
        "top1": float(top_overlap(one, other, 1)),
        "top5_overlap": float(top_overlap(one, other, 5)),
        "next": here,
        "patched_next": there,
        "next_in_top5": here in other.topk(5).indices,
        "patched_next_in_top5": there in one.topk(5).indices,
        "tokens": len(teacher),
        "agreeing": int((teacher.argmax(-1) == student.argmax(-1)).sum()),
        "kl_every_token": float(kl.mean()),
    }
