"""Adapters of real models by name and shape, and clients and a grid in this process for them."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from federation.messages import COUNT_KEY, FINGERPRINT_KEY, METRICS_KEY
from strategies import (
    PRIVACY_KEY,
    ROUND_PLAN_KEY,
    LoRAStrategy,
    NeedFull,
    RoundPlan,
    ask_for_everything,
    receive_adapter,
    update_records,
)

Shapes = dict[str, tuple[int, int]]
RECORDS = 1000
NOISE_STD = 0.01
# The server's message carries the backbone's SHA-256 in the real app: as long as here.
TRAIN_CONFIG = {FINGERPRINT_KEY: "0123456789abcdef" * 4}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A model's adapter without its head, and the federation that the project states for it."""

    rank: int
    clients: int
    shapes: Shapes

    @property
    def size(self) -> int:
        """Number of values."""
        return sum(m * n for m, n in self.shapes.values())

    def initial(self, seed: int = 0) -> ArrayRecord:
        """Random factors: with B = 0, as LoRA begins, equal tensors would be sent once."""
        rng = np.random.default_rng(seed)
        return ArrayRecord({n: Array(normal(rng, s, 0.02)) for n, s in self.shapes.items()})


def roberta_large(layers: int = 24, *, rank: int = 8, clients: int = 6) -> Adapter:
    """Query and value of the 24 layers of RoBERTa-large."""
    shapes: Shapes = {}
    for layer in range(layers):
        for part in ("query", "value"):
            name = f"base_model.model.roberta.encoder.layer.{layer}.attention.self.{part}"
            _add_factors(shapes, name, 1024, 1024, rank)
    return Adapter(rank, clients, shapes)


def swin_b(*, rank: int = 16, clients: int = 4) -> Adapter:
    """Attention's qkv and proj in the 24 blocks of timm's Swin-B."""
    shapes: Shapes = {}
    for stage, (depth, dim) in enumerate(zip((2, 2, 18, 2), (128, 256, 512, 1024), strict=True)):
        for block in range(depth):
            name = f"base_model.model.layers.{stage}.blocks.{block}.attn"
            _add_factors(shapes, f"{name}.qkv", dim, 3 * dim, rank)
            _add_factors(shapes, f"{name}.proj", dim, dim, rank)
    return Adapter(rank, clients, shapes)


ADAPTERS: dict[str, Callable[[], Adapter]] = {"roberta-large": roberta_large, "swin-b": swin_b}


