"""Edits at several layers follow an expert's states through the real blocks, or leave the base alone."""

from dataclasses import replace

import pytest
import torch
from conftest import Build
from transformers import LlamaConfig

from chassis_utils.adapters.adapter import Adapter
from chassis_utils.adapters.depth import Depth, Lesson, fit_depth
from chassis_utils.experts.prompted import Answered, PromptedExpert, written
from chassis_utils.files import MODELS
from chassis_utils.lm.forward import continuations, pad
from chassis_utils.lm.model import LanguageModel, load
from chassis_utils.lm.stream import Stream

LAYER, TOKENS = 3, 8
QUESTIONS = [f"{verb} {thing}" for verb in ("Returns a", "The sum of", "Parameters of the") for thing in
             ("matrix", "list of names", "file", "random tree", "model", "date", "vector", "class", "string", "graph",
              "table", "number", "path", "key", "window", "colour", "time", "group", "test", "field")]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """The shipped base."""
    return load(str(MODELS / "port-llama"))


@pytest.fixture(scope="module")
def answered(model: LanguageModel) -> Answered:
    """Questions with the answers of a base that was told something."""
    return PromptedExpert(model, "Words about arrays.").answered(QUESTIONS, TOKENS)


def lessons(model: LanguageModel, answered: Answered) -> tuple[Lesson, Lesson]:
    """What is fitted to, in four folds, and the questions that judge."""
    numbers = range(len(answered.lengths))
    taught = [k for k in numbers if k % 5]
    parts = (answered.part(taught), answered.part([k for k in numbers if not k % 5]))
    return (
        Lesson.of(model, parts[0], [LAYER], [k % 5 for k in taught]),
        Lesson.of(model, parts[1], [LAYER], [0] * len(parts[1].lengths)),
    )


