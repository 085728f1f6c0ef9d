"""The constructions of the earlier studies, against a second transcription in numpy."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import regression_data, seeds

from chassis_utils.reported import layer_lens, projected_alignment, random_basis


def ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ridge 1e-3 on centred data, with the intercept, as the first study wrote it."""
    centred = x - x.mean(0)
    weight = np.linalg.inv(centred.T @ centred + 1e-3 * np.eye(x.shape[1])) @ centred.T @ (y - y.mean(0))
    return weight, y.mean(0) - x.mean(0) @ weight


@given(seeds)
def test_layer_lens_is_the_ridge_of_the_study(seed: int) -> None:
    h, logits = regression_data(seed, d_y=7)
    weight, bias = ridge(h.numpy(), logits.numpy())
    np.testing.assert_allclose(layer_lens(h, logits)(h), h.numpy() @ weight + bias, rtol=1e-6, atol=1e-6)


@given(seeds, st.integers(1, 5))
def test_projected_alignment_is_the_squeeze_of_the_study(seed: int, k: int) -> None:
    h, expert = regression_data(seed, d_y=5)
    basis = random_basis(5, k, seed % 1000)
    weight, bias = ridge((h @ basis).numpy(), (expert @ basis).numpy())
    lifted = ((h @ basis).numpy() @ weight + bias) @ basis.numpy().T
    found = projected_alignment(h, expert, basis)(h)
    np.testing.assert_allclose(found, lifted, rtol=1e-6, atol=1e-6)
    outside = torch.eye(5, dtype=torch.float64) - basis @ basis.T
    assert float((found @ outside).abs().max()) < 1e-9 * float(found.abs().max())  # the flaw: nothing else survives


@given(st.integers(1, 30), st.data(), st.integers(0, 1000))
def test_a_random_basis_is_orthonormal_and_decided_by_its_seed(width: int, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(1, width))
    basis = random_basis(width, k, seed)
    torch.testing.assert_close(basis.T @ basis, torch.eye(k, dtype=torch.float64))
    assert torch.equal(basis, random_basis(width, k, seed))
