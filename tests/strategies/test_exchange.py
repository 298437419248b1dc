"""A round's messages and replies: taken one by one, in time, and without a busy loop."""

from __future__ import annotations

import gc
import logging
import time
import weakref

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict

from strategies import ROUND_PLAN_KEY, FFALoRA, NeedFull, RoundPlan
from strategies.exchange import exchange
from strategies.node_state import ask_for_everything, receive_adapter, update_records
from tests.fake_grid import FakeGrid, stamp


class Clock:
    """Time that passes only while somebody sleeps, and a little at each look."""

    def __init__(self) -> None:
        self.now, self.sleeps, self.looks = 100.0, [], 0

    def monotonic(self) -> float:
        self.looks += 1
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.sleeps.append(seconds)
        assert len(self.sleeps) < 10_000, "this would never end"
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.monotonic)
    monkeypatch.setattr(time, "sleep", clock.sleep)
    return clock


class TimedGrid(FakeGrid):
    """Node k's replies can be pulled only from ``after[k]`` seconds on."""

    def __init__(self, clock: Clock, after: dict[int, float], refused=(), answers=1) -> None:
        super().__init__([])
        self.clock, self.after, self.refused, self.answers = clock, after, set(refused), answers
        self.start = clock.now
        self.open: dict[str, Message] = {}
        self.pulls = 0

    def push_messages(self, messages) -> list:
        ids = []
        for message in messages:
            stamp(message, 0, message.metadata.dst_node_id)
            self.sent.append(message)
            if message.metadata.dst_node_id in self.refused:
                ids.append(None)
                continue
            self.open[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids) -> list[Message]:
        self.pulls += 1
        replies = []
        for message_id in message_ids:
            message = self.open.get(message_id)
            node = message.metadata.dst_node_id if message else 0
            if message and self.clock.now - self.start >= self.after[node]:
                del self.open[message_id]
                replies += [reply_to(message) for _ in range(self.answers)]
        return replies


def reply_to(message: Message) -> Message:
    node = message.metadata.dst_node_id
    return stamp(Message(RecordDict(dict(message.content)), reply_to=message), node, 0)


def ask(*nodes: int) -> list[Message]:
    return [Message(RecordDict(), dst_node_id=n, message_type=MessageType.TRAIN) for n in nodes]


def nodes_of(replies) -> list[int]:
    return [reply.metadata.src_node_id for reply in replies]


def none(_reply: Message) -> None:
    return None


@pytest.mark.parametrize("in_order", [False, True])
def test_a_reply_is_not_kept_once_the_next_is_asked_for(clock, in_order):
    grid = TimedGrid(clock, {1: 0, 2: 0, 3: 0, 4: 0})
    seen: list[weakref.ref[Message]] = []
    replies = exchange(grid, ask(1, 2, 3, 4), timeout=9, follow_up=none, in_order=in_order)
    for reply in replies:
        gc.collect()
        assert all(earlier() is None for earlier in seen)
        seen.append(weakref.ref(reply))
        del reply
    assert len(seen) == 4


def test_the_messages_tensors_are_not_kept_while_replies_come(clock):
    class Forgetful(TimedGrid):
        def push_messages(self, messages) -> list:
            ids = super().push_messages(messages)
            self.sent.clear()
            return ids

    messages = ask(1, 2)
    for message in messages:
        message.content["arrays"] = ArrayRecord({"x": Array(np.zeros(3, np.float32))})
    held = [weakref.ref(message) for message in messages]
    grid = Forgetful(clock, {1: 0, 2: 0})
    replies = exchange(grid, messages, timeout=9, follow_up=none)
    del messages, message
    next(replies)
    gc.collect()
    assert held[0]() is None
    assert held[1]() is not None  # the grid's own, still open
    replies.close()


