"""Bits per byte of a base, an expert alongside and their mixes, token by token of the base.

Every distribution scored is one over the base's tokens behind the same bytes, and the scored token is that of the
base's own reading of the text, so that all rows count the same events. The first token of a text, before which the
expert has read nothing, is the base's alone in all of them. Cost: one step of the expert for each token of the
longest text, all texts in one batch.
"""

import math
from collections.abc import Sequence

import torch
from tqdm import trange

from chassis_utils.experts.alongside import Alongside, mix
from chassis_utils.lm.bits_per_byte import BitsPerByte
from chassis_utils.lm.forward import read_logits
from chassis_utils.text.prompts import require_texts


@torch.inference_mode()
def bits_by_weight(
    device: Alongside, texts: Sequence[str], weights: Sequence[float]
) -> tuple[list[BitsPerByte], float]:
    """Bits of each text at each weight, and the mean share of the expert's text that the base cannot write, dropped.

    Weight 0 is the base alone, 1 the expert in its place. Raises `ValueError` for a text that either model cannot read.
    """
    base, texts = device.base, require_texts(texts)
    rows = [base.begun(row) for row in base.encode(texts)]
    own = [logits.double().log_softmax(-1) for logits in read_logits(base, rows, every_token=True)]
    bits = torch.zeros(len(weights), len(rows), dtype=torch.float64)
    lost = torch.zeros(len(rows), dtype=torch.float64)
    for place in trange(1, max(map(len, rows)), desc=f"bits beside {device.expert.name}", disable=None, leave=False):
        q, gone = device.beside([row[: min(place, len(row) - 1)] for row in rows])  # ended rows stay as they are
        here = [k for k, row in enumerate(rows) if place < len(row)]
        lost[here] += gone[here]
        base_says, token = torch.stack([own[k][place - 1] for k in here]), [rows[k][place] for k in here]
        for number, weight in enumerate(weights):
            mixed = mix(base_says, q[here], weight)
            bits[number, here] -= mixed[range(len(here)), token] / math.log(2)
    sizes = torch.tensor([len(text.encode()) for text in texts], dtype=torch.float64)
    return [BitsPerByte(row, sizes) for row in bits], float(lost.sum() / sum(len(row) - 1 for row in rows))
