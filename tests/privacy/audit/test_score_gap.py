"""The bound from the gap of two normal score distributions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from privacy.audit import epsilon_from_score_gap, gaussian_epsilon, mu_from_score_gap


@pytest.mark.parametrize("mu", [0.2, 1.0, 4.0])
def test_it_misses_exactly_as_often_as_stated(mu):
    """1000 runs at risk 10 %: outside the binomial's central 1 - 2e-4 is a false alarm."""
    rng = np.random.default_rng(int(10 * mu))
    above = 0
    for _ in range(1000):
        included = rng.random(60) < 0.5
        scores = 3.0 + 0.7 * (rng.normal(size=60) + mu * included)
        above += mu_from_score_gap(scores, included, confidence=0.9) > mu
    low, high = binom.ppf([1e-4, 1 - 1e-4], 1000, 0.1)
    # At a small gap the bound is often 0, but it is never above the truth more often.
    assert low <= above <= high


def test_it_does_not_depend_on_where_and_how_large_scores_are():
    rng = np.random.default_rng(0)
    included = rng.random(200) < 0.5
    scores = rng.normal(size=200) + included
    one = mu_from_score_gap(scores, included)
    assert mu_from_score_gap(1e-6 * scores - 5, included) == pytest.approx(one, rel=1e-4)
    assert epsilon_from_score_gap(scores, included, delta=1e-5) == gaussian_epsilon(one, 1e-5)


def test_no_gap_and_no_noise():
    included = np.arange(20) % 2 == 0
    assert mu_from_score_gap(np.where(included, 0.0, 1.0), included) == 0
    assert mu_from_score_gap(np.where(included, 1.0, 0.0), included) >= 1e4


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="either side"):
        mu_from_score_gap(np.zeros(5), np.ones(5, dtype=bool))
    with pytest.raises(ValueError, match="confidence"):
        mu_from_score_gap(np.zeros(4), np.array([True, True, False, False]), confidence=1.0)
