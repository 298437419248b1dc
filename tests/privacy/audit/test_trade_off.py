"""Trade-off functions against closed forms and against the accountant."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from privacy import pld_epsilon
from privacy.audit import (
    GaussianTradeOff,
    PrivacyProfile,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
)

DELTA = 1e-5


@given(st.floats(0.05, 8), st.floats(1e-8, 0.1))
def test_epsilon_of_a_gaussian_solves_its_own_equation(mu, delta):
    epsilon = gaussian_epsilon(mu, delta)
    if epsilon == 0:
        # Total variation is all that is left of the guarantee at epsilon 0.
        assert 2 * norm.cdf(mu / 2) - 1 <= delta
    else:
        assert gaussian_delta(mu, epsilon) == pytest.approx(delta, rel=1e-5)
        assert gaussian_mu(epsilon, delta) == pytest.approx(mu, rel=1e-6)


def test_no_gap_costs_nothing_and_a_huge_one_everything():
    assert gaussian_epsilon(0.0, DELTA) == 0
    assert gaussian_epsilon(1e4, DELTA) == math.inf


@pytest.mark.parametrize(("noise", "steps"), [(6.0, 4), (1.0, 1), (2.0, 10)])
def test_without_sampling_the_accountant_finds_the_gaussian_epsilon(noise, steps):
    exact = gaussian_epsilon(math.sqrt(steps) / noise, DELTA)
    bound = pld_epsilon(sample_rate=1.0, noise_multiplier=noise, steps=steps, delta=DELTA)
    assert exact <= bound <= exact * 1.002 + 1e-3


@given(st.floats(0, 5), st.floats(0, 1))
def test_the_gaussian_curve_is_the_neyman_pearson_test(mu, alpha):
    threshold = norm.isf(alpha)
    assert GaussianTradeOff(mu)(alpha) == pytest.approx(norm.cdf(threshold - mu), abs=1e-12)


@given(st.floats(0.1, 3), st.floats(0.001, 0.999))
def test_a_profile_lies_below_the_curve_that_it_is_read_off(mu, alpha):
    epsilons = np.linspace(0, 12, 400)
    deltas = np.array([gaussian_delta(mu, epsilon) for epsilon in epsilons])
    read, true = PrivacyProfile(epsilons, deltas)(alpha), GaussianTradeOff(mu)(alpha)
    assert read <= true + 1e-12
    assert read == pytest.approx(true, abs=2e-3)


@given(st.floats(0, 4), st.floats(0, 0.3), st.floats(0, 1))
def test_one_pair_is_the_curve_of_approximate_privacy(epsilon, delta, alpha):
    curve = PrivacyProfile(np.array([epsilon]), np.array([delta]))
    beta = curve(alpha)
    assert 0 <= beta <= 1 - alpha + 1e-12
    # Both inequalities of the definition, for the event of saying "present".
    assert 1 - beta <= math.exp(epsilon) * alpha + delta + 1e-9
    assert 1 - alpha <= math.exp(epsilon) * beta + delta + 1e-9


def test_the_profile_of_steps_is_that_of_the_accountant():
    curve = PrivacyProfile.of_steps(sample_rate=0.2, noise_multiplier=2.0, steps=20)
    spent = pld_epsilon(sample_rate=0.2, noise_multiplier=2.0, steps=20, delta=1e-3)
    at = np.interp(spent, curve.epsilons, curve.deltas)
    assert at == pytest.approx(1e-3, rel=0.15)  # between grid points a line lies above the curve
    unsampled = PrivacyProfile.of_steps(sample_rate=1.0, noise_multiplier=4.0, steps=4)
    for alpha in (0.01, 0.2, 0.5, 0.9):
        true = GaussianTradeOff(0.5)(alpha)
        assert true - 2e-3 <= unsampled(alpha) <= true + 1e-9


@pytest.mark.parametrize("noise", [2.6727, 1.2])
def test_the_audits_claims_are_at_least_as_private_as_gaussians_of_their_epsilon(noise):
    """So that the Gaussian form, at 20 steps and rate 0.2, does not accuse a true claim."""
    claim = {"sample_rate": 0.2, "noise_multiplier": noise, "steps": 20}
    gaussian = GaussianTradeOff(gaussian_mu(pld_epsilon(**claim, delta=DELTA), DELTA))
    curve = PrivacyProfile.of_steps(**claim, interval=1e-4)
    alphas = np.concatenate([np.geomspace(1e-4, 0.5, 60), 1 - np.geomspace(1e-4, 0.5, 60)])
    assert min(curve(alpha) - gaussian(alpha) for alpha in alphas) > -1e-6
    assert max(curve(alpha) - gaussian(alpha) for alpha in alphas) > 0.01  # and not by chance


@pytest.mark.parametrize(
    "arguments",
    [
        {"sample_rate": 0.0, "noise_multiplier": 1.0, "steps": 1},
        {"sample_rate": 0.5, "noise_multiplier": 0.0, "steps": 1},
        {"sample_rate": 0.5, "noise_multiplier": 1.0, "steps": 0},
    ],
)
def test_numbers_that_no_mechanism_has_are_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        PrivacyProfile.of_steps(**arguments)


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan])
def test_a_delta_outside_its_range_is_refused(delta):
    with pytest.raises(ValueError, match="delta"):
        gaussian_epsilon(1.0, delta)
    with pytest.raises(ValueError, match="delta"):
        gaussian_mu(1.0, delta)