def low_rank(model: LanguageModel, size: float = 0.3) -> Adapter:
    """An edit of rank one, the same at every call."""
    down, up = torch.randn(2, model.width, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return replace(Adapter.untouched(model.head), down=down / model.width**0.5, up=size * up, shift=up[:, 0] / 100)


def test_base_and_expert_read_the_same_tokens_from_the_end_of_the_prompt_on(
    model: LanguageModel, answered: Answered
) -> None:
    told = PromptedExpert(model, "Words about arrays.").prompts(QUESTIONS)
    for bare, behind, row, length in zip(
        model.encode(QUESTIONS), told, answered.base_rows, answered.lengths, strict=True
    ):
        assert row[:-length] == bare[:-1]
        assert len(behind) > len(bare)
    tails = zip(answered.base_rows, answered.expert_rows, answered.lengths, strict=True)
    assert all(row[-length:] == other[-length:] for row, other, length in tails)
    assert len(answered.owners()) == sum(answered.lengths)


def test_the_answers_are_the_greedy_ones_of_the_base_that_read_the_prompt(
    model: LanguageModel, answered: Answered
) -> None:
    texts = continuations(model, [f"Words about arrays.\n\n{question}" for question in QUESTIONS[:6]], TOKENS)
    answers = [row[len(row) + 1 - n :] for row, n in zip(answered.base_rows, answered.lengths, strict=True)]
    assert [model.tokenizer.decode(answer) for answer in answers[:6]] == texts


def test_a_chat_template_carries_the_system_prompt(build: Build) -> None:
    config = LlamaConfig(
        vocab_size=4096, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    folder = build(config)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    expert = PromptedExpert(load(str(folder)), "Be brief.")
    read = [expert.base.tokenizer.decode(row) for row in (*expert.prompts(["Why?"]), *expert.prompts(["Why?"], False))]
    assert read == ["system: Be brief.\nuser: Why?\nassistant:", "user: Why?\nassistant:"]


def test_a_stream_gives_what_each_row_alone_gives(model: LanguageModel, answered: Answered) -> None:
    stream = Stream.of(model, answered.base_rows, answered.lengths).on_to(LAYER).on_to(5)
    parts = stream.samples().split(answered.lengths)
    for k in (0, 7, 31):
        alone = Stream.of(model, [answered.base_rows[k]], [answered.lengths[k]]).on_to(5).samples()
        torch.testing.assert_close(parts[k], alone, atol=1e-4, rtol=1e-4)


def test_an_expert_that_is_an_edit_of_one_layer_is_followed_to_rounding(
    model: LanguageModel, answered: Answered
) -> None:
    parts = []
    for lesson in lessons(model, answered):
        base = lesson.at(LAYER)
        h = base.stream.samples()
        targets = {LAYER: h + low_rank(model).edit(h).float(), model.depth: base.edited(low_rank(model)).last()}
        parts.append(replace(lesson, targets=targets))
    base_kl = float(parts[1].kl().mean())
    found = fit_depth(*parts, [LAYER], rank=4)
    assert found.edits[LAYER].rank == 1
    assert base_kl > 0.01
    assert float(parts[1].kl(found.edits).mean()) < 1e-6 * base_kl


def test_the_gate_keeps_nothing_of_noise(model: LanguageModel, answered: Answered) -> None:
    generator = torch.Generator().manual_seed(1)
    parts = []
    for lesson in lessons(model, answered):
        states = {layer: lesson.at(layer).stream.samples() for layer in lesson.targets}
        noisy = {layer: h + torch.randn(h.shape, generator=generator) * h.std() for layer, h in states.items()}
        parts.append(replace(lesson, targets=noisy))
    assert fit_depth(*parts, [LAYER, model.depth], rank=8).edits == {}


def test_nothing_is_worse_than_the_base_on_the_questions_that_judge(model: LanguageModel, answered: Answered) -> None:
    found = fit_depth(*lessons(model, answered), [LAYER, model.depth], rank=8)
    steps = list(found.judged.values())
    assert list(found.judged) == [0, LAYER, model.depth]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] < steps[0]
    assert found.parameters == sum(model.width * (2 * edit.rank + 1) for edit in found.edits.values())


def test_in_the_live_network_the_edits_hold_from_the_end_of_the_prompts_on(
    model: LanguageModel, answered: Answered
) -> None:
    depth = Depth({LAYER: low_rank(model), model.depth: low_rank(model, 0.1)}, {})
    (lesson, _), probe = lessons(model, answered), torch.tensor([answered.base_rows[0]])
    rows, lengths = answered.part([1, 2, 3]).base_rows, answered.part([1, 2, 3]).lengths
    wanted = model.head(lesson.last(depth.edits)[: sum(lengths)])
    with torch.inference_mode():
        before = model.network(probe).logits
        for row, length, logits in zip(rows, lengths, wanted.split(lengths), strict=True):
            with depth.in_place(model, len(row) - length):
                given = model.network(torch.tensor([row]), use_cache=False).logits[0, -length:]
            torch.testing.assert_close(given, logits, atol=1e-3, rtol=1e-3)
        assert torch.equal(before, model.network(probe).logits)


def test_generate_under_edits_is_greedy_step_by_step(model: LanguageModel) -> None:
    depth = Depth({LAYER: low_rank(model), model.depth: low_rank(model, 0.1)}, {})
    rows = model.encode(QUESTIONS[:3])
    answers = written(model, rows, TOKENS, lambda start: depth.in_place(model, start))
    assert answers != written(model, rows, TOKENS)
    padded, mask = pad(rows, model.device, left=True)
    start = padded.shape[1] - 1
    with torch.inference_mode(), depth.in_place(model, start):
        for _ in range(TOKENS):
            token = model.network(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
            padded = torch.cat([padded, token[:, -1:].argmax(-1)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    for answer, row in zip(answers, padded[:, start + 1 :].tolist(), strict=True):
        assert answer == row[: len(answer)]


def test_what_does_not_fit_is_refused(model: LanguageModel, answered: Answered) -> None:
    with pytest.raises(ValueError, match="system prompt is empty"):
        PromptedExpert(model, " ")
    with pytest.raises(ValueError, match="to write"):
        written(model, model.encode(["a"]), 0)
    with pytest.raises(ValueError, match="layers 1 to 7"):
        Lesson.of(model, answered, [8], [0] * len(QUESTIONS))
    with pytest.raises(ValueError, match="no states of layer 4"):
        fit_depth(*lessons(model, answered), [4], 2)
    with pytest.raises(ValueError, match="a single fold"):
        fit_depth(*reversed(lessons(model, answered)), [LAYER], 2)
    with pytest.raises(ValueError, match="samples in a row"):
        Stream.of(model, [[1, 2]], [3])
    with pytest.raises(ValueError, match="name a later one"):
        Stream.of(model, [[1, 2]], [1]).on_to(0)
