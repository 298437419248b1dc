"""Noise and coins.  Statistical tests: fixed seeds, false-alarm rate stated in each."""

from __future__ import annotations

import logging
import os

import numpy as np
import pytest
import torch
from scipy import stats

from privacy import (
    PoissonSampler,
    PrivacyPlan,
    SecureSource,
    SeededTestSource,
    coins,
    standard_normal,
)


class Words:
    """A source that returns given words."""

    secure = False

    def __init__(self, *words: int) -> None:
        self._words = np.array(words, dtype=np.uint64)

    def words(self, count):
        assert count == len(self._words)
        return self._words


def sampler(rate: float, records: int, seed: int = 1) -> PoissonSampler:
    plan = PrivacyPlan(
        sample_rate=rate,
        expected_batch_size=rate * records,
        max_grad_norm=1.0,
        noise_multiplier=1.0,
        steps=1,
        target_delta=1e-5,
    )
    return PoissonSampler(plan, records, SeededTestSource((seed,)))


def test_secure_words_come_from_the_operating_system(monkeypatch):
    asked = []
    real = os.urandom

    def urandom(count):
        asked.append(count)
        return real(count)

    monkeypatch.setattr(os, "urandom", urandom)
    torch.manual_seed(0)
    np.random.seed(0)
    first = standard_normal(SecureSource(), (50,))
    torch.manual_seed(0)
    np.random.seed(0)
    second = standard_normal(SecureSource(), (50,))
    assert asked == [400, 400]
    assert not torch.equal(first, second)  # no seed of anybody's brings the noise back


def test_seeded_source_says_that_it_is_not_private(caplog):
    with caplog.at_level(logging.WARNING):
        first = SeededTestSource((1, 2)).words(4)
    assert "NOT PRIVATE" in caplog.text
    assert not SeededTestSource.secure
    assert (first == SeededTestSource((1, 2)).words(4)).all()
    assert (first != SeededTestSource((1, 3)).words(4)).any()


def test_normals_follow_the_normal_law():
    """Kolmogorov-Smirnov and variance, 200,000 draws; false alarm 1e-3 each, seed fixed."""
    draws = standard_normal(SeededTestSource((7,)), (200_000,)).numpy()
    assert stats.kstest(draws, "norm").pvalue > 1e-3
    chi2 = float((draws**2).sum())
    assert stats.chi2.ppf(5e-4, 200_000) < chi2 < stats.chi2.ppf(1 - 5e-4, 200_000)


def test_normals_are_finite_and_symmetric_at_the_ends_of_the_word():
    lowest, highest = 0, 2**64 - 1
    ends = standard_normal(Words(lowest, lowest + 1, highest - 1, highest), (4,))
    assert torch.isfinite(ends).all()
    assert ends[0] == -ends[1] < -9
    assert abs(ends[2]) < 1e-9
    assert standard_normal(SeededTestSource((1,)), (2, 3, 4)).shape == (2, 3, 4)
    assert standard_normal(Words(), (0,)).shape == (0,)


def test_coins_are_exact_at_the_threshold():
    threshold = int(0.25 * 2**64)
    shown = coins(Words(threshold - 1, threshold, 0, 2**64 - 1), 4, 0.25)
    assert shown.tolist() == [True, False, True, False]
    assert coins(SeededTestSource((1,)), 5, 1.0).all()


@pytest.mark.parametrize(("rate", "records"), [(0.2, 100), (0.013, 300), (0.5, 31)])
def test_batch_sizes_are_binomial(rate, records):
    """Chi-square over size bins, 4,000 batches; false alarm 1e-3, seed fixed."""
    drawer = sampler(rate, records)
    sizes = np.array([len(drawer.draw()) for _ in range(4000)])
    edges = np.unique(stats.binom.ppf(np.linspace(0.05, 0.95, 10), records, rate))
    cells = np.concatenate([[-1], edges, [records]])
    expected = 4000 * np.diff(stats.binom.cdf(cells, records, rate))
    observed = np.histogram(sizes, bins=cells + 0.5)[0]
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_records_are_included_independently_at_the_plans_rate():
    """Counts per record and pairwise correlations, 5,000 batches; false alarm 1e-3 each.

    Mistake: shuffled batches accounted as Poisson.  A shuffle fixes the batch size, which
    makes inclusions negatively correlated and the size variance zero.
    """
    records, rate = 40, 0.3
    drawer = sampler(rate, records, seed=3)
    seen = np.zeros((5000, records))
    for row in seen:
        row[drawer.draw()] = 1
    counts = seen.sum(axis=0)
    assert stats.chisquare(counts, counts.sum() / records * np.ones(records)).pvalue > 1e-3
    assert stats.binomtest(int(counts.sum()), 5000 * records, rate).pvalue > 1e-3
    correlations = np.corrcoef(seen.T)[np.triu_indices(records, 1)]
    assert abs(correlations.mean()) * np.sqrt(5000 * len(correlations)) < 3.3
    across_steps = np.corrcoef(seen[:-1].ravel(), seen[1:].ravel())[0, 1]
    assert abs(across_steps) * np.sqrt(4999 * records) < 3.3


def test_empty_batches_happen_and_are_returned():
    drawer = sampler(0.05, 10)
    sizes = [len(drawer.draw()) for _ in range(200)]
    assert 0 in sizes
    assert max(sizes) > 1


def test_full_rate_takes_everybody():
    assert sampler(1.0, 9).draw().tolist() == list(range(9))


def test_no_records_are_refused():
    plan = PrivacyPlan(
        sample_rate=0.5, expected_batch_size=1.0, max_grad_norm=1.0,
        noise_multiplier=1.0, steps=1, target_delta=1e-5,
    )  # fmt: skip
    with pytest.raises(ValueError, match="0 records"):
        PoissonSampler(plan, 0, SecureSource())
