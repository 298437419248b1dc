"""The discrete Gaussian: its exact probabilities, and the coins that it is made of."""

from __future__ import annotations

import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import privacy.discrete_gaussian as module
from privacy import SecureSource, SeededTestSource, sample_discrete_gaussian
from privacy.discrete_gaussian import LARGEST_SIGMA, _bernoulli_exp, _decide, _uniform


def probabilities(sigma: int, reach: int) -> np.ndarray:
    """P(-reach), ..., P(reach), by definition."""
    x = np.arange(-reach, reach + 1)
    wide = np.arange(-60 * sigma, 60 * sigma + 1)
    return np.exp(-(x**2) / (2 * sigma**2)) / np.exp(-(wide**2) / (2 * sigma**2)).sum()


@pytest.mark.parametrize("sigma", [1, 2, 5, 13])
def test_values_have_exactly_the_definitions_probabilities(sigma):
    """Chi-square over 200,000 values; false alarms: 1 in 1,000 (fixed seed)."""
    values = sample_discrete_gaussian(SeededTestSource((1, sigma)), sigma, 200_000)
    reach = 3 * sigma
    inside = probabilities(sigma, reach)
    observed = np.bincount(np.clip(values, -reach - 1, reach + 1) + reach + 1)
    expected = 200_000 * np.concatenate(
        [[(1 - inside.sum()) / 2], inside, [(1 - inside.sum()) / 2]]
    )
    assert observed.sum() == 200_000
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_so_do_values_whose_every_coin_is_decided_by_exact_arithmetic(monkeypatch):
    """The path that is taken once in 10^13 coins, taken always; false alarms: 1 in 1,000."""
    monkeypatch.setattr(module, "_MARGIN", 4.0)
    values = sample_discrete_gaussian(SeededTestSource((2, 3)), 3, 4_000)
    inside = probabilities(3, 6)
    observed = np.bincount(np.clip(values, -7, 7) + 7, minlength=15)
    rest = (1 - inside.sum()) / 2
    assert stats.chisquare(observed, 4_000 * np.r_[rest, inside, rest]).pvalue > 1e-3


def test_the_exact_path_decides_as_the_fast_one(monkeypatch):
    """Same words, both paths: equal values."""
    fast = sample_discrete_gaussian(SeededTestSource((3,)), 10**6, 500)
    monkeypatch.setattr(module, "_MARGIN", 4.0)
    assert np.array_equal(sample_discrete_gaussian(SeededTestSource((3,)), 10**6, 500), fast)


@pytest.mark.parametrize("sigma", [1_000, 10**7, LARGEST_SIGMA])
def test_large_scales_are_nearly_normal_and_symmetric(sigma):
    """Kolmogorov-Smirnov and chi-square on 50,000; false alarms: 1 in 1,000 each."""
    values = sample_discrete_gaussian(SeededTestSource((4, 1)), sigma, 50_000) / sigma
    assert stats.kstest(values, "norm").pvalue > 1e-3
    low, high = stats.chi2.ppf([5e-4, 1 - 5e-4], len(values))
    assert low < np.square(values).sum() < high
    assert stats.binomtest(int((values > 0).sum()), int((values != 0).sum())).pvalue > 1e-3


def test_a_hundred_thousand_values_take_about_a_second():
    started = time.process_time()
    values = sample_discrete_gaussian(SecureSource(), 2**20, 100_000)
    assert len(values) == 100_000
    assert time.process_time() - started < 3  # 0.2 s on a quiet core


@pytest.mark.parametrize(("x", "p"), [(0.0, 1.0), (1.0, 1 / math.e), (3.5, math.exp(-3.5))])
def test_coins_show_heads_with_probability_exp_minus_x(x, p):
    source, fraction = SeededTestSource((5,)), Fraction(x)
    exact = fraction.numerator, fraction.denominator
    heads = int(_bernoulli_exp(source, np.full(100_000, x), lambda _: exact).sum())
    assert stats.binomtest(heads, 100_000, p).pvalue > 1e-3


@given(st.integers(0, 2**64 - 1), st.integers(0, 10**9), st.integers(1, 10**7))
def test_a_coin_is_decided_by_its_first_64_bits_where_they_tell(bits, numerator, denominator):
    x = Fraction(numerator, denominator)
    p = math.exp(-float(x)) if x < 700 else 0.0
    if abs(bits / 2**64 - p) > 1e-12:
        assert _decide(SecureSource(), bits, numerator, denominator) == (bits / 2**64 < p)


class Words:
    """Gives these words, one after the other."""

    secure = False

    def __init__(self, *words: int) -> None:
        self.left = list(words)

    def words(self, count: int) -> np.ndarray:
        given, self.left = self.left[:count], self.left[count:]
        return np.array(given, dtype=np.uint64)


def test_where_64_bits_do_not_tell_more_are_drawn():
    import decimal

    with decimal.localcontext() as context:
        context.prec = 80
        start = int(decimal.Decimal(-1).exp() * 2**128)  # 1/e, to 128 bits
    first, second = divmod(start, 2**64)
    assert _decide(Words(second - 1), first, 1, 1) is True
    assert _decide(Words(second + 1), first, 1, 1) is False
    undecided = Words(second, 0)
    assert _decide(undecided, first, 1, 1) is True and not undecided.left


@pytest.mark.parametrize("below", [1, 2, 3, 10, 2**41 + 1])
def test_uniform_numbers_are_uniform(below):
    values = _uniform(SeededTestSource((6, below)), below, 60_000)
    assert values.min() >= 0 and values.max() < below
    observed = np.histogram(values, bins=min(below, 10), range=(0, below))[0]
    widths = np.diff(np.linspace(0, below, min(below, 10) + 1))
    if below > 1:
        assert stats.chisquare(observed, 60_000 * widths / widths.sum()).pvalue > 1e-3


def test_uniform_numbers_draw_again_where_a_remainder_would_bias_them():
    assert _uniform(Words(2**64 - 1, 5), 3, 1).tolist() == [2]  # 2^64 - 1 is the one word left over


@pytest.mark.parametrize("sigma", [0, -1, 1.5, LARGEST_SIGMA + 1])
def test_a_scale_out_of_range_is_refused(sigma):
    with pytest.raises(ValueError, match="sigma must be a whole number"):
        sample_discrete_gaussian(SecureSource(), sigma, 1)


def test_none_and_a_negative_number_of_values():
    assert sample_discrete_gaussian(SecureSource(), 3, 0).shape == (0,)
    with pytest.raises(ValueError, match="count"):
        sample_discrete_gaussian(SecureSource(), 3, -1)
