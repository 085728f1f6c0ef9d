"""The benchmarks compare like with like: rivals compute what they say, and shared work gives the same sums."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from chassis_utils.adapters.lens import lens_moments, read_moments
from chassis_utils.as_reported.adapters import layer_lens
from chassis_utils.files import ROOT
from chassis_utils.lm.model import LanguageModel, load
from chassis_utils.lm.states import collect
from chassis_utils.text import prompts

sys.path.insert(0, str(ROOT / "benchmarks"))

import compressed
import lenses
import processes
import scripts


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """The shipped base."""
    return load("models/port-llama")


def test_moments_of_one_pass_are_those_of_collected_states(model: LanguageModel) -> None:
    chosen = prompts.take("natural", "document", "train", 60)
    texts, folds = prompts.texts(chosen), prompts.fold_numbers(chosen)
    states = collect(model, texts)
    for layer, read in enumerate(read_moments(model, model, texts, folds)):
        for one, other in zip(read, lens_moments(states[layer], states[-1], folds), strict=True):
            for kind in ("n", "x_sum", "y_sum", "xx", "xy", "yy"):
                ours, theirs = getattr(one, kind), getattr(other, kind)
                assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()  # float32 passes, other batches


def test_folds_that_are_not_one_for_each_text_are_refused(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="1 folds for 2 texts: give one for each text"):
        read_moments(model, model, ["one", "two"], [0])


def test_an_expert_that_cuts_texts_otherwise_is_refused(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="cuts these texts into other tokens than 'models/port-llama'"):
        read_moments(model, load("models/expert-phi"), ["What is two and two?"], [0])


@pytest.mark.parametrize("samples", [64, 6])  # with six, a process has no batch of some folds
def test_two_processes_add_up_to_one(samples: int) -> None:
    one, two = processes.measured(["--samples", str(samples)])
    assert (one["peer"], two["peer"]) == ("1 process", "2 processes")
    assert two["difference"] < 1e-12


def test_known_targets_are_not_computed_again() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, target = torch.randn(3, 50, 4, generator=generator)
    folds = [k % 3 for k in range(50)]
    yy = [part.yy for part in lens_moments(first, target, folds)]
    for one, other in zip(lens_moments(second, target, folds, yy=yy), lens_moments(second, target, folds), strict=True):
        assert torch.equal(one.yy, other.yy)
        assert any(one.yy is known for known in yy)
        assert torch.equal(one.xy, other.xy)


def test_the_script_fits_what_was_reported() -> None:
    world = lenses.World(16, 40, 200, 2)
    h, logits = world.states(0), world.head(world.target())
    weight, bias = scripts.ridge(h, logits)
    expected = layer_lens(h, logits)
    torch.testing.assert_close(weight.double(), expected.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(bias.double(), expected.bias, rtol=1e-3, atol=1e-4)


def test_script_and_closed_form_end_equally_close() -> None:
    world = lenses.World(16, 40, 200, 2)
    assert lenses.script(world)["held_out_kl"] == pytest.approx(
        lenses.closed_form(world, lenses.RIDGE)["held_out_kl"], rel=1e-4
    )


@pytest.fixture
def projection() -> tuple[nn.Linear, torch.Tensor]:
    """A layer and the second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 24, generator=generator).double() * torch.arange(1, 25) ** -0.75
    linear = nn.Linear(24, 32, bias=False).requires_grad_(False)
    nn.init.normal_(linear.weight, generator=generator)
    return linear, x.T @ x


def error(linear: nn.Linear, s: torch.Tensor, weight: torch.Tensor) -> float:
    """Squared error of the outputs on inputs with these second moments."""
    off = (weight - linear.weight).detach().double()
    return float((off @ s * off).sum())


def test_layers_fitted_on_activations_are_nearer_than_those_of_the_weights(
    projection: tuple[nn.Linear, torch.Tensor],
) -> None:
    linear, s = projection
    weight = linear.weight.double()
    (up, down), (u, v) = compressed.factors(weight, s), compressed.factors(weight)
    for rank in (1, 6, 20):
        assert error(linear, s, up[:, :rank] @ down[:rank]) < error(linear, s, u[:, :rank] @ v[:rank])
    torch.testing.assert_close(up @ down, weight)
    circulant = compressed.circulant_layer(linear, compressed.aware_circulant(weight, s, 4)).to_dense()
    averaged = compressed.circulant_layer(linear, compressed.average(weight, 4)).to_dense()
    assert error(linear, s, circulant) < error(linear, s, averaged)


def test_no_circulant_block_near_the_fitted_one_is_nearer(projection: tuple[nn.Linear, torch.Tensor]) -> None:
    linear, s = projection
    c = compressed.aware_circulant(linear.weight.double(), s, 4)
    generator = torch.Generator().manual_seed(1)
    least = error(linear, s, compressed.circulant_layer(linear, c).to_dense())
    for _ in range(20):
        moved = c + 1e-2 * torch.randn(c.shape, generator=generator, dtype=torch.float64)
        assert error(linear, s, compressed.circulant_layer(linear, moved).to_dense()) > least


def test_every_share_holds_no_more_weights_than_it_says() -> None:
    options = compressed.argparse.Namespace(shares=[0.8, 0.5], block=8, turns=2)
    linear = nn.Linear(24, 32, bias=False).requires_grad_(False)
    for (_, share), layer in compressed.of_share(linear, torch.eye(24).double(), options).items():
        held = sum(p.numel() for name, p in layer.named_parameters() if "bias" not in name)
        assert 0.8 * share * linear.weight.numel() < held <= share * linear.weight.numel()


def test_every_script_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted(Path(ROOT, "benchmarks").glob("*.py")):
        if path.stem not in ("measure", "scripts"):
            with pytest.raises(SystemExit):
                __import__(path.stem).measured(["--help"]).__next__()
            assert f"python benchmarks/{path.name}" in capsys.readouterr().out
