"""A client's word cannot stop the server, nor make it work for hours."""

from __future__ import annotations

import math
import time

import pytest

from privacy import calibrate_noise_multiplier
from server_app.privacy_tracker import PrivacyTracker
from tests.server_app.test_privacy_tracker import epsilon_of, stated


def tracker() -> PrivacyTracker:
    return PrivacyTracker(1e-5, 2400, target_epsilon=8.0)


@pytest.mark.parametrize(
    "absurd",
    [
        {"sample_rate": 5e-324, "noise_multiplier": 1e5},
        {"sample_rate": 1e-12},
        {"sample_rate": 1.0, "noise_multiplier": 0.15, "steps": 2400},
        {"sample_rate": 1.0, "noise_multiplier": 0.15, "steps": 4},
        {"sample_rate": 1.0, "noise_multiplier": 0.3, "steps": 600},
    ],
)
def test_numbers_that_no_plan_has_guarantee_nothing_and_cost_nothing(absurd):
    one = tracker()
    one.observe(1, stated(**absurd))
    started = time.process_time()
    assert one.largest_epsilon() == math.inf
    assert time.process_time() - started < 0.5


def test_a_count_that_starts_again_for_ever_ends_at_no_guarantee():
    one = tracker()
    for _ in range(5000):
        one.observe(1, stated(steps=4))
    started = time.process_time()
    assert one.largest_epsilon() == math.inf
    assert time.process_time() - started < 0.5


def test_what_the_accountant_cannot_tell_is_no_guarantee(monkeypatch):
    def confused(*_parts, **_numbers):
        raise ValueError("a must be greater than b")

    one = tracker()
    one.observe(1, stated())
    monkeypatch.setattr("server_app.privacy_tracker.composed_epsilon", confused)
    assert one.largest_epsilon() == math.inf


def test_honest_numbers_and_a_few_restarts_are_still_told():
    one = tracker()
    for steps in (4, 8, 4, 8, 2):
        one.observe(1, stated(steps=steps))
    assert one.largest_epsilon() == pytest.approx(epsilon_of(steps=18))


def test_an_honest_client_with_little_noise_at_a_small_rate_is_believed():
    """Mistake: a plan of epsilon 100 taken for an absurd one."""
    rate, steps = 0.001, 1000
    noise = calibrate_noise_multiplier(
        target_epsilon=30.0, target_delta=1e-5, sample_rate=rate, steps=steps
    )
    one = PrivacyTracker(1e-5, steps, target_epsilon=30.0)
    one.observe(1, stated(sample_rate=rate, noise_multiplier=noise, steps=steps))
    assert 29.0 < one.largest_epsilon() <= 30.0
