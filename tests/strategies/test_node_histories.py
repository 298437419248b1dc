"""Whatever happens to nodes between rounds, they train from the server's adapter bit for bit."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import (
    ROUND_PLAN_KEY,
    STRATEGIES,
    WIRE_KEY,
    NeedFull,
    RoundPlan,
    ask_for_everything,
    kind_of,
    receive_adapter,
    update_records,
)
from strategies.node_state import held_arrays
from strategies.versions import VersionBook
from tests.fake_grid import FakeGrid

RANK = 2
LAYERS = ("m.blocks.0.q", "m.blocks.1.q")
SHAPES = {
    **{f"{layer}.lora_A.weight": (RANK, 3) for layer in LAYERS},
    **{f"{layer}.lora_B.weight": (4, RANK) for layer in LAYERS},
    "m.head.bias": (2,),
}
NODES = 4
METHODS = tuple(sorted(STRATEGIES))
EVENTS = ("ok", "offline", "error before", "error after", "lost", "corrupted", "old", "late")


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def first_adapter() -> ArrayRecord:
    generator = np.random.default_rng(0)
    values = {n: generator.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    return ArrayRecord({n: Array(v * (kind_of(n) == "A")) for n, v in values.items()})


def rank_of(method: str, node: int) -> int:
    """Nodes 2 and 4 have a smaller rank where the method has ranks by node."""
    return (RANK if node % 2 else 1) if method == "flex-lora" else 0


class Federation:
    """A strategy and nodes that check, before they train, that they hold what the server does."""

    def __init__(self, method: str, events=lambda node, server_round: "ok", **options) -> None:
        self.method, self.events = method, events
        self.options = {"local_steps": 2, "min_train_nodes": 1, **options}
        self.strategy = STRATEGIES[method](**self.options)
        self.grid = FakeGrid([self.handle] * NODES)
        self.arrays = first_adapter()
        self.done = 0
        self.spoilt: set[tuple[int, int]] = set()
        self.trained: list[tuple[int, int]] = []
        self.asked_again = 0
        self.folds_merged = False
        self.backups: dict[int, list[RecordDict]] = {n: [] for n in range(1, NODES + 1)}

    def handle(self, message: Message, context) -> Message | None:
        node, state = context.node_id, context.state
        plan = RoundPlan.from_record(message.content[ROUND_PLAN_KEY])
        event = self.events(node, plan.server_round)
        again = (node, plan.server_round) in self.spoilt
        if not again:
            self.spoilt.add((node, plan.server_round))
            self.spoil(event, node, state)
        if event == "offline":
            return None
        if event == "error before":
            raise RuntimeError("before it stored anything")
        rank = rank_of(self.method, node)
        try:
            held = receive_adapter(message, state, rank=rank)
        except NeedFull:
            assert not again, "a node that was sent everything asked again"
            self.asked_again += 1
            return Message(ask_for_everything(state, rank=rank), reply_to=message)
        self.same_as_the_server(held, rank)
        self.backups[node].append(copy.deepcopy(state))
        if event == "late":
            return None
        if event == "error after":
            raise RuntimeError("after it stored the adapter")
        self.trained.append((node, plan.server_round))
        rng = np.random.default_rng((node, plan.server_round))
        update = {
            name: rng.standard_normal(held[name].shape).astype(np.float32)
            for name in plan.uploaded(held)
        }
        return Message(RecordDict(update_records(message, state, update, rng)), reply_to=message)

    def spoil(self, event: str, node: int, state: RecordDict) -> None:
        if event == "lost":
            for key in list(state):
                del state[key]
        elif event == "old" and self.backups[node]:
            for key, record in copy.deepcopy(self.backups[node][0]).items():
                state[key] = record
        elif event == "corrupted" and held_arrays(state):
            arrays = held_arrays(state)
            name = sorted(arrays)[node % len(arrays)]
            old = arrays[name]
            data = old.data[:-1] + bytes([old.data[-1] ^ 1])
            arrays[name] = Array(old.dtype, old.shape, old.stype, data)

    def same_as_the_server(self, held, rank: int) -> None:
        expected = self.strategy._tensors_for(rank)
        assert set(held) == set(expected)
        for name, value in expected.items():
            assert held[name].dtype == value.dtype == np.float32
            assert held[name].shape == value.shape
            assert held[name].tobytes() == np.ascontiguousarray(value).tobytes(), name

    def run(self, rounds: int, *, resume: bool = False) -> None:
        for _ in range(rounds):
            if resume:
                state = self.strategy.state_dict()
                self.strategy = STRATEGIES[self.method](**self.options)
                self.strategy.load_state_dict(state, self.arrays)
            self.done += 1
            self.round(self.done)

    def round(self, server_round: int) -> None:
        """One round as ``start`` does it, without its pauses for those who never answer."""
        strategy, grid = self.strategy, self.grid
        folds = {name for name in self.arrays if kind_of(name) == "fold"}
        replies = []
        asked = strategy.configure_train(server_round, self.arrays, ConfigRecord(), grid)
        for reply in grid.send_and_receive(asked):
            again = strategy.follow_up(reply)
            replies += [reply] if again is None else grid.send_and_receive([again])
        arrays, _ = strategy.aggregate_train(server_round, replies)
        self.arrays = arrays or self.arrays
        self.folds_merged |= not folds <= set(self.arrays)

    def sent(self, server_round: int) -> dict[int, list[set[str]]]:
        """Names of the tensors in each message of a round, by node."""
        names: dict[int, list[set[str]]] = {}
        for message in self.grid.sent:
            if message.content["config"]["server-round"] == server_round:
                node = message.metadata.dst_node_id
                names.setdefault(node, []).append(set(message.content["arrays"]))
        return names

    def all_sent(self) -> list[dict[int, list[set[str]]]]:
        return [self.sent(server_round) for server_round in range(1, self.done + 1)]


HISTORIES = st.lists(
    st.lists(st.sampled_from(EVENTS), min_size=NODES, max_size=NODES), min_size=2, max_size=8
)


@pytest.mark.parametrize("method", METHODS)
def test_every_history_ends_in_the_servers_adapter(method):
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(HISTORIES, st.booleans(), st.sampled_from([1.0, 0.5]))
    def runs(history, resume, fraction):
        def event(node, server_round):
            return history[server_round - 1][node - 1]

        federation = Federation(method, event, fraction_train=fraction)
        federation.run(len(history), resume=resume)
        able = {"ok", "lost", "corrupted", "old"}
        for reply_round, names in enumerate(federation.all_sent(), 1):
            for node in names:
                trains = event(node, reply_round) in able
                assert trains == ((node, reply_round) in federation.trained)

    runs()


@pytest.mark.parametrize("method", ["fedex-lora", "flora"])
@pytest.mark.parametrize("resume", [False, True])
def test_folds_reach_everybody_across_their_merging(method, resume):
    def event(node, server_round):
        return "offline" if (node == 3 and server_round % 4) or node == server_round % 4 else "ok"

    federation = Federation(method, event)
    federation.run(12, resume=resume)
    assert federation.folds_merged
    assert (3, 4) in federation.trained and (3, 8) in federation.trained


@pytest.mark.parametrize("method", METHODS)
def test_a_server_that_goes_on_from_its_state_sends_what_it_would_have_sent(method):
    def event(node, server_round):
        return EVENTS[(5 * node + 3 * server_round) % len(EVENTS)]

    straight, resumed = Federation(method, event), Federation(method, event)
    straight.run(7)
    resumed.run(7, resume=True)
    assert straight.trained == resumed.trained
    assert straight.all_sent() == resumed.all_sent()
    assert straight.strategy.state_dict() == resumed.strategy.state_dict()
    for name, array in straight.arrays.items():
        assert resumed.arrays[name].data == array.data


# --- what travels ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_nodes_that_are_up_to_date_are_sent_nothing_after_a_lost_round(method):
    federation = Federation(method, min_train_nodes=NODES)
    federation.events = lambda node, server_round: (
        "error after" if (server_round, node) == (3, 1) else "ok"
    )
    federation.run(3)
    assert not federation.strategy.last_round.applied
    everything = set(federation.arrays)
    federation.run(1)
    sent = federation.sent(4)
    assert sent[1] == [everything]
    for node in (2, 3, 4):
        assert sent[node] == [set()], node


def active(federation: Federation, server_round: int) -> set[str]:
    plan = next(
        RoundPlan.from_record(m.content[ROUND_PLAN_KEY])
        for m in federation.grid.sent
        if m.content["config"]["server-round"] == server_round
    )
    return set(plan.uploaded(SHAPES))


@pytest.mark.parametrize("method", ["ffa-lora", "ro-lora", "as-lora"])
def test_a_steady_round_sends_what_the_round_before_changed(method):
    federation = Federation(method)
    federation.run(8)
    for server_round in range(2, 9):
        names = active(federation, server_round - 1)
        assert names < set(SHAPES)
        for messages in federation.sent(server_round).values():
            assert messages == [names]
        assert len(federation.sent(server_round)) == NODES


def test_a_node_that_missed_a_round_is_sent_what_both_rounds_changed_once_it_is_known():
    """It stated version 2; after its silence the server takes nothing for granted."""
    federation = Federation("ro-lora", fraction_train=0.5, seed=3, min_train_nodes=2)
    federation.run(8)
    last: dict[int, int] = {}
    lacked = 0
    for server_round in range(1, 9):
        for node, messages in federation.sent(server_round).items():
            since = last.get(node)
            if since is not None:
                missed = range(since, server_round)
                changed = set().union(*(active(federation, number) for number in missed))
                assert messages == [changed]
                lacked += len(missed) > 1
            last[node] = server_round
    assert lacked


@pytest.mark.parametrize("event", ["offline", "late", "error before", "error after"])
def test_a_node_that_did_not_answer_is_sent_everything_next_time(event):
    federation = Federation("ro-lora", lambda node, t: event if (node, t) == (2, 2) else "ok")
    federation.run(3)
    assert federation.sent(3)[2] == [set(SHAPES)]
    assert federation.sent(3)[1] == [active(federation, 2)]


def test_a_node_that_lost_its_state_trains_in_the_same_round_and_is_charged_once():
    federation = Federation("ro-lora")
    federation.events = lambda node, server_round: "lost" if server_round == 3 else "ok"
    federation.run(3)
    assert federation.asked_again == NODES
    assert federation.strategy.last_round.valid == NODES
    assert federation.strategy.last_round.failures == ()
    for messages in federation.sent(3).values():
        assert messages == [active(federation, 2), set(SHAPES)]
    trained = [m for m in federation.grid.received if "arrays" in m.content]
    up = sum(len(a.data) for m in trained[-NODES:] for a in m.content["arrays"].values())
    down = [m for m in federation.grid.sent if m.content["config"]["server-round"] == 3]
    sent = sum(len(a.data) for m in down for a in m.content["arrays"].values())
    report = federation.strategy.last_round
    assert (report.bytes_up, report.bytes_down) == (up, sent)


@pytest.mark.parametrize("method", METHODS)
def test_a_node_that_asks_for_ever_costs_its_own_share_only(method):
    asked: list[int] = []

    def never_content(message: Message, context) -> Message:
        asked.append(RoundPlan.from_record(message.content[ROUND_PLAN_KEY]).server_round)
        rank = message.content[WIRE_KEY]["rank"]
        return Message(ask_for_everything(context.state, rank=rank), reply_to=message)

    federation = Federation(method)
    federation.grid.handlers[1] = never_content
    result = federation.strategy.start(federation.grid, first_adapter(), num_rounds=3, timeout=5)
    assert asked == [1, 1, 2, 2, 3, 3]
    for record in result.train_metrics_clientapp.values():
        assert isinstance(record, MetricRecord)
        assert (record["num-replies"], record["num-failures"]) == (NODES - 1, 1)
    assert federation.strategy.last_round.failures[0].startswith("node 2: could not go on")


def test_a_tensor_that_a_merge_left_alone_is_not_sent_to_a_node_that_is_up_to_date():
    """Mistake: numbers began anew when a name went, and unchanged tensors kept old ones."""
    book = VersionBook()
    steady, moving = Array(np.zeros(1, np.float32)), np.arange(9, dtype=np.float32)
    book.advance({"fold": Array(moving[:1])})
    for place in range(1, 5):
        book.advance({"steady": steady, "fold": Array(moving[:place])})
    version = book.advance({"steady": steady, "other": Array(moving[:2])})
    assert book.lacking(version) == ()