def test_replies_come_as_they_arrive_or_in_the_order_of_messages(clock):
    after = {1: 3.0, 2: 1.0, 3: 0.0, 4: 2.0}
    arriving = exchange(TimedGrid(clock, after), ask(1, 2, 3, 4), timeout=60, follow_up=none)
    assert nodes_of(arriving) == [3, 2, 4, 1]
    ordered = exchange(
        TimedGrid(clock, after), ask(4, 1, 3, 2), timeout=60, follow_up=none, in_order=True
    )
    assert nodes_of(ordered) == [4, 1, 3, 2]


@pytest.mark.parametrize("in_order", [False, True])
def test_at_the_end_of_the_time_what_has_come_is_taken(clock, in_order):
    """Mistake: a silent first node kept the replies of the others from being looked at."""
    grid = TimedGrid(clock, {1: 1e9, 2: 5.0, 3: 0.0, 4: 9.9, 5: 10.1})
    started = clock.now
    replies = exchange(grid, ask(1, 2, 3, 4, 5), timeout=10, follow_up=none, in_order=in_order)
    assert sorted(nodes_of(replies)) == [2, 3, 4]
    assert clock.now - started == pytest.approx(10.0)


def test_without_a_timeout_the_slowest_is_waited_for(clock):
    grid = TimedGrid(clock, {1: 5000.0, 2: 0.0})
    assert nodes_of(exchange(grid, ask(1, 2), timeout=None, follow_up=none)) == [2, 1]


def test_waiting_is_neither_busy_nor_sleepy(clock):
    grid = TimedGrid(clock, {1: 600.0})
    assert nodes_of(exchange(grid, ask(1), timeout=3600, follow_up=none)) == [1]
    assert grid.pulls < 500  # a look per hundredth of the time so far, then one in three seconds
    assert max(clock.sleeps) <= 3.0
    assert min(clock.sleeps) >= 0.05
    assert clock.now - grid.start < 604.0
    clock.sleeps.clear()
    grid = TimedGrid(clock, {1: 40.0})
    assert nodes_of(exchange(grid, ask(1), timeout=3600, follow_up=none)) == [1]
    assert clock.now - grid.start < 40.0 * 1.01


def test_many_nodes_are_asked_less_often(clock):
    grid = TimedGrid(clock, dict.fromkeys(range(1, 1001), 60.0))
    replies = exchange(grid, ask(*range(1, 1001)), timeout=3600, follow_up=none)
    assert len(nodes_of(replies)) == 1000
    assert 2.0 <= max(clock.sleeps) <= 3.0


def test_waiting_starts_short_again_after_a_reply(clock):
    grid = TimedGrid(clock, {1: 500.0, 2: 505.0})
    assert nodes_of(exchange(grid, ask(1, 2), timeout=3600, follow_up=none)) == [1, 2]
    assert clock.sleeps.count(3.0) > 10
    assert clock.sleeps.count(clock.sleeps[0]) == 2


@pytest.mark.parametrize("in_order", [False, True])
def test_messages_that_the_grid_does_not_take_are_not_waited_for(clock, in_order):
    grid = TimedGrid(clock, {1: 0, 2: 0, 3: 0}, refused=[2])
    replies = exchange(grid, ask(1, 2, 3), timeout=None, follow_up=none, in_order=in_order)
    assert nodes_of(replies) == [1, 3]

    class TakesNothing(TimedGrid):
        def push_messages(self, messages) -> list:
            return []  # as Flower's HTTP grid does with messages that are too large

    assert nodes_of(exchange(TakesNothing(clock, {}), ask(1), timeout=None, follow_up=none)) == []
    assert clock.sleeps == []


def test_all_replies_to_one_message_are_yielded(clock):
    grid = TimedGrid(clock, {1: 0, 2: 0}, answers=2)
    assert nodes_of(exchange(grid, ask(1, 2), timeout=9, follow_up=none)) == [1, 1, 2, 2]


def test_a_follow_up_is_sent_and_its_reply_taken_instead(clock):
    again: list[str] = []

    def follow_up(reply: Message) -> Message | None:
        if reply.metadata.src_node_id == 2 and not again:
            again.append(reply.metadata.reply_to_message_id)
            return ask(2)[0]
        return None

    grid = TimedGrid(clock, {1: 0, 2: 1, 3: 0})
    replies = list(exchange(grid, ask(1, 2, 3), timeout=60, follow_up=follow_up))
    assert sorted(nodes_of(replies)) == [1, 2, 3]
    assert len(grid.sent) == 4
    assert again[0] not in [reply.metadata.reply_to_message_id for reply in replies]


