"""What a few clients can do with finite numbers alone: a round's worth of harm, and no more."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from strategies import (
    ROUND_PLAN_KEY,
    SCORES_KEY,
    STRATEGIES,
    WIRE_KEY,
    RoundPlan,
    kind_of,
    receive_adapter,
    update_records,
)
from strategies.selection import group_of
from tests.fake_grid import FakeGrid

LAYERS = ("m.blocks.0.q", "m.blocks.1.q")
SHAPES = {
    **{f"{layer}.lora_A.weight": (3, 4) for layer in LAYERS},
    **{f"{layer}.lora_B.weight": (5, 3) for layer in LAYERS},
    "m.head.bias": (2,),
}


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.CRITICAL, logger="flwr")


def first_adapter() -> ArrayRecord:
    generator = np.random.default_rng(0)
    values = {n: generator.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    return ArrayRecord({n: Array(v * (kind_of(n) == "A")) for n, v in values.items()})


def random_update(shapes, rng):
    return {n: (0.01 * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}


def federate(method: str, updates, rounds: int, **options):
    """Three clients that add ``updates(node, round)`` to all that is active, or a little if 0."""

    def handler(message: Message, context) -> Message:
        held = receive_adapter(message, context.state, rank=message.content[WIRE_KEY]["rank"])
        plan = RoundPlan.from_record(message.content[ROUND_PLAN_KEY])
        rng = np.random.default_rng((context.node_id, plan.server_round))
        update = random_update({n: held[n].shape for n in plan.uploaded(held)}, rng)
        value = np.float32(updates(context.node_id, plan.server_round))
        update = {n: np.full_like(u, value) if value else u for n, u in update.items()}
        return Message(
            RecordDict(update_records(message, context.state, update, rng)), reply_to=message
        )

    strategy = STRATEGIES[method](local_steps=2, **options)
    strategy.start(FakeGrid([handler] * 3), first_adapter(), num_rounds=rounds)
    return strategy


@pytest.mark.parametrize("method", sorted(STRATEGIES))
@pytest.mark.parametrize("value", [1e20, 3e38])
@pytest.mark.parametrize("since", [1, 3, 6])
def test_values_that_overflow_cost_the_round_and_not_the_run(method, value, since):
    """Mistake: a sum that left float32's range went into an SVD, whose error ended the run."""
    strategy = federate(method, lambda node, t: value * (node == 2 and t >= since), 8)
    assert strategy.last_round.server_round == 8
    for array in strategy.arrays.values():
        assert np.isfinite(array.numpy()).all()


@pytest.mark.parametrize("stated", [1.7e308, -1.7e308, 10**400])
def test_scores_that_add_up_to_infinity_do_not_settle_the_choice_for_ever(stated):
    """Mistake: two finite scores made an infinite average, from which nothing comes back."""

    def handler(message: Message, context) -> Message:
        held = receive_adapter(message, context.state)
        plan = RoundPlan.from_record(message.content[ROUND_PLAN_KEY])
        rng = np.random.default_rng(context.node_id)
        update = random_update({n: held[n].shape for n in plan.uploaded(held)}, rng)
        records = update_records(message, context.state, update, rng)
        value = stated if plan.server_round == 3 and context.node_id < 3 else 0.5
        groups = {group_of(n, "block") for n in update if kind_of(n) != "head"}
        records[SCORES_KEY] = MetricRecord(dict.fromkeys(groups, value))
        return Message(RecordDict(records), reply_to=message)

    strategy = STRATEGIES["as-lora"](local_steps=2, score="client")
    strategy.start(FakeGrid([handler] * 4), first_adapter(), num_rounds=6)
    for seen in strategy.choice.scores().values():
        assert all(np.isfinite(value) for value in seen.values())


def test_scores_of_a_round_that_is_not_applied_are_not_learned():
    """Mistake: the adapter was put back, and the choice had moved all the same."""

    def updates(node: int, server_round: int) -> float:
        return 3e38 if server_round in (2, 4) else 0.0

    strategy = federate("as-lora", updates, 3)
    before = strategy.choice.scores()
    strategy = federate("as-lora", updates, 4)
    assert not strategy.last_round.applied
    assert strategy.choice.scores() == before
