"""Epsilon: closed forms, published values, and independent implementations."""

from __future__ import annotations

import math

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import pld_privacy_accountant
from dp_accounting.privacy_accountant import NeighboringRelation
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from privacy import accounting
from privacy.accounting import (
    AccountingError,
    calibrate_noise_multiplier,
    cross_check,
    pld_epsilon,
    prv_epsilon,
    rdp_epsilon,
)

# sigma, q, steps, delta, epsilon by PLD: shared notes, measured with dp-accounting 0.6.0.
MEASURED = [
    (1.0, 0.02, 1000, 1e-5, 3.899),
    (0.8, 0.1, 200, 1e-4, 13.46),
    (1.5, 0.05, 2000, 1e-5, 8.231),
    (0.5, 0.01, 500, 1e-5, 10.28),
    (10.0, 1.0, 100, 1e-5, 4.377),
]


def exact_gaussian_epsilon(noise_multiplier: float, steps: int, delta: float) -> float:
    """Epsilon of full-batch Gaussians composed: mu = sqrt(T) / sigma (Balle & Wang, 2018)."""
    mu = math.sqrt(steps) / noise_multiplier

    def excess(epsilon: float) -> float:
        left = norm.cdf(mu / 2 - epsilon / mu)
        return left - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu)) - delta

    return float(brentq(excess, 0, 200))


@pytest.mark.parametrize(("sigma", "rate", "steps", "delta", "expected"), MEASURED)
def test_pld_gives_the_measured_values(sigma, rate, steps, delta, expected):
    got = pld_epsilon(sample_rate=rate, noise_multiplier=sigma, steps=steps, delta=delta)
    assert got == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("sigma", "steps", "delta"), [(1.0, 1, 1e-5), (5.0, 40, 1e-6), (20.0, 500, 1e-4)]
)
def test_full_batches_match_the_closed_form(sigma, steps, delta):
    exact = exact_gaussian_epsilon(sigma, steps, delta)
    got = pld_epsilon(sample_rate=1.0, noise_multiplier=sigma, steps=steps, delta=delta)
    assert exact - 1e-6 <= got <= exact * 1.002 + 1e-3


@pytest.mark.parametrize(("sigma", "rate", "steps", "delta", "_"), MEASURED)
def test_accountants_agree_and_rdp_is_looser(sigma, rate, steps, delta, _):
    numbers = {"sample_rate": rate, "noise_multiplier": sigma, "steps": steps, "delta": delta}
    first = pld_epsilon(**numbers)
    assert abs(first - prv_epsilon(**numbers)) < 0.02
    assert rdp_epsilon(**numbers) > first
    assert cross_check(**numbers) == first


def test_agrees_with_dp_accountings_own_accountant():
    """Add/remove composition through dp-accounting's event API, which shares no code of ours."""
    accountant = pld_privacy_accountant.PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    step = dp_event.PoissonSampledDpEvent(0.2, dp_event.GaussianDpEvent(1.9))
    accountant.compose(dp_event.SelfComposedDpEvent(step, 200))
    ours = pld_epsilon(sample_rate=0.2, noise_multiplier=1.9, steps=200, delta=1e-5)
    assert ours == pytest.approx(accountant.get_epsilon(1e-5), rel=0.02)


@pytest.mark.parametrize("target", [0.5, 1.0, 3.0, 8.0])
@pytest.mark.parametrize(("rate", "steps"), [(0.2, 200), (1.0, 50), (0.03, 300)])
def test_calibration_meets_the_budget_tightly(target, rate, steps):
    sigma = calibrate_noise_multiplier(
        target_epsilon=target, target_delta=1e-5, sample_rate=rate, steps=steps
    )
    numbers = {"sample_rate": rate, "steps": steps, "delta": 1e-5}
    assert pld_epsilon(noise_multiplier=sigma, **numbers) <= target
    assert pld_epsilon(noise_multiplier=sigma * 0.998 - 2e-4, **numbers) > target


@settings(max_examples=8, deadline=None)
@given(st.floats(0.01, 1.0), st.floats(0.6, 5.0), st.integers(1, 300))
def test_epsilon_grows_with_steps_and_shrinks_with_noise(rate, sigma, steps):
    numbers = {"sample_rate": rate, "delta": 1e-5, "interval": 1e-3}
    one = pld_epsilon(noise_multiplier=sigma, steps=steps, **numbers)
    assert pld_epsilon(noise_multiplier=sigma, steps=steps + 10, **numbers) >= one
    assert pld_epsilon(noise_multiplier=sigma * 1.2, steps=steps, **numbers) <= one
    assert pld_epsilon(noise_multiplier=sigma, steps=0, **numbers) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"sample_rate": 0.0},
        {"sample_rate": 1.1},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": math.nan},
        {"steps": -1},
        {"delta": 0.0},
        {"delta": 1.0},
    ],
)
def test_impossible_numbers_are_refused_by_name(wrong):
    numbers = {"sample_rate": 0.1, "noise_multiplier": 1.0, "steps": 10, "delta": 1e-5, **wrong}
    with pytest.raises(AccountingError, match=next(iter(wrong))):
        pld_epsilon(**numbers)


def test_an_accountant_that_reports_too_little_stops_the_run(monkeypatch):
    monkeypatch.setattr(accounting, "prv_epsilon", lambda **_: 2.0)
    with pytest.raises(AccountingError, match="disagree"):
        cross_check(sample_rate=0.02, noise_multiplier=1.0, steps=1000, delta=1e-5)
