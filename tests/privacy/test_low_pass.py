"""LA-LoRA's filter against an explicit convolution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from privacy import SeededTestSource, binomial_low_pass, standard_normal


def explicit(row: np.ndarray) -> np.ndarray:
    padded = np.pad(row, 2, mode="symmetric")
    return np.convolve(padded, np.array([1, 4, 6, 4, 1]) / 16, mode="valid")


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31))
def test_equals_an_explicit_convolution(rank, length, seed):
    a = torch.from_numpy(np.random.default_rng(seed).standard_normal((rank, length)))
    rows = np.stack([explicit(row) for row in a.numpy()])
    np.testing.assert_allclose(binomial_low_pass(a, "A").numpy(), rows, atol=1e-12)
    np.testing.assert_allclose(binomial_low_pass(a.T, "B").numpy(), rows.T, atol=1e-12)


def test_never_crosses_the_rank():
    gradient = torch.zeros(3, 20)
    gradient[1] = torch.arange(20.0)
    smooth = binomial_low_pass(gradient, "A")
    assert smooth[0].abs().max() == smooth[2].abs().max() == 0
    assert smooth[1].abs().max() > 0


def test_constants_pass_and_the_input_is_left_alone():
    gradient = torch.full((2, 9), 3.0)
    assert torch.allclose(binomial_low_pass(gradient, "A"), gradient)
    assert (gradient == 3).all()


def test_white_noise_keeps_the_papers_share():
    """0.523 of the standard deviation inside; 400,000 draws, so 1 % is beyond 6 sigma."""
    noise = standard_normal(SeededTestSource((5,)), (4, 100_000))
    assert binomial_low_pass(noise, "A").std().item() == pytest.approx((70 / 256) ** 0.5, rel=0.01)
