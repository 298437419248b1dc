"""One-run bounds against slow references and mechanisms whose epsilon is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.stats import binom, norm

from privacy import pld_epsilon
from privacy.audit import (
    GaussianTradeOff,
    Guesses,
    PrivacyProfile,
    accounted_epsilon_bound,
    best_bound,
    epsilon_bound,
    gaussian_epsilon,
    gaussian_epsilon_bound,
    guess,
    is_refuted,
    mu_bound,
    p_value_approximate_dp,
)

DELTA = 1e-5


@st.composite
def guesses(draw, most=40):
    canaries = draw(st.integers(1, most))
    made = draw(st.integers(1, canaries))
    return Guesses(canaries, made, draw(st.integers(0, made)))


def p_value_by_definition(given_guesses, epsilon, delta):
    """The bound of Steinke et al. for (epsilon, delta)-DP, term by term."""
    m, r, v = given_guesses.canaries, given_guesses.made, given_guesses.correct
    p = math.exp(epsilon) / (1 + math.exp(epsilon))

    def tail(k):
        return sum(math.comb(r, j) * p**j * (1 - p) ** (r - j) for j in range(max(k, 0), r + 1))

    slope = max((tail(v - i) - tail(v)) / i for i in range(1, m + 1))
    return min(1.0, tail(v) + 2 * m * delta * slope)


@given(guesses(), st.floats(0, 4), st.sampled_from([0.0, 1e-5, 1e-3, 0.1]))
@settings(deadline=None)
def test_the_p_value_is_the_theorems(given_guesses, epsilon, delta):
    fast = p_value_approximate_dp(given_guesses, epsilon, delta)
    assert fast == pytest.approx(p_value_by_definition(given_guesses, epsilon, delta), abs=1e-9)


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 2.5])
def test_randomised_response_is_accused_with_at_most_the_risk(epsilon):
    """By enumeration: its right guesses are binomial.  At delta 0 the test is exact."""
    m, risk = 60, 0.05
    counts = np.arange(m + 1)
    mass = binom.pmf(counts, m, 1 / (1 + math.exp(-epsilon)))
    pure = PrivacyProfile(np.array([epsilon]), np.array([0.0]))
    plain = [p_value_approximate_dp(Guesses(m, m, int(v)), epsilon, 0.0) <= risk for v in counts]
    curve = [is_refuted(Guesses(m, m, int(v)), pure, risk) for v in counts]
    assert 0 < mass[plain].sum() <= risk
    assert 0 < mass[curve].sum() <= risk


@pytest.mark.parametrize("delta", [0.001, 0.03, 0.2])
def test_a_mechanism_that_tells_all_coins_at_once_is_not_accused(delta):
    """It is (0, delta)-DP, and its right guesses are as dependent as can be: what delta costs."""
    m = 30
    curve = PrivacyProfile(np.array([0.0]), np.array([delta]))
    for v in range(1, m + 1):
        probability = delta + (1 - delta) * binom.sf(v - 1, m, 0.5)
        assert p_value_approximate_dp(Guesses(m, m, v), 0.0, delta) >= probability * (1 - 1e-9)
        assert not is_refuted(Guesses(m, m, v), curve, probability * (1 - 1e-9))


@pytest.mark.parametrize("delta", [0.01, 0.2])
def test_a_mechanism_that_tells_coins_one_by_one_is_not_accused(delta):
    m = 30
    curve = PrivacyProfile(np.array([0.0]), np.array([delta]))
    for v in range(1, m + 1):
        probability = binom.sf(v - 1, m, 0.5 + delta / 2)
        assert p_value_approximate_dp(Guesses(m, m, v), 0.0, delta) >= probability * (1 - 1e-9)
        assert not is_refuted(Guesses(m, m, v), curve, probability * (1 - 1e-9))


def largest_tail(given_guesses, curve):
    """Most probability that "at least v right" can have, as a linear programme."""
    m, r, v = given_guesses.canaries, given_guesses.made, given_guesses.correct
    counts = np.arange(r + 1)
    rows, limits = [], []
    for u in range(1, r + 1):
        right = np.where(counts >= u, counts, 0) / m
        wrong = np.where(counts >= u - 1, r - counts, 0) / m
        for epsilon, delta in zip(curve.epsilons, curve.deltas, strict=True):
            rows += [right - math.exp(epsilon) * wrong, right - math.exp(-epsilon) * wrong]
            limits += [delta, 1 - math.exp(-epsilon) * (1 - delta)]
    done = linprog(
        -(counts >= v).astype(float), A_ub=np.array(rows), b_ub=np.array(limits),
        A_eq=np.ones((1, r + 1)), b_eq=[1.0],
    )  # fmt: skip
    return -done.fun


@pytest.mark.parametrize(("made", "correct"), [(12, 12), (12, 9), (12, 7), (6, 5), (3, 3), (1, 1)])
@pytest.mark.parametrize(
    "curve",
    [
        PrivacyProfile(np.array([1.0]), np.array([0.02])),
        PrivacyProfile(np.array([0.0, 0.5, 2.0]), np.array([0.3, 0.15, 0.01])),
    ],
)
def test_the_recursion_finds_what_a_linear_programme_finds(made, correct, curve):
    given_guesses = Guesses(12, made, correct)
    tail = largest_tail(given_guesses, curve)
    assert not is_refuted(given_guesses, curve, tail * 0.999)
    if tail < 0.99:
        assert is_refuted(given_guesses, curve, tail * 1.001)


@pytest.mark.parametrize("mu", [0.2, 1.0, 3.0])
def test_one_canary_is_guessed_as_well_as_the_curve_allows(mu):
    """The best guess on one Gaussian canary is right with probability Phi(mu / 2), exactly."""
    best = norm.cdf(mu / 2)
    assert not is_refuted(Guesses(1, 1, 1), GaussianTradeOff(mu), best - 1e-6)
    assert is_refuted(Guesses(1, 1, 1), GaussianTradeOff(mu), best + 1e-6)


@given(st.integers(0, 99), st.sampled_from([20, 100]))
@settings(deadline=None, max_examples=25)
def test_more_right_guesses_never_prove_less(correct, made):
    correct = min(correct, made - 1)
    less, more = Guesses(100, made, correct), Guesses(100, made, correct + 1)
    assert epsilon_bound(less, delta=DELTA, risk=0.05) <= epsilon_bound(
        more, delta=DELTA, risk=0.05
    )
    assert mu_bound(less, risk=0.05) <= mu_bound(more, risk=0.05)


def test_bounds_end_where_the_test_is_just_not_significant():
    found = epsilon_bound(Guesses(400, 400, 300), delta=DELTA, risk=0.05)
    assert p_value_approximate_dp(Guesses(400, 400, 300), found, DELTA) <= 0.05
    assert p_value_approximate_dp(Guesses(400, 400, 300), found + 2e-4, DELTA) > 0.05
    mu = mu_bound(Guesses(400, 400, 300), risk=0.05)
    assert is_refuted(Guesses(400, 400, 300), GaussianTradeOff(mu), 0.05)
    assert not is_refuted(Guesses(400, 400, 300), GaussianTradeOff(mu + 2e-4), 0.05)


def test_the_plain_form_cannot_prove_a_large_epsilon():
    """Why the Gaussian form exists: 400 right guesses of 400 prove less than 4.9."""
    every = Guesses(400, 400, 400)
    assert 4.3 < epsilon_bound(every, delta=DELTA, risk=0.05) < 4.9
    assert gaussian_epsilon_bound(every, delta=DELTA, risk=0.05) > 10


def gaussian_scores(rng, m, mu):
    included = rng.random(m) < 0.5
    return rng.normal(size=m) + mu * included, included


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.5])
def test_bounds_on_a_gaussian_are_rarely_above_the_truth(mu):
    """120 runs at risk 10 %: more above than the binomial's 1 - 1e-4 quantile is a false alarm."""
    rng = np.random.default_rng(int(10 * mu))
    runs, confidence = 120, 0.9
    truth = gaussian_epsilon(mu, DELTA)
    above = {"plain": 0, "gaussian": 0}
    found = []
    for _ in range(runs):
        scores = gaussian_scores(rng, 400, mu)
        plain = best_bound(
            *scores, lambda g, risk: epsilon_bound(g, delta=DELTA, risk=risk), confidence=confidence
        )
        gaussian = best_bound(
            *scores,
            lambda g, risk: gaussian_epsilon_bound(g, delta=DELTA, risk=risk),
            confidence=confidence,
        )
        above["plain"] += plain > truth
        above["gaussian"] += gaussian > truth
        found.append(gaussian)
    limit = binom.ppf(1 - 1e-4, runs, 1 - confidence)
    assert max(above.values()) <= limit, above
    assert np.median(found) > (0.15 if mu < 1 else 0.4) * truth  # and they prove something