def test_in_order_a_follow_up_keeps_its_nodes_place(clock):
    """Else a node that lost its state would change the bits of the sum."""
    again: list[Message] = []

    def follow_up(reply: Message) -> Message | None:
        if reply.metadata.src_node_id == 1 and not again:
            again.append(ask(1)[0])
            return again[0]
        return None

    grid = TimedGrid(clock, {1: 1, 2: 0, 3: 0})
    replies = exchange(grid, ask(1, 2, 3), timeout=60, follow_up=follow_up, in_order=True)
    assert nodes_of(replies) == [1, 2, 3]


def test_messages_are_made_and_sent_in_slices(clock):
    sizes = []

    class Counting(TimedGrid):
        def push_messages(self, messages) -> list:
            sizes.append(len(messages))
            return super().push_messages(messages)

    nodes = range(1, 131)
    grid = Counting(clock, dict.fromkeys(nodes, 0.0))
    assert nodes_of(exchange(grid, ask(*nodes), timeout=9, follow_up=none)) == [*nodes]
    assert sum(sizes) == 130
    assert max(sizes) <= 64


# --- with a strategy ---------------------------------------------------------------------------

SHAPES = {"m.q.lora_A.weight": (2, 3), "m.q.lora_B.weight": (4, 2), "m.head.bias": (2,)}


def adapter() -> ArrayRecord:
    return ArrayRecord({n: Array(np.full(s, 0.5, np.float32)) for n, s in SHAPES.items()})


def handle(message: Message, context) -> Message:
    try:
        held = receive_adapter(message, context.state)
    except NeedFull:
        return Message(ask_for_everything(context.state), reply_to=message)
    plan = RoundPlan.from_record(message.content[ROUND_PLAN_KEY])
    rng = np.random.default_rng((context.node_id, plan.server_round))
    names = plan.uploaded(held)
    update = {n: rng.standard_normal(held[n].shape).astype(np.float32) for n in names}
    return Message(
        RecordDict(update_records(message, context.state, update, rng)), reply_to=message
    )


@pytest.mark.parametrize("in_order", [False, True])
def test_a_round_ends_in_time_and_names_the_silent_nodes(in_order, caplog):
    handlers = [lambda message, _context: None, handle, handle, lambda message, _context: None]
    strategy = FFALoRA(local_steps=2, in_order=in_order)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        strategy.start(FakeGrid(handlers), adapter(), num_rounds=1, timeout=0.05)
    silent = ("node 1: no reply in time", "node 4: no reply in time")
    assert strategy.last_round.failures == silent
    assert strategy.last_round.valid == 2
    assert "node 4: no reply in time" in caplog.text


def test_nodes_whose_messages_were_not_taken_are_named():
    class Refusing(FakeGrid):
        def push_messages(self, messages) -> list:
            ids = []
            for message in messages:
                taken = message.metadata.dst_node_id not in (2, 3)
                ids += super().push_messages([message]) if taken else [None]
                if not taken:  # Flower names a message before it knows whether it will be taken
                    stamp(message, 0, message.metadata.dst_node_id)
            return ids

    strategy = FFALoRA(local_steps=2)
    strategy.start(Refusing([handle] * 4), adapter(), num_rounds=2, timeout=60)
    named = ("node 2: no reply in time", "node 3: no reply in time")
    assert strategy.last_round.failures == named
    assert strategy.last_round.valid == 2


def test_a_thousand_nodes_make_a_round():
    strategy = FFALoRA(local_steps=2)
    grid = FakeGrid([handle] * 1000)
    started = time.monotonic()
    strategy.start(grid, adapter(), num_rounds=1, timeout=60)
    assert strategy.last_round.valid == 1000
    assert strategy.last_round.failures == ()
    assert time.monotonic() - started < 20
