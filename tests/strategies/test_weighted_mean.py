"""The running mean: precision, weights, and no hold on what it was given."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from strategies.replies import WeightedMean


def mean_of(updates, weights) -> np.ndarray:
    mean = WeightedMean()
    for value, weight in zip(updates, weights, strict=True):
        mean.add({"w": np.asarray(value, np.float32)}, weight)
    return mean.mean()["w"]


def test_small_updates_survive_beside_large_ones_in_any_order():
    """Mistake: adding in float32, where 1e8 + 1 is 1e8."""
    for order in itertools.permutations([1e8, 1.0, -1e8, 2.0]):
        np.testing.assert_array_equal(mean_of([[value] for value in order], [1.0] * 4), [0.75])


def test_a_thousand_clients_add_up_exactly():
    values = np.random.default_rng(0).standard_normal((1000, 5)).astype(np.float32)
    weights = np.arange(1.0, 1001.0)
    expected = (values.astype(np.float64) * weights[:, None]).sum(axis=0) / weights.sum()
    np.testing.assert_allclose(mean_of(values, weights), expected, rtol=1e-12, atol=1e-14)


def test_counts_beyond_float32_still_weight_by_their_ratio():
    got = mean_of([[0.0], [1.0]], [2.0**40 + 1, 2.0**40 - 1])
    assert got[0] == pytest.approx((2.0**40 - 1) / 2.0**41, rel=1e-15)


def test_updates_are_left_as_they_were():
    update = {"w": np.ones(3, np.float32)}
    mean = WeightedMean()
    for _ in range(3):
        mean.add(update, 5.0)
    assert (update["w"] == 1).all() and (mean.mean()["w"] == 1).all() and mean.count == 3
