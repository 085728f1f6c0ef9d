"""Fitting in one call: the README's example, every position, and the gate that never leaves a user worse off."""

import re
from pathlib import Path

import pytest
import torch
from test_adapters import WIDTH, a_head, normal, states
from torch import Tensor

from chassis_utils import Port, fit, load
from chassis_utils.adapters.adapter import Adapter
from chassis_utils.adapters.fit import fit_gated, fit_logits, fit_states
from chassis_utils.experts.sibling import Sibling
from chassis_utils.experts.synthetic import SyntheticExpert, SyntheticModel
from chassis_utils.files import MODELS, ROOT
from chassis_utils.lm.forward import every_position, prefixes
from chassis_utils.lm.model import Head, LanguageModel
from chassis_utils.lm.states import collect, last_states
from chassis_utils.metrics import kl_divergence, standard_error
from chassis_utils.text import prompts

SHARED = ROOT.parent / "shared" / "models"
SUMS = [f"What is {i} + {i + 3}? It is {2 * i + 3}." for i in range(120)]
HELD_OUT = [f"What is {i} + {i + 3}? It is {2 * i + 3}." for i in range(500, 540)]


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return load(str(MODELS / "port-llama"))


@pytest.fixture(scope="module")
def sibling(base: LanguageModel) -> Sibling:
    return Sibling(base, load(str(MODELS / "sibling-math")))


def kl_on(base: LanguageModel, expert: Sibling | SyntheticModel, adapter: Adapter, texts: list[str]) -> Tensor:
    """KL(expert || adapted) at every position of texts."""
    places = every_position(base, texts)
    adapted = adapter.logits(last_states(base, texts, places), base.head)
    return kl_divergence(expert.logits(texts, places), adapted)


