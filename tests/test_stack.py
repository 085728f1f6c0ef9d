"""A stack keeps what helps, leaves alone what does not, and finds an edit that was made in the middle."""

import pytest
import torch

from chassis_utils.adapters.stack import Task, fit_stack
from chassis_utils.experts.synthetic import SyntheticExpert
from chassis_utils.linalg import regression
from chassis_utils.lm.last_token import Prefixes, response
from chassis_utils.lm.model import LanguageModel
from chassis_utils.metrics import Reference, clearly_lower
from chassis_utils.text import prompts

LAYER, N = 3, 240


@pytest.fixture(scope="module")
def read(stories: LanguageModel) -> dict[str, Prefixes]:
    """Natural prompts to fit on and to test on, read by the real checkpoint."""
    parts = {part: prompts.texts(prompts.take("natural", "document", part, N)) for part in ("train", "test")}
    return {part: Prefixes.of(stories, texts) for part, texts in parts.items()}


def task(read: dict[str, Prefixes], target: torch.Tensor) -> Task:
    """Nine folds, the metric of the target, and the base's response to one middle layer."""
    head = read["train"].model.head
    metric = regression.vocabulary_metric(head.weight, head(target).double().softmax(-1).mean(0))
    folds = [k % 9 for k in range(N)]
    return Task(read["train"], head, target, folds, metric, {LAYER: response(read["train"], LAYER)})


def test_an_expert_at_the_head_is_left_to_the_last_adapter(read: dict[str, Prefixes]) -> None:
    model = read["train"].model
    h, tested = read["train"].finish()[-1], read["test"].finish()[-1]
    expert = SyntheticExpert.draw(model.width, 2).with_effect(0.3, model.head, h)
    stack = fit_stack(task(read, expert.states(h)), [LAYER, model.depth], [2, 2])
    assert stack.middle == {}
    reference = Reference(model.head(expert.states(tested)), model.head(tested))
    assert float(reference.kl(stack.logits(read["test"], model.head)).mean()) < 1e-6


def test_an_edit_of_a_middle_layer_is_found_through_the_blocks(read: dict[str, Prefixes]) -> None:
    model = read["train"].model
    h = read["train"].finish()[LAYER].double()
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, model.width, 1, generator=generator, dtype=torch.float64)
    size = 0.2 * float(h.norm(dim=1).mean() / (h @ down @ up.T).norm(dim=1).mean())

    def edit(states: torch.Tensor) -> torch.Tensor:
        return size * (states.double() @ down) @ up.T

    target = read["train"].finish({LAYER: edit})[-1].double()
    fitted = task(read, target)
    through = fit_stack(fitted, [LAYER, model.depth], [1, 0])
    reference = Reference(model.head(read["test"].finish({LAYER: edit})[-1]), model.head(read["test"].finish()[-1]))
    assert set(through.middle) == {LAYER}
    found = reference.kl(through.logits(read["test"], model.head))
    assert clearly_lower(found, reference.kl(reference.base))
