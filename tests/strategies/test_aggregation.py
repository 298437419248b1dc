"""One round through a strategy: who is asked, what is taken, what is refused."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import (
    ROUND_PLAN_KEY,
    STRATEGIES,
    FFALoRA,
    LALoRA,
    NotEnoughNodes,
    RoLoRA,
    RoundPlan,
    StrategySettings,
)
from tests.fake_grid import FakeGrid

A = "base_model.model.layer.lora_A.weight"
B = "base_model.model.layer.lora_B.weight"
HEAD = "base_model.model.head.weight"
SHAPES = {A: (2, 3), B: (4, 2), HEAD: (5, 4)}


def adapter(seed: int = 0) -> ArrayRecord:
    generator = np.random.default_rng(seed)
    return ArrayRecord(
        {n: Array(generator.standard_normal(s).astype(np.float32)) for n, s in SHAPES.items()}
    )


def honest(shift: float, count: int | None = None):
    """A client that adds ``shift`` to what is active."""

    def handle(message: Message, _context) -> Message:
        plan = RoundPlan.from_record(message.content[ROUND_PLAN_KEY])
        arrays = message.content["arrays"]
        update = {
            n: Array(np.full(arrays[n].numpy().shape, shift, np.float32))
            for n in plan.uploaded(arrays)
        }
        metrics = {} if count is None else {"num-examples": count}
        return Message(
            RecordDict({"arrays": ArrayRecord(update), "metrics": MetricRecord(metrics)}),
            reply_to=message,
        )

    return handle


def spoilt(change):
    """A client whose arrays ``change`` has spoilt."""

    def handle(message: Message, context) -> Message:
        reply = honest(100.0)(message, context)
        arrays = {name: array.numpy() for name, array in reply.content["arrays"].items()}
        content = RecordDict({"arrays": ArrayRecord({
            name: array if isinstance(array, Array) else Array(array)
            for name, array in change(arrays).items()
        }), "metrics": MetricRecord({})})  # fmt: skip
        return Message(content, reply_to=message)

    return handle


def one_round(strategy, handlers, server_round: int = 1, start: ArrayRecord | None = None):
    grid = FakeGrid(handlers)
    arrays = start or adapter()
    messages = strategy.configure_train(server_round, arrays, ConfigRecord({}), grid)
    replies = grid.send_and_receive(messages)
    after, metrics = strategy.aggregate_train(server_round, replies)
    before = {n: a.numpy() for n, a in arrays.items()}
    return before, after and {n: a.numpy() for n, a in after.items()}, metrics


# Of the others, which change more than the mean of what is active, test_svd_methods.py.
MEAN_METHODS = ("as-lora", "dp-lora", "ffa-lora", "la-lora", "ro-lora")


@pytest.mark.parametrize("method", MEAN_METHODS)
@pytest.mark.parametrize("server_round", [1, 2])
def test_active_tensors_move_by_the_mean_and_frozen_ones_keep_every_bit(method, server_round):
    strategy = STRATEGIES[method](local_steps=2)
    before, after, metrics = one_round(strategy, [honest(0.5), honest(1.5)], server_round)
    active = strategy.plan(server_round).uploaded(SHAPES)
    for name in SHAPES:
        if name in active:
            np.testing.assert_allclose(after[name], before[name] + 1.0, rtol=1e-6)
        else:
            assert after[name].tobytes() == before[name].tobytes()
    assert list(after) == list(before)
    assert (metrics["num-replies"], metrics["num-failures"]) == (2, 0)


def test_bytes_are_those_of_the_active_tensors():
    strategy = FFALoRA(local_steps=2)
    _, _, metrics = one_round(strategy, [honest(0.0)] * 3)
    active = sum(np.prod(SHAPES[n]) for n in (B, HEAD)) * 4
    whole = sum(np.prod(s) for s in SHAPES.values()) * 4
    assert 3 * active <= metrics["bytes-up"] <= 3 * (active + 2 * 128)
    assert 3 * whole <= metrics["bytes-down"] <= 3 * (whole + 3 * 128)


def test_public_counts_weight_the_mean():
    strategy = FFALoRA(local_steps=2, weighting="public-counts")
    before, after, _ = one_round(strategy, [honest(0.0, 300), honest(4.0, 100)])
    np.testing.assert_allclose(after[B], before[B] + 1.0, rtol=1e-6)


def test_uniform_weights_ignore_counts():
    """Mistake: private record counts entering as weights."""
    before, after, _ = one_round(FFALoRA(local_steps=2), [honest(0.0, 300), honest(4.0, 100)])
    np.testing.assert_allclose(after[B], before[B] + 2.0, rtol=1e-6)


@pytest.mark.parametrize("count", [None, 0, -3, 1.5, math.nan, math.inf])
def test_a_void_count_costs_its_client_the_round(count):
    strategy = FFALoRA(local_steps=2, weighting="public-counts", min_train_nodes=1)
    before, after, metrics = one_round(strategy, [honest(1.0, 10), honest(50.0, count)])
    np.testing.assert_allclose(after[B], before[B] + 1.0, rtol=1e-6)
    assert metrics["num-failures"] == 1


def without(name):
    return lambda arrays: {n: a for n, a in arrays.items() if n != name}


def with_value(value):
    def change(arrays):
        arrays[B] = arrays[B].copy()
        arrays[B][0, 0] = value
        return arrays

    return change


def lying_header(arrays):
    honest_array = Array(arrays[B])
    fake = Array(np.zeros((1, 1), np.float32))
    return {**arrays, B: Array("float32", honest_array.shape, "numpy.ndarray", fake.data)}


SPOILT = {
    "missing": without(B),
    "empty": lambda arrays: {},
    "extra": lambda arrays: {**arrays, A: np.zeros(SHAPES[A], np.float32)},
    "renamed": lambda arrays: {n + "x": a for n, a in arrays.items()},
    "wrong shape": lambda arrays: {**arrays, B: arrays[B].T.copy()},
    "wrong dtype": lambda arrays: {**arrays, B: arrays[B].astype(np.float64)},
    "integers": lambda arrays: {**arrays, B: arrays[B].astype(np.int32)},
    "nan": with_value(math.nan),
    "infinity": with_value(math.inf),
    "lying header": lying_header,
    "garbage": lambda arrays: {**arrays, B: Array("float32", SHAPES[B], "numpy.ndarray", b"junk")},
    "no bytes": lambda arrays: {**arrays, B: Array("float32", SHAPES[B], "numpy.ndarray", b"")},
}


@pytest.mark.parametrize("case", sorted(SPOILT))
def test_a_spoilt_reply_costs_its_client_and_nobody_else(case, caplog):
    strategy = FFALoRA(local_steps=2, min_train_nodes=2)
    handlers = [honest(1.0), spoilt(SPOILT[case]), honest(3.0)]
    with caplog.at_level(logging.WARNING, logger="flwr"):
        before, after, metrics = one_round(strategy, handlers)
    np.testing.assert_allclose(after[B], before[B] + 2.0, rtol=1e-6)
    assert metrics["num-failures"] == 1
    assert strategy.last_round.failures[0].startswith("node 2: ")


def test_reordered_keys_are_fine():
    reorder = spoilt(lambda arrays: dict(reversed(arrays.items())))
    _, after, metrics = one_round(FFALoRA(local_steps=2), [reorder, reorder])
    assert after is not None
    assert metrics["num-failures"] == 0


def test_failed_late_and_duplicate_replies_are_named_and_left_out():
    def fails(message, _context):
        return Message(Error(code=1002, reason="data"), reply_to=message)

    def crashes(message, _context):
        raise RuntimeError("boom")

    def never(message, _context):
        return None

    def twice(message, context):
        return [honest(3.0)(message, context), honest(3.0)(message, context)]

    strategy = FFALoRA(local_steps=2)
    handlers = [honest(1.0), fails, crashes, never, twice]
    before, after, metrics = one_round(strategy, handlers)
    np.testing.assert_allclose(after[B], before[B] + 2.0, rtol=1e-6)
    assert (metrics["num-replies"], metrics["num-failures"]) == (2, 4)
    reasons = "\n".join(strategy.last_round.failures)
    assert "node 2: error code 1002: data" in reasons
    assert "node 3: error code 2" in reasons
    assert "node 4: no reply in time" in reasons
    assert "node 5: answers no open message" in reasons


def test_a_dead_nodes_error_is_mapped_by_the_message_it_answers():
    """The SuperLink answers for a dead node under its own id, 1."""
    strategy = FFALoRA(local_steps=2, min_train_nodes=1)
    grid = FakeGrid([honest(1.0), honest(1.0)])
    messages = strategy.configure_train(1, adapter(), ConfigRecord({}), grid)
    replies = grid.send_and_receive(messages)
    replies[1] = Message(Error(code=5, reason="Node Unavailable"), reply_to=messages[1])
    replies[1].metadata.__dict__["_src_node_id"] = 1
    strategy.aggregate_train(1, replies)
    assert strategy.last_round.failures == ("node 2: error code 5: Node Unavailable",)


def test_a_round_below_the_minimum_is_not_applied():
    strategy = RoLoRA(local_steps=2, min_train_nodes=2)
    _, after, metrics = one_round(strategy, [honest(1.0), spoilt(SPOILT["nan"])])
    assert after is None
    assert metrics["num-replies"] == 1
    assert not strategy.last_round.applied


def test_a_federation_goes_on_after_a_lost_round():
    calls = iter(range(100))

    def fails_first(message, context):
        if next(calls) == 0:
            raise RuntimeError("not yet")
        return honest(1.0)(message, context)

    strategy = FFALoRA(local_steps=2)
    grid = FakeGrid([fails_first, honest(1.0)])
    result = strategy.start(grid, adapter(), num_rounds=3)
    np.testing.assert_allclose(result.arrays[B].numpy(), adapter()[B].numpy() + 2.0, rtol=1e-6)
    assert result.arrays[A].numpy().tobytes() == adapter()[A].numpy().tobytes()


def test_too_few_nodes_end_in_a_clear_error():
    strategy = FFALoRA(local_steps=2, min_available_nodes=3, node_timeout=0.01)
    with pytest.raises(NotEnoughNodes, match="2 of the 3 nodes"):
        strategy.configure_train(1, adapter(), ConfigRecord({}), FakeGrid([honest(1.0)] * 2))


def test_node_sampling_is_seeded_and_takes_the_fraction():
    def asked(seed, server_round):
        strategy = FFALoRA(local_steps=2, fraction_train=0.4, seed=seed)
        grid = FakeGrid([honest(0.0)] * 10)
        messages = strategy.configure_train(server_round, adapter(), ConfigRecord({}), grid)
        return [m.metadata.dst_node_id for m in messages]

    assert len(asked(0, 1)) == 4
    assert asked(0, 1) == asked(0, 1)
    assert len({tuple(asked(0, r)) for r in range(1, 8)}) > 1


def test_an_adapter_without_factors_is_refused():
    arrays = ArrayRecord({"fc.weight": Array(np.zeros((2, 2), np.float32))})
    with pytest.raises(ValueError, match="no LoRA factor"):
        FFALoRA(local_steps=2).configure_train(1, arrays, ConfigRecord({}), FakeGrid([]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["ok", *sorted(SPOILT)]), min_size=2, max_size=8))
def test_the_mean_is_that_of_the_valid_replies_alone(cases):
    handlers = [
        honest(float(i)) if case == "ok" else spoilt(SPOILT[case]) for i, case in enumerate(cases)
    ]
    valid = [float(i) for i, case in enumerate(cases) if case == "ok"]
    strategy = FFALoRA(local_steps=2, min_train_nodes=1)
    before, after, metrics = one_round(strategy, handlers)
    assert metrics["num-replies"] == len(valid)
    if valid:
        np.testing.assert_allclose(after[B], before[B] + np.mean(valid), rtol=1e-5, atol=1e-6)
    else:
        assert after is None


def test_settings_make_the_strategy_they_name(caplog):
    wishes = StrategySettings(
        method="la-lora", local_steps=6, lr_a=0.1, low_pass="off", weighting="uniform"
    )
    strategy = STRATEGIES[wishes.method].from_settings(wishes, train_head=False)
    assert isinstance(strategy, LALoRA)
    assert (strategy.local_steps, strategy.lr_a, strategy.low_pass) == (6, 0.1, False)
    with caplog.at_level(logging.INFO, logger="flwr"):
        strategy.summary()
    assert "alternating local steps, B first" in caplog.text
    assert "Head: frozen" in caplog.text


def test_nobody_is_asked_to_evaluate_private_records():
    strategy = LALoRA()
    grid = FakeGrid([honest(0.0)] * 2)
    assert strategy.configure_evaluate(1, adapter(), ConfigRecord({}), grid) == []
    assert strategy.aggregate_evaluate(1, []) is None
