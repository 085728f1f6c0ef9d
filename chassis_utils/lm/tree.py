"""Prompts that begin alike, read together: what they share is read once.

The tokens of several prompts form a tree, with a node for each beginning. A network reads the nodes as one sequence,
each at its own depth and seeing its ancestors alone, as drafts are verified in speculative decoding (SpecInfer, arXiv
2305.09781); so each node has the states that it has in its prompts. Cost: one pass over the nodes, in whose attention
each meets all of them. Memory: the square of their number for the mask, and for each head where attention is eager.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from chassis_utils.lm.forward import layer_states
from chassis_utils.lm.model import LanguageModel

MOST_NODES = 2048  # beyond them attention costs more than the shared tokens save
MOST_OF_TOKENS = 2 / 3  # with a larger share of them as nodes, batches of similar length are as fast


@dataclass(frozen=True)
class Tree:
    """Beginnings of prompts, each with its last token and the number of the beginning before it."""

    tokens: list[int]
    parents: list[int]  # -1 before a first token
    nodes: list[list[int]]  # those of each prompt, from its first token to its last

    @classmethod
    def of(cls, ids: Sequence[list[int]]) -> "Tree":
        """The tree of these prompts."""
        numbers: dict[tuple[int, int], int] = {}  # of each parent and token
        nodes = []
        for row in ids:
            path = [-1]
            for token in row:
                path.append(numbers.setdefault((path[-1], token), len(numbers)))
            nodes.append(path[1:])
        return cls([token for _, token in numbers], [parent for parent, _ in numbers], nodes)

    def suits(self, model: LanguageModel) -> bool:
        """Whether reading the tree gives what the prompts alone give, in less time.

        The model has to take positions and a mask as they are given: its embeddings of positions are rotary, and its
        windows hold the longest prompt.
        """
        config, longest = model.network.config.get_text_config(), max(map(len, self.nodes))
        windows = (getattr(config, name, None) or math.inf for name in ("sliding_window", "attention_chunk_size"))
        few = len(self.tokens) <= min(MOST_NODES, MOST_OF_TOKENS * sum(map(len, self.nodes)))
        rotary = any("rotary" in name for name, _ in model.body.named_children())
        rotary = rotary and not getattr(config, "alibi", False)  # Falcon has modules for both
        takes_positions = "position_ids" in inspect.signature(model.body.forward).parameters
        return few and longest <= min(windows) and rotary and takes_positions and model.keeps_keys

    def states(self, model: LanguageModel) -> list[Shaped[Tensor, "nodes d"]]:
        """The states of each layer at the nodes, as of `layer_states`."""
        ids, places = torch.tensor([self.tokens], device=model.device), torch.zeros(1, len(self.tokens)).long()
        for path in self.nodes:
            places[0, path] = torch.arange(len(path))
        mask = self._mask(model.network.dtype).to(model.device)
        found = layer_states(model, ids, attention_mask=mask, position_ids=places.to(model.device), use_cache=False)
        return [layer[0] for layer in found]

    def _mask(self, dtype: torch.dtype) -> Float[Tensor, "1 1 nodes nodes"]:
        """What is added to the attention of each node: nothing at its ancestors and itself."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[None, None]