def normal(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> npt.NDArray[np.float32]:
    """White noise in float32."""
    return rng.standard_normal(shape, np.float32) * np.float32(std)


class Client:
    """A node that answers as the real client does, with pure noise for an update.

    All but the training is the real node side: what it holds, what it asks for, how it writes
    its reply.

    Parameters
    ----------
    node : int
        Its number; seeds its noise.
    rank : int
        Rank that it states; 0 where the method has none by client.
    """

    def __init__(self, node: int, rank: int = 0) -> None:
        self.state = RecordDict()
        self._rank = rank
        self._rng = np.random.default_rng((1, node))

    def answer(self, message: Message) -> Message:
        """Take up what was sent and reply."""
        try:
            adapter = receive_adapter(message, self.state, rank=self._rank)
        except NeedFull:
            return Message(ask_for_everything(self.state, rank=self._rank), reply_to=message)
        plan = plan_of(message)
        update = noise_update(plan, {n: v.shape for n, v in adapter.items()}, self._rng)
        wire = update_records(message, self.state, update, self._rng)
        return Message(RecordDict({**wire, **statements(plan)}), reply_to=message)


def plan_of(message: Message) -> RoundPlan:
    """The instructions in a train message."""
    return RoundPlan.from_record(config_of(message, ROUND_PLAN_KEY))


def config_of(message: Message, key: str) -> ConfigRecord:
    """A record of a message; unlike ``config_records``, looking makes no reference cycle."""
    record = message.content[key]
    if not isinstance(record, ConfigRecord):
        raise TypeError(f"{key!r} is no ConfigRecord")
    return record


def noise_update(
    plan: RoundPlan, shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator
) -> dict[str, npt.NDArray[np.float32]]:
    """The update of a client whose gradients hold nothing but the noise that it states."""
    scale = NOISE_STD * plan.local_steps**0.5
    return {
        name: normal(rng, shapes[name], plan.learning_rate(name) * scale)
        for name in plan.uploaded(shapes)
    }


def statements(plan: RoundPlan) -> dict[str, MetricRecord | ConfigRecord]:
    """A reply's other records, with the fields of the real client's."""
    privacy: dict[str, float | int | bool] = {
        "sample-rate": 0.2,
        "noise-multiplier": 0.8372192382812501,
        "target-delta": 1e-5,
        "steps": plan.server_round * plan.local_steps,
        "secure-noise": True,
        "noise-std": NOISE_STD,
    }
    return {
        METRICS_KEY: MetricRecord({COUNT_KEY: RECORDS}),
        PRIVACY_KEY: ConfigRecord(dict(privacy)),
    }


class LazyGrid(Grid):
    """A grid in this process that makes each reply when it is pulled, and keeps none.

    Parameters
    ----------
    nodes : int
        Nodes 1 to ``nodes``.
    answer : callable
        ``answer(node, message)`` makes the reply.

    Attributes
    ----------
    seconds : float
        Time spent on replies so far, which a server would not spend.
    """

    def __init__(self, nodes: int, answer: Callable[[int, Message], Message]) -> None:
        self._nodes = nodes
        self._answer = answer
        self._waiting: dict[str, tuple[int, Message]] = {}
        self.seconds = 0.0

    @property
    def run(self) -> Run:
        """No run: strategies do not ask."""
        raise NotImplementedError

    def set_run(self, run: Run) -> None:
        """Nothing to set."""

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Flower's old way to make one, which strategies do not take."""
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        """All nodes."""
        return list(range(1, self._nodes + 1))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Give messages their ids and keep them until they are answered."""
        ids = []
        for message in messages:
            ids.append(secrets.token_hex(32))  # as long as the real network's
            message.metadata.__dict__["_message_id"] = ids[-1]
            self._waiting[ids[-1]] = message.metadata.dst_node_id, self.kept(message)
        return ids

    def kept(self, message: Message) -> Message:
        """What is kept of a message that waits for its reply."""
        return message

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Make the replies to these messages."""
        start = time.perf_counter()
        replies = [self.reply_to(name) for name in message_ids if name in self._waiting]
        self.seconds += time.perf_counter() - start
        return replies

    def reply_to(self, message_id: str) -> Message:
        """One reply, as the network would hand it over."""
        node, message = self._waiting.pop(message_id)
        reply = self._answer(node, message)
        reply.metadata.__dict__["_message_id"] = secrets.token_hex(32)
        reply.metadata.__dict__["_reply_to_message_id"] = message_id
        reply.metadata.__dict__["_src_node_id"] = node
        return reply

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send all and take all."""
        return self.pull_messages(self.push_messages(messages))


def timed(strategy: LoRAStrategy, grid: LazyGrid) -> list[float]:
    """Seconds of each call of ``aggregate_train``, less the grid's own, as they come."""
    seconds: list[float] = []
    original = strategy.aggregate_train

    def aggregate_train(server_round: int, replies: Iterable[Message]) -> Any:
        start, elsewhere = time.perf_counter(), grid.seconds
        result = original(server_round, replies)
        seconds.append(time.perf_counter() - start - (grid.seconds - elsewhere))
        return result

    strategy.aggregate_train = aggregate_train  # type: ignore[method-assign]
    return seconds


def _add_factors(shapes: Shapes, name: str, inputs: int, outputs: int, rank: int) -> None:
    shapes[f"{name}.lora_A.weight"] = (rank, inputs)
    shapes[f"{name}.lora_B.weight"] = (outputs, rank)
