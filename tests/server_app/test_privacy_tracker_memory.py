"""What was released stays released: a client's later word takes nothing back."""

from __future__ import annotations

import json
import math

import pytest

from privacy import pld_epsilon
from server_app.privacy_tracker import PrivacyTracker
from tests.server_app.test_privacy_tracker import epsilon_of, reply, stated


def observed(*messages) -> PrivacyTracker:
    tracker = PrivacyTracker(1e-5, 1000)
    for message in messages:
        tracker.observe(1, message)
    return tracker


@pytest.mark.parametrize(
    "void",
    [
        lambda: reply(None),
        lambda: stated(secure_noise=False),
        lambda: stated(noise_multiplier=0.0),
    ],
)
def test_a_void_word_is_not_taken_back_by_a_later_good_one(void):
    """That round's update left without a guarantee, whatever is stated afterwards."""
    void = void()
    assert observed(void, stated()).largest_epsilon() == math.inf
    assert observed(stated(), void, stated(steps=8)).largest_epsilon() == math.inf


def test_a_client_whose_count_starts_again_has_spent_both():
    """Flower keeps a SuperNode's state in memory: after a restart the client counts from 0."""
    epsilon = observed(stated(steps=8), stated(steps=4)).largest_epsilon()
    assert epsilon >= epsilon_of(steps=12)
    epsilon = observed(stated(steps=8), stated(steps=4), stated(steps=6)).largest_epsilon()
    assert epsilon >= epsilon_of(steps=14)
    assert epsilon == pytest.approx(epsilon_of(steps=14))


def test_a_client_that_changes_its_numbers_guarantees_nothing():
    """Its plan is fixed for the run; two plans on the same records compose to neither."""
    assert observed(stated(), stated(noise_multiplier=4.0, steps=8)).largest_epsilon() == math.inf
    assert observed(stated(), stated(sample_rate=0.1, steps=8)).largest_epsilon() == math.inf


def test_a_count_that_grows_is_no_restart():
    assert observed(stated(steps=4), stated(steps=8)).largest_epsilon() == pld_epsilon(
        sample_rate=0.3, noise_multiplier=2.0, steps=8, delta=1e-5
    )


def test_a_resumed_run_goes_on_with_what_was_stated():
    """Sites count a training in their ledgers, so their word goes on where it was."""
    before = observed(stated(steps=2), stated(steps=4))
    resumed = PrivacyTracker(1e-5, 1000)
    resumed.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert resumed.largest_epsilon() == before.largest_epsilon()
    resumed.observe(1, stated(steps=6))
    assert resumed.largest_epsilon() == pytest.approx(epsilon_of(steps=6))


def test_a_client_whose_count_starts_again_after_a_resume_has_spent_both():
    before = observed(stated(steps=2), stated(steps=4))
    resumed = PrivacyTracker(1e-5, 1000)
    resumed.load_state_dict(before.state_dict())
    resumed.observe(1, stated(steps=2))
    assert resumed.largest_epsilon() == pytest.approx(epsilon_of(steps=6))


def test_a_client_without_a_guarantee_has_none_after_a_resume():
    resumed = PrivacyTracker(1e-5, 1000)
    resumed.load_state_dict(observed(reply(None)).state_dict())
    assert resumed.largest_epsilon() == math.inf
