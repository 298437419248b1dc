"""The budget of a client: charged before training, kept across rounds, never exceeded."""

from __future__ import annotations

import logging

import pytest

from client_app import private_round
from client_app.round_handler import handle_train
from federation.messages import ClientFailure
from tests.client_app.replies import CANARY, charged, fail_with, failure_of


def test_budget_is_charged_before_training_and_kept_across_rounds(site, monkeypatch):
    context = site.context()
    seen = []
    train_round = private_round.train_round

    def watch(*args):
        seen.append(charged(context))
        return train_round(*args)

    monkeypatch.setattr(private_round, "train_round", watch)
    steps = [
        handle_train(site.message(server_round=n), context).content["privacy"]["steps"]
        for n in (1, 2)
    ]
    assert seen == steps == [2, 4]
    third = handle_train(site.message(server_round=3), context)
    assert failure_of(third) is ClientFailure.BUDGET_EXHAUSTED
    assert seen == [2, 4] and charged(context) == 4


def test_a_round_longer_than_what_is_left_is_refused_whole(site):
    context = site.context()
    reply = handle_train(site.message(local_steps=6), context)
    assert failure_of(reply) is ClientFailure.BUDGET_EXHAUSTED
    assert charged(context) == 0
    assert handle_train(site.message(local_steps=4), context).has_content()
    assert charged(context) == 4


def test_a_crash_costs_budget_and_releases_nothing(site, monkeypatch):
    context = site.context()
    with monkeypatch.context() as patch:
        patch.setattr(private_round, "train_round", fail_with(RuntimeError(CANARY)))
        assert failure_of(handle_train(site.message(), context)) is ClientFailure.INTERNAL
    assert charged(context) == 2
    # Asked for again: nothing was stored, so it is paid for again.
    assert handle_train(site.message(), context).content["privacy"]["steps"] == 4
    reply = handle_train(site.message(server_round=2), context)
    assert failure_of(reply) is ClientFailure.BUDGET_EXHAUSTED


def test_each_client_has_a_budget_of_its_own(site):
    first, second = site.context(0), site.context(1)
    for _ in range(2):
        assert handle_train(site.message(), first).has_content()
    assert handle_train(site.message(), second).content["privacy"]["steps"] == 2


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        ("node_config", "num-partitions", 6),  # half as many records
        ("run_config", "privacy.target-epsilon", 4.0),
        ("run_config", "privacy.mode", "none"),
    ],
)
def test_a_plan_that_changes_in_the_middle_of_a_run_is_refused(
    site, monkeypatch, caplog, config, key, value
):
    context = site.context()
    assert handle_train(site.message(), context).content["privacy"]["steps"] == 2
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setitem(getattr(context, config), key, value)
        reply = handle_train(site.message(server_round=2), context)
    assert failure_of(reply) is ClientFailure.PRIVACY
    assert "in the middle of " in caplog.text
    assert charged(context) == 2
    # As it began, the run goes on.
    assert handle_train(site.message(server_round=2), context).content["privacy"]["steps"] == 4


def test_as_many_steps_are_released_as_were_charged(site, monkeypatch):
    """The budget's number and the mechanism's own are one."""
    made = []
    original = private_round.PrivateGradient

    def keep(*args):
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(private_round, "PrivateGradient", keep)
    context = site.context()
    for server_round in (1, 2):
        reply = handle_train(site.message(server_round=server_round), context)
        released = sum(gradient.steps_taken for gradient in made)
        assert reply.content["privacy"]["steps"] == charged(context) == released
    assert {gradient.plan.steps for gradient in made} == {site.settings().total_steps}
