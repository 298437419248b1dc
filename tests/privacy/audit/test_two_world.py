"""Two-world bounds: exact intervals, and how often the bound lies above the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from privacy.audit import clopper_pearson, epsilon_from_rates, gaussian_epsilon, threshold_bound


@given(st.integers(1, 60), st.data())
def test_intervals_are_scipys_exact_ones(trials, data):
    hits = data.draw(st.integers(0, trials))
    low, high = clopper_pearson(hits, trials, 0.03)
    ours = binomtest(hits, trials).proportion_ci(confidence_level=0.94, method="exact")
    assert low == pytest.approx(ours.low, abs=1e-9)
    assert high == pytest.approx(ours.high, abs=1e-9)


@pytest.mark.parametrize("probability", [0.001, 0.03, 0.2, 0.5, 0.77, 0.99])
def test_each_side_misses_with_at_most_its_risk(probability):
    """By enumeration, no sampling."""
    trials, risk = 40, 0.05
    counts = np.arange(trials + 1)
    mass = binom.pmf(counts, trials, probability)
    bounds = [clopper_pearson(int(k), trials, risk) for k in counts]
    assert mass[[low > probability for low, _ in bounds]].sum() <= risk
    assert mass[[high < probability for _, high in bounds]].sum() <= risk


@given(st.floats(0.01, 5))
def test_rates_of_randomised_response_give_its_epsilon(epsilon):
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    assert epsilon_from_rates(right, 1 - right, 0.0) == pytest.approx(epsilon)
    # A test that is never right the other way round says nothing.
    assert epsilon_from_rates(1 - right, right, 0.0) == 0


def test_a_delta_is_taken_off_both_sides():
    assert epsilon_from_rates(0.5, 0.01, 0.1) == pytest.approx(math.log(0.4 / 0.01))
    assert epsilon_from_rates(0.99, 0.5, 0.1) == pytest.approx(math.log(0.4 / 0.01))
    assert epsilon_from_rates(0.05, 0.01, 0.1) == 0


def test_the_bound_on_randomised_response_is_rarely_above_its_epsilon():
    """Here the bound can be tight.  600 runs at risk 5 %: more above than the
    binomial's 1 - 1e-4 quantile is a false alarm."""
    epsilon, confidence, runs = 1.0, 0.95, 600
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    rng = np.random.default_rng(0)
    bounds = []
    for _ in range(runs):
        present = (rng.random(400) < right).astype(float)
        absent = (rng.random(400) >= right).astype(float)
        bounds.append(threshold_bound(present, absent, delta=0.0, confidence=confidence))
    assert (np.array(bounds) > epsilon).sum() <= binom.ppf(1 - 1e-4, runs, 1 - confidence)
    assert np.median(bounds) > 0.5 * epsilon  # and it is not empty


def test_the_bound_on_a_gaussian_is_below_its_epsilon_and_sees_half_the_noise():
    rng = np.random.default_rng(1)
    claim = gaussian_epsilon(0.5, 1e-5)

    def bound(mu):
        return threshold_bound(rng.normal(mu, 1, 4000), rng.normal(0, 1, 4000), delta=1e-5)

    bounds = [bound(0.5) for _ in range(20)]
    assert max(bounds) < claim and np.median(bounds) > 0.2
    assert bound(2.0) > claim


def test_too_few_runs_are_refused():
    with pytest.raises(ValueError, match="at least 4"):
        threshold_bound(np.zeros(3), np.zeros(10), delta=1e-5)
    with pytest.raises(ValueError, match="hits"):
        clopper_pearson(3, 2, 0.05)
    with pytest.raises(ValueError, match="risk"):
        clopper_pearson(1, 2, 0.0)