def subsampled_scores(rng, m, rate, noise, steps):
    included = rng.random(m) < 0.5
    sampled = rng.binomial(steps, rate, size=m)
    return rng.normal(size=m) * noise * math.sqrt(steps) + sampled * included, included


def test_the_accounted_form_is_rarely_above_the_claim_and_sees_an_eighth_of_the_noise():
    """A subsampled mechanism against its own curve; 40 runs at risk 10 %."""
    claim = {"sample_rate": 0.2, "noise_multiplier": 2.0, "steps": 10}
    claimed = pld_epsilon(**claim, delta=DELTA, interval=1e-3)
    rng = np.random.default_rng(5)

    def bound(noise):
        return best_bound(
            *subsampled_scores(rng, 1000, 0.2, noise, 10),
            lambda g, risk: accounted_epsilon_bound(g, **claim, delta=DELTA, risk=risk),
            confidence=0.9,
            shares=(1.0, 0.2),
        )

    bounds = [bound(2.0) for _ in range(40)]
    assert sum(b > claimed for b in bounds) <= binom.ppf(1 - 1e-4, 40, 0.1)
    assert np.median(bounds) > 0.1 * claimed
    assert bound(0.25) > claimed


def test_guesses_are_counted_from_both_ends():
    scores = np.array([5.0, 1.0, 4.0, 2.0, 3.0])
    included = np.array([True, False, False, False, True])
    assert guess(scores, included, 2) == Guesses(5, 2, 2)
    assert guess(scores, included, 4) == Guesses(5, 4, 3)
    assert guess(scores, included, 5) == Guesses(5, 5, 4)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="correct"):
        Guesses(10, 5, 6)
    with pytest.raises(ValueError, match="score per coin"):
        guess(np.zeros(3), np.zeros(4, dtype=bool), 2)
    with pytest.raises(ValueError, match="risk"):
        is_refuted(Guesses(5, 5, 5), GaussianTradeOff(1.0), 1.0)
    with pytest.raises(ValueError, match="epsilon"):
        p_value_approximate_dp(Guesses(5, 5, 5), -1.0, 0.0)
