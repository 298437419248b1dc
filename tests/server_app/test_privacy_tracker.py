"""The federation's epsilon, from what clients state; a client may state anything."""

from __future__ import annotations

import math

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import pld_epsilon
from server_app.privacy_tracker import PrivacyTracker
from tests.fake_grid import stamp

HONEST = {
    "sample-rate": 0.3,
    "noise-multiplier": 2.0,
    "target-delta": 1e-5,
    "steps": 4,
    "secure-noise": True,
}


def reply(statement) -> Message:
    question = stamp(Message(RecordDict(), message_type="train", dst_node_id=1), 0, 1)
    records = {} if statement is None else {"privacy": statement}
    return Message(RecordDict(records), reply_to=question)


def stated(**changes) -> Message:
    numbers = {**HONEST, **{key.replace("_", "-"): value for key, value in changes.items()}}
    return reply(ConfigRecord({key: v for key, v in numbers.items() if v is not None}))


def epsilon_of(**changes) -> float:
    numbers = {**HONEST, **{key.replace("_", "-"): value for key, value in changes.items()}}
    return pld_epsilon(
        sample_rate=numbers["sample-rate"],
        noise_multiplier=numbers["noise-multiplier"],
        steps=numbers["steps"],
        delta=numbers["target-delta"],
    )


def tracked(*messages: Message) -> float:
    tracker = PrivacyTracker(1e-5, 1000)
    for node, message in enumerate(messages, 1):
        tracker.observe(node, message)
    return tracker.largest_epsilon()


def test_before_the_first_reply_nothing_is_spent():
    assert PrivacyTracker(1e-5, 1000).largest_epsilon() == 0.0


def test_it_is_the_pld_epsilon_of_the_numbers_stated():
    assert tracked(stated()) == epsilon_of() > 0.1


def test_it_is_the_largest_over_clients_not_their_sum_or_mean():
    """Disjoint data: parallel composition."""
    weak, strong = stated(noise_multiplier=1.0), stated(noise_multiplier=4.0)
    expected = epsilon_of(noise_multiplier=1.0)
    assert expected > epsilon_of(noise_multiplier=4.0)
    for messages in ([weak, strong], [strong, weak], [strong, weak, weak]):
        assert tracked(*messages) == expected


def test_a_clients_latest_word_counts_all_its_steps():
    """Mistake: the epsilon of one round reported as the total."""
    tracker = PrivacyTracker(1e-5, 1000)
    for steps in (4, 8):
        tracker.observe(1, stated(steps=steps))
        assert tracker.largest_epsilon() == epsilon_of(steps=steps)
    assert epsilon_of(steps=8) > 1.2 * epsilon_of(steps=4)


def test_a_client_that_left_the_federation_still_counts():
    tracker = PrivacyTracker(1e-5, 1000)
    tracker.observe(1, stated(steps=8))
    tracker.observe(2, stated(steps=4))
    tracker.observe(2, stated(steps=6))
    assert tracker.largest_epsilon() == epsilon_of(steps=8)


VOID = {
    "no statement": None,
    "metrics": MetricRecord({"steps": 4}),
    "empty": ConfigRecord({}),
    "not secure": ConfigRecord({**HONEST, "secure-noise": False}),
    "secure as text": ConfigRecord({**HONEST, "secure-noise": "true"}),
    "secure as 1": ConfigRecord({**HONEST, "secure-noise": 1}),
    **{f"no {key}": ConfigRecord({k: v for k, v in HONEST.items() if k != key}) for key in HONEST},
    **{f"{key} as text": ConfigRecord({**HONEST, key: "0.3"}) for key in HONEST},
    **{f"{key} as list": ConfigRecord({**HONEST, key: [0.3]}) for key in HONEST},
}


@pytest.mark.parametrize("what", sorted(VOID))
def test_a_void_statement_guarantees_nothing(what):
    assert tracked(reply(VOID[what])) == math.inf
    assert tracked(stated(), reply(VOID[what]), stated()) == math.inf


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_rate": 0.0},
        {"sample_rate": -0.1},
        {"sample_rate": 1.1},
        {"sample_rate": math.nan},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": 1e-9},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"target_delta": 0.0},
        {"target_delta": 1.0},
        {"target_delta": math.nan},
        {"steps": -1},
        {"steps": 4.0},
    ],
)
def test_numbers_that_cannot_be_guarantee_nothing(changes):
    assert tracked(stated(**changes)) == math.inf


@pytest.mark.parametrize("changes", [{"noise_multiplier": 1e308}, {"steps": 2**62}])
def test_numbers_that_the_accountant_chokes_on_guarantee_nothing(changes):
    assert tracked(stated(**changes)) == math.inf


numbers = st.one_of(
    st.floats(max_value=1e3), st.integers(-5, 5), st.booleans(), st.text(max_size=3)
)


@settings(max_examples=60, deadline=None)
@given(
    statement=st.dictionaries(st.sampled_from(sorted(HONEST)), numbers, max_size=3),
    # A well-formed statement takes the accountant's time: keep to void ones.
    broken=st.sampled_from(sorted(HONEST)),
)
def test_it_never_raises_on_a_statement_with_a_hole(statement, broken):
    record = ConfigRecord({**HONEST, **statement, broken: "?"})
    assert tracked(reply(record)) == math.inf