def test_the_readme_example_runs_and_carries_the_expert(base: LanguageModel, tmp_path: Path, monkeypatch) -> None:
    (example,) = re.findall(
        r"```python\n(from chassis_utils import load, fit,.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    (tmp_path / "sums.txt").write_text("\n".join(SUMS))
    monkeypatch.chdir(tmp_path)
    example = example.replace("path/to/base", str(MODELS / "port-llama")).replace(
        "path/to/expert", str(MODELS / "sibling-math")
    )
    names: dict[str, object] = {}
    exec(example.replace("texts.txt", "sums.txt"), names)
    adapter = names["adapter"]
    assert isinstance(adapter, Adapter) and adapter.held_out and adapter.held_out.gap_closed > 0.5
    assert f"{adapter.held_out.gap_closed:.0%} of the gap closed" in repr(adapter)
    expert = Sibling(base, load(str(MODELS / "sibling-math")))
    closed = (
        1
        - kl_on(base, expert, adapter, HELD_OUT).mean()
        / kl_on(base, expert, Adapter.untouched(base.head), HELD_OUT).mean()
    )
    assert closed > 0.5  # on texts that no fit has seen


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared checkpoints are not beside this repository")
def test_the_readme_example_runs_on_models_that_nobody_here_trained() -> None:
    base, expert = load(str(SHARED / "stories260K")), load(str(SHARED / "llama2xs"))
    stories = [
        f"Once upon a time there was a {a} {b}. The {b} was very {c}."
        for a in ("big", "red", "sad", "old")
        for b in ("dog", "cat", "boy", "girl")
        for c in ("happy", "tired", "kind", "funny")
    ]
    adapter = fit(base, expert, stories)
    assert adapter.held_out is not None and adapter.held_out.kl <= adapter.held_out.base_kl
    port = Port(base)
    port.plug("other", adapter)
    assert port.generate("Once upon a time", use="other")


def test_an_expert_with_another_tokenizer_is_bridged(base: LanguageModel) -> None:
    adapter = fit(base, load(str(MODELS / "expert-phi")), SUMS[:40], positions=200)
    assert adapter.held_out is not None and adapter.held_out.n == 200
    assert adapter.held_out.kl <= adapter.held_out.base_kl


def test_an_exact_expert_is_found_at_its_rank_and_no_more(base: LanguageModel) -> None:
    h = last_states(base, SUMS)
    drawn = SyntheticExpert.draw(base.width, 4).with_effect(0.5, base.head, h)
    adapter = fit(base, SyntheticModel(base, drawn), SUMS)
    assert adapter.rank == 4
    assert adapter.held_out is not None and adapter.held_out.kl < 1e-6


def test_the_gate_gives_the_base_back_where_nothing_carries_over() -> None:
    head, h = a_head(0), states(0)
    folds = [k % 5 for k in range(len(h))]
    logits = head(h) + normal(9, *head(h).shape)  # noise that no state foretells
    noise = logits - logits.mean(0) + head(h).mean(0)
    adapter = fit_gated(h, noise, head, folds)
    assert adapter.edits_nothing and "edits nothing: no fit was clearly better" in repr(adapter)
    assert torch.equal(adapter.logits(h, head), head(h))
    ungated = fit_logits(h[::2], noise[::2], head, [k % 5 for k in range(len(h[::2]))]).at(WIDTH)
    assert (
        kl_divergence(noise[1::2], ungated.logits(h[1::2], head)).mean()
        > kl_divergence(noise[1::2], head(h[1::2])).mean()
    )


def sums_with_first_digits(first: int, n: int) -> list[str]:
    """Where the next digit of a sum is asked for: what no edit of a last state can know."""
    pairs = [(7919 * i % 1000, (104729 * i + i // 1000) % 1000) for i in range(first, first + n)]
    return [f"{a} + {b} = {str(a + b)[: i % len(str(a + b))]}" for i, (a, b) in enumerate(pairs, first)]


def test_what_the_gate_returns_is_not_worse_than_the_base_on_the_answers_of_sums(sibling: Sibling) -> None:
    train, tested = sums_with_first_digits(0, 1024), sums_with_first_digits(8000, 256)
    head = sibling.base.head
    h, z = last_states(sibling.base, train), sibling.logits(train)
    adapter = fit_gated(h, z, head, [k % 5 for k in range(len(train))])
    state, goal = last_states(sibling.base, tested), sibling.logits(tested)
    gain = kl_divergence(goal, head(state)) - kl_divergence(goal, adapter.logits(state, head))
    assert float(gain.mean()) >= -standard_error(gain)


def test_a_rank_that_is_asked_for_is_kept_and_one_too_large_refused(sibling: Sibling) -> None:
    assert fit(sibling.base, sibling, SUMS[:40], rank=3).rank == 3
    with pytest.raises(ValueError, match="rank 999 is beyond the limit"):
        fit(sibling.base, sibling, SUMS[:40], rank=999)


def test_a_scaled_head_is_followed_in_units_of_its_product() -> None:
    weight, h = normal(1, 20, WIDTH), states(2)
    for head in (Head(weight, scale=0.1), Head(weight, softcap=5.0)):
        target = h + 0.3 * h @ normal(3, WIDTH, 2) @ normal(4, 2, WIDTH)
        adapter = fit_logits(h, head(target), head, [k % 5 for k in range(len(h))], penalty=1e-9).at(2)
        assert float(kl_divergence(head(target), adapter.logits(h, head)).max()) < 1e-9
    with pytest.raises(ValueError, match="beyond the base's cap of 5"):
        head.unfinish(torch.full((1, 20), 6.0))


def test_states_and_logits_of_an_expert_with_the_same_head_give_the_same_adapter() -> None:
    head, h = a_head(3), states(3)
    target, folds = h + 0.1 * h @ normal(5, WIDTH, 3) @ normal(6, 3, WIDTH), [k % 5 for k in range(len(h))]
    by_states, by_logits = fit_states(h, target, head, folds), fit_logits(h, head(target), head, folds)
    one, other = (path.at(3).logits(h, head) for path in (by_states, by_logits))
    assert float(kl_divergence(one, other).max()) < 1e-9
    assert by_states.rank == 3


@pytest.mark.parametrize("name", ["port-llama", "expert-phi"])
def test_every_position_ends_where_a_text_may_go_on(name: str) -> None:
    model = load(str(MODELS / name))
    texts = ["def f(x):\n    return x", "naïve café 日本 \U0001f600 end"]
    places = every_position(model, texts)
    cut = prefixes(model, texts, places)
    assert cut[len(places[0]) - 1] == texts[0] and cut[-1] == texts[1]
    for text, row in zip(texts, places, strict=True):
        own = prefixes(model, [text], [row])
        assert all(text.startswith(part) for part in own) and len(set(own)) == len(own)
    states_there = collect(model, texts, places, layers=[model.depth])[0]
    assert len(states_there) == sum(map(len, places))
    torch.testing.assert_close(states_there[len(places[0]) - 1], last_states(model, texts[:1])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("texts", [[], ["one text"], ["the same", "the same"]])
def test_texts_that_leave_none_to_hold_out_are_refused(base: LanguageModel, texts: list[str]) -> None:
    with pytest.raises(ValueError, match="leave none to hold out: give at least two"):
        fit(base, base, texts)


def test_texts_are_dealt_to_folds_by_content() -> None:
    texts = [f"text {k}" for k in range(50)]
    dealt = dict(zip(texts, prompts.deal(texts), strict=True))
    again = dict(zip(reversed(texts), prompts.deal(list(reversed(texts))), strict=True))
    assert dealt == again
    counts = [list(dealt.values()).count(fold) for fold in range(5)]
    assert counts == [10] * 5


def test_what_the_fit_found_is_saved_with_the_adapter(sibling: Sibling, tmp_path: Path) -> None:
    adapter = fit(sibling.base, sibling, SUMS[:40])
    adapter.save_pretrained(tmp_path)
    assert Adapter.from_pretrained(tmp_path, sibling.base.head).held_out == adapter.held_out
