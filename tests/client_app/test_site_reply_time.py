"""Replies and refusals leave at multiples of the policy's time, whatever they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from client_app import reply_time, round_handler
from client_app.reply_time import ReplyClock
from client_app.round_handler import handle_train
from federation.messages import ClientFailure
from tests.client_app.deployed import deploy, released
from tests.client_app.replies import fail_with, failure_of


class Clock:
    """Time that passes when the test says so, and in sleep."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        monkeypatch.setattr(reply_time.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(reply_time.time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize(
    ("period", "work", "leaves"),
    [(60, 0.0, 60), (60, 0.5, 60), (60, 59.9, 60), (60, 60.0, 60), (60, 60.1, 120), (60, 200, 240),
     (0.25, 0.3, 0.5), (86400, 1, 86400)],
)  # fmt: skip
def test_a_reply_leaves_at_the_next_multiple(clock, period, work, leaves):
    reply = ReplyClock()
    reply.period = period
    clock.now += work
    reply.wait()
    assert clock.now - 1000 == pytest.approx(leaves)


def test_without_a_period_it_leaves_when_it_is_ready(clock):
    reply = ReplyClock()
    clock.now += 3.2
    reply.wait()
    assert clock.slept == []


def test_replies_and_refusals_leave_at_multiples(site, tmp_path: Path, clock, monkeypatch):
    deployed = deploy(tmp_path, site.config, reply_at=30)
    load = round_handler.load_client_records

    def slowly(seconds):
        def call(*args, **kwargs):
            clock.now += seconds
            return load(*args, **kwargs)

        return call

    expected = [
        (5.0, 1, None, 30.0),
        (34.0, 2, None, 60.0),
        (7.0, 1, ClientFailure.BUDGET_EXHAUSTED, 30.0),  # its reply was dropped for round 2's
        (31.0, 3, ClientFailure.BUDGET_EXHAUSTED, 60.0),
    ]
    for seconds, server_round, failure, leaves in expected:
        monkeypatch.setattr(round_handler, "load_client_records", slowly(seconds))
        start = clock.now
        reply = handle_train(site.message(server_round=server_round), deployed.context())
        assert clock.now - start == pytest.approx(leaves)
        if failure is None:
            assert released(reply)
        else:
            assert failure_of(reply) is failure
    monkeypatch.setattr(round_handler, "load_client_records", fail_with(RuntimeError("inside")))
    start = clock.now
    reply = handle_train(site.message(server_round=4), deployed.context())
    assert failure_of(reply) is ClientFailure.INTERNAL
    assert clock.now - start == pytest.approx(30.0)


def test_a_replayed_reply_waits_like_a_new_one(site, tmp_path: Path, clock):
    deployed = deploy(tmp_path, site.config, reply_at=30)
    first = released(handle_train(site.message(), deployed.context()))
    start = clock.now
    assert released(handle_train(site.message(), deployed.context())) == first
    assert clock.now - start == pytest.approx(30)
