"""A client's word on its own noise, scores and weight goes only as far as its update."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict

from strategies import PRIVACY_KEY, SCORES_KEY, ASLoRA, DPLoRA, RoundPlan
from strategies.exchange import exchange
from strategies.trust import largest_scores, own_energies, stated_noise
from tests.fake_grid import FakeGrid
from tests.strategies.test_aggregation import adapter, honest, one_round
from tests.strategies.test_as_lora import client, train

NAME = "m.blocks.0.q.lora_B.weight"
GROUPS = {NAME: "m.blocks.0"}
PLAN = RoundPlan(server_round=1, mode="B", local_steps=4, lr_a=0.5, lr_b=0.5, lr_head=0.5)


def noise_of(value: float, size: int = 512, seed: int = 0) -> float | None:
    """What is made of a statement that comes with an update of pure noise 1."""
    noise = np.random.default_rng(seed).standard_normal((4, size, 1)).sum(axis=0)
    update = {NAME: (-0.5 * noise).astype(np.float32)}
    content = RecordDict({PRIVACY_KEY: ConfigRecord({"noise-std": value})})
    reply = Message(content=content, message_type="train", dst_node_id=1)
    return stated_noise(reply, update, GROUPS, PLAN)


def test_an_honest_statement_is_taken_and_a_huge_one_is_not():
    assert [noise_of(1.0, seed=seed) for seed in range(200)] == [1.0] * 200
    assert noise_of(0.0) == 0.0
    assert [noise_of(value) for value in (3.0, 1e6, math.nan, math.inf, 1e300)] == [None] * 5


def test_small_tensors_seldom_raise_a_false_alarm():
    """16 values: chi-squared below a quarter of its mean has probability 1e-4; seeds fixed."""
    taken = [noise_of(1.0, size=16, seed=seed) for seed in range(300)]
    assert taken.count(1.0) >= 298


def liar(change):
    truthful = client(lambda name: True, noise=0.1, seed=9)

    def handle(message, context):
        reply = truthful(message, context)
        change(reply.content)
        return reply

    return handle


def test_a_stated_noise_that_is_a_lie_does_not_steer_the_choice():
    def huge(content):
        content[PRIVACY_KEY] = ConfigRecord({"noise-std": 1e6})

    strategy = ASLoRA(num_rounds=8, local_steps=4, exploration=0.3)
    truthful = [client(lambda name: True, noise=0.1, seed=seed) for seed in (1, 2)]
    train(strategy, [*truthful, liar(huge)], 8)
    for seen in strategy.choice.scores().values():
        assert all(value > 0 for value in seen.values())


def test_a_clients_score_counts_up_to_its_own_updates_energy():
    def scored(value):
        def change(content):
            groups = {name.split(".attn")[0] for name in content["arrays"]}
            content[SCORES_KEY] = MetricRecord(dict.fromkeys(groups, value))

        return change

    def final(value):
        strategy = ASLoRA(local_steps=4, score="client")
        train(strategy, [liar(scored(5.0)), liar(scored(5.0)), liar(scored(value))], 2)
        return [v for seen in strategy.choice.scores().values() for v in seen.values()]

    update = {NAME: np.full((8, 1), -2.0, np.float32)}
    assert own_energies(update, GROUPS, PLAN) == {"m.blocks.0": 8.0}
    assert largest_scores(update, GROUPS, PLAN) == {"m.blocks.0": 80.0}
    assert max(final(1e99)) < 1e4
    assert min(final(-1e99)) > -1e4


def test_a_node_with_most_of_the_weight_is_named(caplog):
    strategy = DPLoRA(local_steps=2, weighting="public-counts")
    with caplog.at_level(logging.WARNING, logger="flwr"):
        one_round(strategy, [honest(0.1, 10), honest(0.1, 10), honest(0.1, 99)])
    assert "Node 3 has more than half of the weight" in caplog.text


def test_a_trim_that_drops_nobody_says_so(caplog):
    with caplog.at_level(logging.WARNING, logger="flwr"):
        one_round(DPLoRA(local_steps=2, trim=0.1), [honest(0.1)] * 3)
    assert "drops none" in caplog.text


def test_a_clients_reason_is_one_short_line_in_the_log():
    def fails(message, _context):
        reason = "\x1b[31mbad\nRound 9 was fine" + "x" * 10_000
        return Message(Error(code=1002, reason=reason), reply_to=message)

    strategy = DPLoRA(local_steps=2)
    one_round(strategy, [honest(0.1), honest(0.1), fails])
    (failure,) = strategy.last_round.failures
    assert failure.startswith("node 3: error code 1002:  [31mbad Round 9 was fine")
    assert failure.isprintable() and len(failure) < 400


class DamagedGrid(FakeGrid):
    """Node 2's reply cannot be parsed; with ``down`` the network is gone."""

    down = False

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        for reply in replies:
            if reply.metadata.src_node_id == 2:
                raise ConnectionError if self.down else ValueError("no such type")
        return replies


def test_a_reply_that_cannot_be_parsed_costs_its_sender_only():
    strategy = DPLoRA(local_steps=2)
    strategy.start(DamagedGrid([honest(1.0)] * 3), adapter(), num_rounds=1, timeout=5)
    assert (strategy.last_round.valid, strategy.last_round.applied) == (2, True)
    assert strategy.last_round.failures == ("node 2: no reply in time",)


def test_a_lost_network_is_nobodys_failure():
    grid = DamagedGrid([honest(1.0)] * 3)
    grid.down = True
    with pytest.raises(ConnectionError):
        DPLoRA(local_steps=2).start(grid, adapter(), num_rounds=1, timeout=5)


def test_nobody_is_asked_to_train_when_time_is_up():
    """A node that asks for everything in the last look would train for nothing, at its cost."""
    grid = FakeGrid([lambda message, _context: Message(Error(1, "x"), reply_to=message)] * 2)
    messages = DPLoRA(local_steps=2).configure_train(1, adapter(), ConfigRecord({}), grid)
    asked: list[Message] = []
    replies = exchange(grid, messages, timeout=0.0, follow_up=asked.append)
    assert len(list(replies)) == 2
    assert asked == []
