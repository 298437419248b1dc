"""Clients that change adapters at random, and the dense algebra that says what should come of it.

LoRA's scaling s is one factor on everything but for FlexLoRA, so it is left out here.
"""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict

from strategies import (
    ROUND_PLAN_KEY,
    STRATEGIES,
    NeedFull,
    RoundPlan,
    ask_for_everything,
    receive_adapter,
    update_records,
)
from tests.fake_grid import FakeGrid

# (m, n): wide, tall, square, and twice the same shape.
LAYERS = {"m.0.q": (5, 12), "m.0.k": (12, 5), "m.1.q": (7, 7), "m.1.k": (7, 7)}
HEAD = "m.head.weight"
COUNTS = (10, 50, 20, 5, 15)
FOLDING = ("fedex-lora", "flora")
PRODUCTS = (*FOLDING, "flex-lora")
CLOSE = 2e-6  # of the norm: everything is kept in float32, whose rounding is 6e-8 a value


def begin(rank: int = 2, seed: int = 0, size: float = 1.0) -> ArrayRecord:
    generator = np.random.default_rng(seed)
    shapes = {f"{layer}.lora_A.weight": (rank, n) for layer, (_, n) in LAYERS.items()}
    shapes |= {f"{layer}.lora_B.weight": (m, rank) for layer, (m, _) in LAYERS.items()}
    shapes[HEAD] = (3, 7)
    values = {n: size * generator.standard_normal(s) for n, s in shapes.items()}
    return ArrayRecord({n: Array(v.astype(np.float32)) for n, v in values.items()})


class Client:
    """Changes what is active at random; remembers what it began with and what it came to."""

    def __init__(self, seed: int, *, rank: int = 0, misses=(), loses=(), size: float = 0.3) -> None:
        self.generator = np.random.default_rng(seed + 100)
        self.rank, self.count, self.size = rank, COUNTS[seed], size
        self.misses, self.loses = misses, loses
        self.began: dict[int, dict] = {}
        self.ended: dict[int, dict] = {}

    def change(self, shape) -> np.ndarray:
        return self.size * self.generator.standard_normal(shape)

    def __call__(self, message: Message, context) -> Message:
        plan = RoundPlan.from_record(message.content[ROUND_PLAN_KEY])
        if plan.server_round in self.misses:
            return Message(Error(code=1, reason="away"), reply_to=message)
        if plan.server_round in self.loses:
            context.state, self.loses = RecordDict(), ()
        try:
            adapter = receive_adapter(message, context.state, rank=self.rank)
        except NeedFull:
            return Message(ask_for_everything(context.state, rank=self.rank), reply_to=message)
        update = {n: self.change(adapter[n].shape).astype(np.float32) for n in sorted(adapter)}
        update = {n: update[n] for n in plan.uploaded(adapter)}
        self.began[plan.server_round] = adapter
        self.ended[plan.server_round] = {
            n: v.astype(np.float64) + update.get(n, 0.0) for n, v in adapter.items()
        }
        records = update_records(message, context.state, update, self.generator)
        records["metrics"] = MetricRecord({"num-examples": self.count})
        return Message(RecordDict(records), reply_to=message)


def make(method: str, clients: int = 2, **changes):
    fewest = {"min_train_nodes": min(clients, 2), "min_available_nodes": min(clients, 2)}
    return STRATEGIES[method](**{"local_steps": 2, **fewest, **changes})


def train(strategy, handlers, rounds: int, start: ArrayRecord | None = None, history=None):
    """The adapter before round 1 and after each round, and all messages."""
    history = [] if history is None else history
    grid = FakeGrid(handlers)
    strategy.start(
        grid,
        start or begin(),
        num_rounds=rounds,
        evaluate_fn=lambda _, arrays: history.append({n: a.numpy() for n, a in arrays.items()}),
    )
    return history, grid


def factors(adapter, layer: str) -> tuple[np.ndarray, np.ndarray]:
    return tuple(adapter[f"{layer}.lora_{f}.weight"].astype(np.float64) for f in "BA")


def product(adapter, layer: str) -> np.ndarray:
    b, a = factors(adapter, layer)
    return b @ a


def effective(adapter, layer: str) -> np.ndarray:
    """``B A`` plus all folds: what is added to W0, but for the scaling."""
    total = product(adapter, layer)
    for name in adapter:
        if name.startswith(f"{layer}.fold_B."):
            right = adapter[name.replace("fold_B", "fold_A")].astype(np.float64)
            total = total + adapter[name].astype(np.float64) @ right
    return total


def shares(clients, weighting: str) -> np.ndarray:
    counts = np.array([c.count if weighting == "public-counts" else 1.0 for c in clients])
    return counts / counts.sum()


def mean_product(clients, p, server_round: int, layer: str) -> np.ndarray:
    ended = [client.ended[server_round] for client in clients]
    return sum(w * product(end, layer) for w, end in zip(p, ended, strict=True))


def mean_of(clients, p, server_round: int, name: str) -> np.ndarray:
    return sum(w * c.ended[server_round][name] for w, c in zip(p, clients, strict=True))


def assert_close(got, expected, tolerance: float = CLOSE) -> None:
    assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)


def bits(adapter) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in adapter.items()}
