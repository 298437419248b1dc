"""Detectors pass what is right as often as they say, and fail what is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from privacy import PoissonSampler, PrivacyPlan, SeededTestSource
from privacy.audit import RISK, Finding, lower_bounds, noise_scale, sampling, sensitivity, unrelated

# A test that fails right code with probability 1e-4 fails more than 4 of 2000 with 6e-6.
RUNS, MOST = 2000, 4


def test_right_noise_passes_and_five_percent_too_little_fails():
    rng = np.random.default_rng(0)
    groups = [rng.normal(0, 0.3, size) for size in (20000, 3, 500)]
    assert noise_scale(groups, 0.3).passed
    assert not noise_scale(groups, 0.3 / 0.95).passed
    assert not noise_scale(groups, 0.3 * 0.95).passed


def test_one_group_without_noise_is_seen_among_many():
    rng = np.random.default_rng(1)
    groups = [rng.normal(size=200) for _ in range(50)]
    finding = noise_scale([*groups, np.zeros(4)], 1.0)
    assert not finding.passed and finding.value == 0


def test_false_alarms_of_the_noise_test_are_as_rare_as_stated():
    rng = np.random.default_rng(2)
    failed = sum(
        not noise_scale([rng.normal(size=30), rng.normal(size=100)], 1.0).passed
        for _ in range(RUNS)
    )
    assert RISK == 1e-4 and failed <= MOST


def poisson(seed, records, rate, steps):
    plan = PrivacyPlan(
        sample_rate=rate, expected_batch_size=rate * records, max_grad_norm=1.0,
        noise_multiplier=1.0, steps=steps, target_delta=1e-5,
    )  # fmt: skip
    sampler = PoissonSampler(plan, records, SeededTestSource((seed,)))
    return [sampler.draw() for _ in range(steps)]


def test_the_real_sampler_passes_and_another_rate_fails():
    batches = poisson(0, 200, 0.2, 30)
    assert sampling(batches, 200, 0.2).passed
    assert not sampling(batches, 200, 0.16).passed
    assert not sampling(batches, 200, 0.25).passed


def test_batches_of_one_size_and_doubled_records_fail():
    rng = np.random.default_rng(3)
    fixed = [np.sort(rng.permutation(200)[:40]) for _ in range(30)]
    assert not sampling(fixed, 200, 0.2).passed
    drawn = poisson(1, 200, 0.2, 30)
    doubled = [np.concatenate([drawn[0], drawn[0][:1]]), *drawn[1:]]
    assert sampling(drawn, 200, 0.2).passed and not sampling(doubled, 200, 0.2).passed


def test_every_record_in_every_step_is_the_rate_1_and_nothing_else():
    whole = [np.arange(10) for _ in range(5)]
    assert sampling(whole, 10, 1.0).passed
    assert not sampling([*whole[1:], np.arange(9)], 10, 1.0).passed


def test_false_alarms_of_the_sampling_test_are_as_rare_as_stated():
    rng = np.random.default_rng(4)
    failed = 0
    for _ in range(RUNS):
        batches = [np.flatnonzero(rng.random(40) < 0.2) for _ in range(12)]
        failed += not sampling(batches, 40, 0.2).passed
    # The chi-square of a dozen binomials has a heavier tail than its limit: twice the count.
    assert failed <= 2 * MOST


def test_sensitivity_is_joint_over_tensors_and_exact():
    zero = {"a": torch.zeros(3), "b": torch.zeros(2)}
    inside = {"a": torch.tensor([0.6, 0, 0]), "b": torch.tensor([0.8, 0])}
    each_alone = {"a": torch.tensor([1.0, 0, 0]), "b": torch.tensor([1.0, 0])}
    assert sensitivity([(inside, zero)], 1.0).passed
    assert not sensitivity([(inside, zero), (each_alone, zero)], 1.0).passed
    assert not sensitivity([(inside, zero)], 0.99).passed


def test_equal_and_opposite_noise_is_related_and_fresh_noise_is_not():
    rng = np.random.default_rng(5)
    noise, other = rng.normal(size=3000), rng.normal(size=3000)
    assert unrelated(noise, other).passed
    assert not unrelated(noise, noise).passed
    assert not unrelated(noise, -noise).passed
    assert not unrelated(noise, 0.9 * other + 0.2 * noise).passed
    assert not unrelated(np.zeros(5), np.zeros(5)).passed


@pytest.mark.parametrize(("value", "passed"), [(1.0, True), (2.0, True), (2.1, False)])
def test_a_bound_above_the_claim_fails(value, passed):
    finding = lower_bounds({"one": 0.5, "two": value}, 2.0)
    assert finding.passed is passed and finding.value == value


def test_a_nan_fails():
    assert not Finding.at_most("x", float("nan"), 1.0, "").passed
