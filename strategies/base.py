"""What all strategies share: asking nodes, checking replies, averaging what was active."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from logging import INFO, WARNING
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from .nodes import sample_nodes
from .replies import InvalidReply, WeightedMean, read_update, read_weight
from .report import RoundReport, payload_bytes
from .round_plan import Mode, Optimizer, RoundPlan
from .settings import StrategySettings
from .tensor_names import kind_of

ROUND_PLAN_KEY = "round-plan"
PRIVACY_KEY = "privacy"  # a reply's public statement of the noise on it
Weighting = Literal["uniform", "public-counts"]


class LoRAStrategy(Strategy):
    """Base of the LoRA strategies: one active set of factors per round, exact mean of it.

    A subclass says which factors a round trains (:meth:`mode`).  Clients send the change of
    exactly those tensors; the server adds the weighted mean of the changes and keeps every
    other tensor bit for bit, so the frozen factor never gets lost or moves.

    Parameters
    ----------
    local_steps : int (default: 10)
        Private steps E of each client in a round.
    lr_a, lr_b, lr_head : float (default: 0.5)
        Learning rates in round 1.
    lr_decay : float (default: 0.99)
        Factor on the learning rates after each round (LA-LoRA's setting for vision).
    optimizer : {"sgd", "adamw"} (default: "sgd")
        Local optimizer.
    low_pass : bool, optional
        LA-LoRA's filter on noised factor gradients; ``None``: the method's own default.
    train_head : bool (default: True)
        Whether head tensors (all that are not LoRA factors) are trained and sent.
    weighting : {"uniform", "public-counts"} (default: "uniform")
        Mean over clients with equal weights, or by ``weighted_by_key``, which clients then
        must declare public.
    fraction_train, min_train_nodes, min_available_nodes
        As in Flower's FedAvg.  A round with fewer than ``min_train_nodes`` valid replies
        is not applied.
    node_timeout : float (default: 300)
        Seconds to wait for nodes before giving up with an error.
    weighted_by_key, arrayrecord_key, configrecord_key : str
        Names of records and keys, as in FedAvg.
    seed : int (default: 0)
        Seeds the choice of nodes.
    on_reply : callable, optional
        ``on_reply(node_id, message)`` is called for each reply with content, before it is checked.

    Attributes
    ----------
    last_round : RoundReport or None
        What happened in the latest round.

    Notes
    -----
    Differential privacy is the clients' business: what arrives here is already noised, and
    everything the strategy does is post-processing.  Nothing is credited for node sampling.
    """

    name: ClassVar[str]
    rule: ClassVar[str]
    low_pass_by_default: ClassVar[bool] = False

    def __init__(
        self,
        *,
        local_steps: int = 10,
        lr_a: float = 0.5,
        lr_b: float = 0.5,
        lr_head: float = 0.5,
        lr_decay: float = 0.99,
        optimizer: Optimizer = "sgd",
        low_pass: bool | None = None,
        train_head: bool = True,
        weighting: Weighting = "uniform",
        fraction_train: float = 1.0,
        min_train_nodes: int = 2,
        min_available_nodes: int = 2,
        node_timeout: float = 300.0,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        seed: int = 0,
        on_reply: Callable[[int, Message], None] | None = None,
    ) -> None:
        self.local_steps = local_steps
        self.lr_a, self.lr_b, self.lr_head, self.lr_decay = lr_a, lr_b, lr_head, lr_decay
        self.optimizer = optimizer
        self.low_pass = self.low_pass_by_default if low_pass is None else low_pass
        self.train_head = train_head
        self.weighting = weighting
        self.fraction_train = fraction_train
        self.min_train_nodes = min_train_nodes
        self.min_available_nodes = min_available_nodes
        self.node_timeout = node_timeout
        self.weighted_by_key = weighted_by_key
        self.arrayrecord_key = arrayrecord_key
        self.configrecord_key = configrecord_key
        self.seed = seed
        self.on_reply = on_reply
        self.last_round: RoundReport | None = None
        self._adapter: dict[str, npt.NDArray[np.float32]] = {}
        self._sent: list[Message] = []
        self.plan(1)  # refuses numbers that no round could have, before anything starts

    @classmethod
    def from_settings(
        cls, settings: StrategySettings, *, train_head: bool = True, seed: int = 0, **others: Any
    ) -> Self:
        """Make the strategy that the settings ask for; ``others`` are further arguments."""
        return cls(
            local_steps=settings.local_steps,
            lr_a=settings.lr_a,
            lr_b=settings.lr_b,
            lr_head=settings.lr_head,
            lr_decay=settings.lr_decay,
            optimizer=settings.optimizer,
            low_pass=None if settings.low_pass == "auto" else settings.low_pass == "on",
            train_head=train_head,
            weighting=settings.weighting,
            fraction_train=settings.fraction_train,
            min_train_nodes=settings.min_train_nodes,
            min_available_nodes=settings.min_available_nodes,
            node_timeout=settings.node_timeout,
            seed=seed,
            **others,
        )

    @abstractmethod
    def mode(self, server_round: int) -> Mode:
        """Which factors a round trains, in every layer."""

    def plan(self, server_round: int) -> RoundPlan:
        """Instructions of a round (from 1), learning-rate decay applied."""
        decay = self.lr_decay ** (server_round - 1)
        return RoundPlan(
            server_round=server_round,
            mode=self.mode(server_round),
            local_steps=self.local_steps,
            lr_a=self.lr_a * decay,
            lr_b=self.lr_b * decay,
            lr_head=self.lr_head * decay,
            train_head=self.train_head,
            low_pass=self.low_pass,
            optimizer=self.optimizer,
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Ask the sampled nodes to train, each with the adapter and the round plan.

        Raises
        ------
        NotEnoughNodes
            If too few nodes connect within ``node_timeout``.
        """
        self._adapter = {name: array.numpy() for name, array in arrays.items()}
        if not any(kind_of(name) != "head" for name in self._adapter):
            raise ValueError("the initial arrays hold no LoRA factor (lora_A / lora_B names)")
        nodes = sample_nodes(
            grid,
            fraction=self.fraction_train,
            minimum=self.min_train_nodes,
            available=self.min_available_nodes,
            timeout=self.node_timeout,
            seed=(self.seed, server_round),
        )
        config["server-round"] = server_round
        content = RecordDict(
            {
                self.arrayrecord_key: arrays,
                self.configrecord_key: config,
                ROUND_PLAN_KEY: self.plan(server_round).to_record(),
            }
        )
        # A list: Flower's HTTP grid walks the messages twice.
        self._sent = [
            Message(content=content, message_type=MessageType.TRAIN, dst_node_id=node)
            for node in nodes
        ]
        return self._sent

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold valid replies into the mean of the active tensors and apply it.

        A failed, malformed or duplicate reply costs that client's share and a warning.

        Returns
        -------
        tuple of ArrayRecord or None and MetricRecord
            The whole adapter after the round (``None`` if it was not applied, which leaves the
            adapter as it was), and counts: replies, failures, bytes.
        """
        plan = self.plan(server_round)
        expected = {name: self._adapter[name].shape for name in plan.uploaded(self._adapter)}
        nodes = {m.metadata.message_id: m.metadata.dst_node_id for m in self._sent}
        mean, failures, bytes_up = WeightedMean(), [], 0
        self._begin(plan)
        for reply in replies:
            # A dead node's error comes from the SuperLink: only this field names the node.
            node = nodes.pop(reply.metadata.reply_to_message_id, None)
            try:
                if reply.has_error():
                    raise InvalidReply(f"error code {reply.error.code}: {reply.error.reason}")
                if node is None:
                    raise InvalidReply("answers no open message of this round (a duplicate?)")
                bytes_up += payload_bytes(reply.content)
                if self.on_reply is not None:
                    self.on_reply(node, reply)
                update = read_update(reply, expected, self.arrayrecord_key)
                weight = 1.0
                if self.weighting == "public-counts":
                    weight = read_weight(reply, self.weighted_by_key)
                mean.add(update, weight)
                self._observe(update, weight, reply)
            except InvalidReply as error:
                failures.append(f"node {node or reply.metadata.src_node_id}: {error}")
                log(WARNING, "Round %d goes on without %s", server_round, failures[-1])
        for node in nodes.values():
            failures.append(f"node {node}: no reply in time")
            log(WARNING, "Round %d goes on without %s", server_round, failures[-1])

        applied = mean.count >= self.min_train_nodes
        if not applied:
            log(
                WARNING,
                "Round %d is not applied: %d valid replies, min_train_nodes is %d",
                server_round,
                mean.count,
                self.min_train_nodes,
            )
        self.last_round = RoundReport(
            server_round=server_round,
            plan=plan,
            asked=len(self._sent),
            valid=mean.count,
            failures=tuple(failures),
            applied=applied,
            bytes_down=sum(payload_bytes(m.content) for m in self._sent),
            bytes_up=bytes_up,
        )
        self._sent = []
        metrics = MetricRecord(
            {
                "num-replies": mean.count,
                "num-failures": len(failures),
                "bytes-down": self.last_round.bytes_down,
                "bytes-up": bytes_up,
            }
        )
        if not applied:
            return None, metrics
        self._apply(plan, mean)
        return ArrayRecord({n: Array(value) for n, value in self._adapter.items()}), metrics

    def _begin(self, plan: RoundPlan) -> None:
        """Prepare for a round's replies; for methods that learn more from them than the mean."""

    def _observe(
        self, update: Mapping[str, npt.NDArray[np.float32]], weight: float, reply: Message
    ) -> None:
        """Look at a valid reply as it is folded in; see :meth:`_begin`."""

    def _apply(self, plan: RoundPlan, mean: WeightedMean) -> None:
        """Move the active tensors by the mean change, in float64 before one rounding."""
        for name, change in mean.mean().items():
            moved = self._adapter[name].astype(np.float64) + change
            self._adapter[name] = moved.astype(np.float32)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Ask nobody: a metric on private records would leave the client without noise."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Nothing to aggregate; see :meth:`configure_evaluate`."""
        return None

    def summary(self) -> None:
        """Log method, active-factor rule, learning rates, sampling and weights as a tree."""
        log(INFO, "\t├──> Method: %s", self.name)
        log(INFO, "\t│\t├── Active factors: %s", self.rule)
        log(INFO, "\t│\t├── Head: %s", "trained" if self.train_head else "frozen")
        log(
            INFO,
            "\t│\t├── Local steps: %d (%s, lr A %g, B %g, head %g, decay %g a round)",
            self.local_steps,
            self.optimizer,
            self.lr_a,
            self.lr_b,
            self.lr_head,
            self.lr_decay,
        )
        log(INFO, "\t│\t└── Low-pass filter: %s", "on" if self.low_pass else "off")
        log(INFO, "\t├──> Sampling:")
        log(INFO, "\t│\t├── Fraction: train (%.2f)", self.fraction_train)
        log(INFO, "\t│\t├── Minimum nodes: train (%d)", self.min_train_nodes)
        log(INFO, "\t│\t└── Minimum available nodes: %d", self.min_available_nodes)
        log(INFO, "\t├──> Mean over clients: %s", self.weighting)
        log(INFO, "\t└──> Up the wire: the change of the tensors active in the round, float32")
