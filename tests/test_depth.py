"""Edits at several layers follow an expert's states through the real blocks, or leave the base alone."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Build
from transformers import Gemma3TextConfig, LlamaConfig, MambaConfig, PretrainedConfig

from chassis_utils.adapters.adapter import Adapter, HeldOut
from chassis_utils.adapters.depth import SHARE, Depth, Lesson, fit_depth, fit_prompt, fit_sibling
from chassis_utils.adapters.port import Port
from chassis_utils.experts.prompted import Answered, PromptedExpert
from chassis_utils.experts.sibling import Sibling
from chassis_utils.files import MODELS, ROOT
from chassis_utils.lm.attention import check_attention
from chassis_utils.lm.chat import as_chat
from chassis_utils.lm.forward import continuations, pad, written
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
    numbers = range(len(answered.answers))
    taught, judges = [k for k in numbers if k % 5], [k for k in numbers if not k % 5]
    return (
        Lesson.of(model, answered.part(taught), [LAYER], [k % 5 for k in taught]),
        Lesson.of(model, answered.part(judges), [LAYER], [0] * len(judges)),
    )


def low_rank(model: LanguageModel, size: float = 0.3) -> Adapter:
    """An edit of rank one, the same at every call."""
    down, up = torch.randn(2, model.width, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return replace(Adapter.untouched(model.head), down=down / model.width**0.5, up=size * up, shift=up[:, 0] / 100)


def test_behind_the_skipped_tokens_a_row_of_the_base_is_the_end_of_the_experts(
    model: LanguageModel, answered: Answered
) -> None:
    told = PromptedExpert(model, "Words about arrays.").prompts(QUESTIONS)
    assert answered.skip == 2  # what begins a text, and the first word, which is another token behind a prompt
    for k, (bare, behind) in enumerate(zip(model.encode(QUESTIONS), told, strict=True)):
        assert answered.base_rows[k] == bare + answered.answers[k]
        assert answered.expert_rows[k] == behind + answered.answers[k]
        assert answered.expert_rows[k][-answered.lengths[k] :] == answered.base_rows[k][answered.skip :]
    owners, answering = answered.samples()
    assert owners.bincount().tolist() == answered.lengths
    assert owners[answering].bincount().tolist() == [len(answer) + 1 for answer in answered.answers]


def test_the_answers_are_the_greedy_ones_of_the_base_that_read_the_prompt(
    model: LanguageModel, answered: Answered
) -> None:
    texts = continuations(model, [f"Words about arrays.\n\n{question}" for question in QUESTIONS[:6]], TOKENS)
    assert [model.tokenizer.decode(answer) for answer in answered.answers[:6]] == texts


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


def test_a_stream_reads_what_the_block_reads_on_from_behind_its_attention(model: LanguageModel) -> None:
    rows, seen = model.encode(QUESTIONS[:1]), []
    norm = model.blocks[LAYER].get_submodule("post_attention_layernorm")
    handle = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.inference_mode():
        model.network(torch.tensor(rows))
    handle.remove()
    here = Stream.of(model, rows, [len(rows[0])]).on_to(LAYER).samples()
    torch.testing.assert_close(here, seen[0], atol=1e-5, rtol=1e-5)


def test_an_expert_that_is_an_edit_of_one_layer_is_followed_to_rounding(
    model: LanguageModel, answered: Answered
) -> None:
    parts = []
    for lesson in lessons(model, answered):
        base = lesson.at(LAYER)
        h = base.stream.samples()
        last = base.edited(low_rank(model)).stream.finished()
        parts.append(replace(lesson, targets={LAYER: h + low_rank(model).edit(h).float(), model.depth: last}))
    found = fit_depth(*parts, [LAYER], rank=1)
    assert found.held_out.base_kl > 0.01
    assert found.held_out.kl < 1e-6 * found.held_out.base_kl


def test_the_gate_keeps_nothing_of_noise(model: LanguageModel, answered: Answered) -> None:
    generator = torch.Generator().manual_seed(1)
    parts = []
    for lesson in lessons(model, answered):
        states = {layer: lesson.at(layer).stream.samples() for layer in lesson.targets}
        noisy = {layer: h + torch.randn(h.shape, generator=generator) * h.std() for layer, h in states.items()}
        parts.append(replace(lesson, targets=noisy))
    found = fit_depth(*parts, [LAYER, model.depth], rank=8)
    assert found.edits == {}
    assert found.held_out.kl == found.held_out.base_kl


def test_what_is_kept_is_better_on_the_questions_that_judge(model: LanguageModel, answered: Answered) -> None:
    taught, judges = lessons(model, answered)
    found = fit_depth(taught, judges, [LAYER, model.depth], rank=8)
    assert list(found.edits) == [LAYER, model.depth]
    assert found.held_out.kl < found.held_out.base_kl
    assert found.held_out.kl == pytest.approx(float(judges.kl(found.edits).mean()))
    assert found.parameters == sum(model.width * (2 * edit.rank + 1) for edit in found.edits.values())


@pytest.fixture
def depth(model: LanguageModel, answered: Answered) -> Depth:
    """An edit in the middle and one at the end."""
    return Depth({LAYER: low_rank(model), model.depth: low_rank(model, 0.1)}, answered.skip, HeldOut(0.1, 0.1, 0.2, 10))


def test_in_a_port_the_edits_hold_at_every_token_but_the_first_ones(
    model: LanguageModel, answered: Answered, depth: Depth
) -> None:
    (lesson, _), probe = lessons(model, answered), torch.tensor([answered.base_rows[0]])
    part = answered.part([1, 2, 3])
    counts = [len(answer) + 1 for answer in part.answers]
    wanted = model.head(lesson.last(depth.edits)[: sum(counts)]).split(counts)
    port = Port(model)
    port.plug("deep", depth)
    padded, mask = pad(part.base_rows, model.device, left=True)
    with torch.inference_mode():
        before = model.network(probe).logits
        with port.use("deep"):
            together = model.network(padded, attention_mask=mask, use_cache=False).logits
            for row, count, logits, beside in zip(part.base_rows, counts, wanted, together, strict=True):
                alone = model.network(torch.tensor([row]), use_cache=False).logits[0, -count:]
                torch.testing.assert_close(alone, logits, atol=1e-3, rtol=1e-3)
                if len(row) == padded.shape[1]:
                    torch.testing.assert_close(beside[-count:], logits, atol=1e-3, rtol=1e-3)
        assert torch.equal(before, model.network(probe).logits)
    assert port.memory["deep"] == 4 * depth.parameters


def test_what_was_saved_is_read_again_or_refused(model: LanguageModel, depth: Depth, tmp_path: Path) -> None:
    depth.save_pretrained(tmp_path)
    read, h = Depth.from_pretrained(tmp_path, model.head), torch.randn(3, model.width)
    assert (list(read.edits), read.skip, read.held_out) == (list(depth.edits), depth.skip, depth.held_out)
    for layer, edit in read.edits.items():
        torch.testing.assert_close(edit.edit(h), depth.edits[layer].edit(h), atol=1e-6, rtol=1e-5)
    (tmp_path / "depth.json").write_text('{"layers": [3], "skip": 1}')
    with pytest.raises(ValueError, match="damaged"):
        Depth.from_pretrained(tmp_path, model.head)
    with pytest.raises(ValueError, match=r"holds no depth\.json"):
        Depth.from_pretrained(tmp_path / "nowhere", model.head)


def test_generate_under_edits_is_greedy_step_by_step_for_each_row_of_a_mixed_batch(
    model: LanguageModel, depth: Depth
) -> None:
    rows, port = model.encode(QUESTIONS[:4]), Port(model)
    port.plug("deep", depth)
    untouched = written(model, rows, TOKENS)
    with port.use("deep"):
        alone = written(model, rows, TOKENS)
        for row, answer in zip(rows, alone, strict=True):
            grown = list(row)
            for token in answer:
                with torch.inference_mode():
                    assert token == int(model.network(torch.tensor([grown]), use_cache=False).logits[0, -1].argmax())
                grown.append(token)
    assert alone != untouched
    padded, mask = pad(rows, model.device, left=True)
    with port.use(["deep", None, "deep", None]):
        grown = model.network.generate(
            padded, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0
        )
    for k, row in enumerate(grown[:, padded.shape[1] :].tolist()):
        wanted = (untouched if k % 2 else alone)[k]
        assert row[: len(wanted)] == wanted


def test_of_nested_uses_the_innermost_holds_alone(model: LanguageModel, depth: Depth) -> None:
    rows, port = model.encode(QUESTIONS[:2]), Port(model)
    port.plug("deep", depth)
    with port.use("deep"):
        outside = written(model, rows, TOKENS)
        with port.use(None):
            assert written(model, rows, TOKENS) != outside
        assert written(model, rows, TOKENS) == outside


def test_what_does_not_fit_is_refused(model: LanguageModel, answered: Answered) -> None:
    with pytest.raises(ValueError, match="system prompt is empty"):
        PromptedExpert(model, " ")
    with pytest.raises(ValueError, match="layers 0 to 7"):
        Lesson.of(model, answered, [8], [0] * len(QUESTIONS))
    with pytest.raises(ValueError, match="no states of layer 4"):
        fit_depth(*lessons(model, answered), [4], 2)
    with pytest.raises(ValueError, match="a single fold"):
        fit_depth(*reversed(lessons(model, answered)), [LAYER], 2)
    with pytest.raises(ValueError, match="samples in a row"):
        Stream.of(model, [[1, 2]], [3])
    with pytest.raises(ValueError, match="name a later one"):
        Stream.of(model, [[1, 2]], [1]).on_to(0)


GEMMA = Gemma3TextConfig(
    vocab_size=4096,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)
MAMBA = MambaConfig(vocab_size=4096, hidden_size=16, num_hidden_layers=2, state_size=4)


@pytest.mark.parametrize(
    ("config", "reason"), [(GEMMA, "do not read on from"), (MAMBA, "has no attention")], ids=["gemma", "mamba"]
)
def test_blocks_without_that_place_are_refused(build: Build, config: PretrainedConfig, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_attention(load(str(build(config))))


def test_a_system_prompt_becomes_edits_that_a_port_answers_with(model: LanguageModel) -> None:
    told = fit_prompt(model, "Words about arrays.", QUESTIONS, tokens=TOKENS)
    assert list(told.edits) == list(range(model.depth + 1))
    assert 0.5 < told.parameters / (SHARE * model.parameters) <= 1
    assert told.held_out.gap_closed > 0.2
    port = Port(model)
    port.plug("told", told)
    with port.use("told"):
        (wanted,) = written(model, as_chat(model, [QUESTIONS[0]]), TOKENS)
    assert port.answer(QUESTIONS[0], use="told", tokens=TOKENS) == model.tokenizer.decode(wanted)
    assert port.answer(QUESTIONS[0], tokens=TOKENS) == continuations(model, [QUESTIONS[0]], TOKENS)[0]


@pytest.mark.parametrize(
    ("questions", "rank", "reason"),
    [(QUESTIONS[:11], None, "11 different texts are too few"), (QUESTIONS, 257, "rank 257")],
    ids=["few", "rank"],
)
def test_what_cannot_be_fitted_is_refused_before_long_work(
    model: LanguageModel, questions: list[str], rank: int | None, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        fit_prompt(model, "Be brief.", questions, rank)


def test_a_sibling_with_another_head_is_followed_at_the_last_state(model: LanguageModel) -> None:
    edit = low_rank(model)  # h -> W (h + edit(h)) is a head of its own
    weight = model.head.weight.double()
    turned = replace(model.head, weight=(weight + weight @ edit.up @ edit.down.T).float())
    sibling = replace(model, head=turned, fingerprint="turned")
    answered = Sibling(model, sibling).read([f"{a} and {b.lower()}" for a in QUESTIONS[::2] for b in QUESTIONS[::4]])
    half = len(answered.answers) // 2
    parts = [
        Lesson.of(model, answered.part(range(first, first + half)), [], [k % 3 for k in range(half)], sibling)
        for first in (0, half)
    ]
    found = fit_depth(*parts, [model.depth], rank=1)
    assert found.held_out.base_kl > 0.01
    assert found.held_out.kl < 1e-5 * found.held_out.base_kl


def test_a_sibling_is_followed_further_in_every_block_than_at_the_last_state(model: LanguageModel) -> None:
    sibling = load(str(MODELS / "sibling-math"))
    sums = [f"How much is {k} + {3 * k % 89}? It is {k + 3 * k % 89}." for k in range(90)]
    found = fit_sibling(model, sibling, sums, rank=8)
    assert list(found.edits) == list(range(model.depth + 1))
    answered = Sibling(model, sibling).read([f"How much is {k} + {k + 1}? It is {2 * k + 1}." for k in range(100, 130)])
    lesson = Lesson.of(model, answered, [], [0] * 30, sibling)
    taught = Sibling(model, sibling).read(sums)
    single = Lesson.of(model, taught, [], [k % 5 for k in range(90)], sibling).at(model.depth).fit().at(8)
    base, last, deep = (float(lesson.kl(edits).mean()) for edits in ({}, {model.depth: single}, found.edits))
    assert deep < last < base


def test_answers_count_and_else_every_token_but_the_first(model: LanguageModel) -> None:
    sibling = Sibling(model, load(str(MODELS / "sibling-math")))
    texts = ["How much is 3 + 4?", "Work out 9 + 8."]
    plain, asked = sibling.read(texts), sibling.read(texts, tokens=3)
    assert bool(plain.samples()[1].all())
    assert plain.lengths == [len(row) - 1 for row in model.encode(texts)]
    owners, answering = asked.samples()
    assert owners[answering].bincount().tolist() == [len(answer) + 1 for answer in asked.answers]
    assert asked.answers == written(sibling.model, model.encode(texts), 3)
    both = plain + asked
    assert (both.base_rows, both.skip) == (plain.base_rows + asked.base_rows, 1)


def test_a_checkpoint_of_other_sizes_is_no_sibling_at_depth(model: LanguageModel, build: Build) -> None:
    config = LlamaConfig(
        vocab_size=4096, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="2 blocks of width 16"):
        fit_sibling(model, load(str(build(config))), QUESTIONS)
    with pytest.raises(ValueError, match="single token"):
        Sibling(model, model).read([""])


def test_the_example_of_the_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(from chassis_utils import load, fit_prompt.*?)```", guide, re.DOTALL)
    (tmp_path / "questions.txt").write_text("\n".join(QUESTIONS), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(example.replace("path/to/an/instruction-tuned/base", str(MODELS / "port-llama")), {})
    assert capsys.readouterr().out.strip()
