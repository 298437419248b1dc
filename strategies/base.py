"""What all strategies share: asking nodes, checking replies, averaging what was active."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from logging import WARNING
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from .checkpoint import Checkpoint
from .client_level import ClientLevel, ReleasedMean, check_client_level, poisson_nodes
from .downlink import Downlink
from .loop import EarlyStopping, EvaluateFn, run_rounds
from .low_rank import NotFinite
from .nodes import sample_nodes
from .norm_bound import Bound, UpdateBound
from .replies import InvalidReply, WeightedMean
from .reply_gate import ReplyGate, states_privacy
from .report import RoundReport, payload_bytes
from .round_plan import Mode, Optimizer, RoundPlan
from .secure_aggregation import SECURE_KEY, SecureAggregation, SecureMean
from .settings import StrategySettings, WireSettings
from .summary import log_summary
from .tensor_names import kind_of
from .trimmed_mean import TrimmedMean
from .wire_dtypes import WireDtype, relative_error

ROUND_PLAN_KEY = "round-plan"
_LONGEST_REASON = 300
Weighting = Literal["uniform", "public-counts"]
Mean = WeightedMean | TrimmedMean | ReleasedMean | SecureMean
Update = Mapping[str, npt.NDArray[np.float32]]


class LoRAStrategy(Strategy):
    """Base of the LoRA strategies: one active set of factors per round, exact mean of it.

    A subclass says which factors a round trains (:meth:`mode`).  Clients send the change of
    exactly those tensors; the server adds the weighted mean of the changes and keeps every
    other tensor bit for bit, so the frozen factor never gets lost or moves.  Each node is sent
    only the tensors that changed since the version that it holds.

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
        LA-LoRA's filter on noised factor gradients; ``None``: the method's own default, and off
        under ``client_level``.
    train_head : bool (default: True)
        Whether head tensors (all that are not LoRA factors) are trained and sent.
    weighting : {"uniform", "public-counts"} (default: "uniform")
        Mean over clients with equal weights, or by ``weighted_by_key``, which clients then
        must declare public.
    trim : float (default: 0.0)
        Share of the clients whose values are dropped at either end, coordinate by coordinate;
        0: the ordinary mean.  See :class:`~strategies.trimmed_mean.TrimmedMean`.
    update_bound : UpdateBound, optional
        How long an update may be (anything with its ``limits``); longer ones are refused.
        ``None``: no limit.
    wire_dtype : {"float32", "bfloat16", "float16", "int8"} (default: "float32")
        How clients write their updates.  What travels down is always float32.
    fraction_train, min_train_nodes, min_available_nodes
        As in Flower's FedAvg.  A round with fewer than ``min_train_nodes`` valid replies
        is not applied.
    node_timeout : float (default: 300)
        Seconds to wait for nodes before giving up with an error.
    weighted_by_key, arrayrecord_key, configrecord_key : str
        Names of records and keys, as in FedAvg.
    seed : int (default: 0)
        Seeds the choice of nodes.
    in_order : bool (default: False)
        Take replies in the order of nodes, so that equal replies give equal bits whatever order
        they come in.  For tests and studies: it waits for the slowest first.
    privacy : str, optional
        What :meth:`summary` says of the run's privacy; the strategy itself promises none.
    client_level : ClientLevel or SecureAggregation, optional
        Privacy of whole clients: clips updates, draws nodes and noises each round's sum, of which
        nothing else is used; every round is applied then (:mod:`~strategies.client_level`).  Or
        clients put on the noise themselves and the server sees their sum only
        (:mod:`~strategies.secure_aggregation`).
    on_reply : callable, optional
        ``on_reply(node_id, message)`` is called for each trained reply, before it is checked.

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
    can_trim: ClassVar[bool] = True

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
        trim: float = 0.0,
        update_bound: Bound | None = None,
        wire_dtype: WireDtype = "float32",
        fraction_train: float = 1.0,
        min_train_nodes: int = 2,
        min_available_nodes: int = 2,
        node_timeout: float = 300.0,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        seed: int = 0,
        in_order: bool = False,
        privacy: str | None = None,
        client_level: ClientLevel | SecureAggregation | None = None,
        on_reply: Callable[[int, Message], None] | None = None,
    ) -> None:
        self.local_steps = local_steps
        self.lr_a, self.lr_b, self.lr_head, self.lr_decay = lr_a, lr_b, lr_head, lr_decay
        self.optimizer = optimizer
        # The filter is for noise on gradients; a server's noise comes after all steps.
        by_default = self.low_pass_by_default and client_level is None
        self.low_pass = by_default if low_pass is None else low_pass
        self.train_head = train_head
        self.weighting = weighting
        self.trim = trim
        self.update_bound = update_bound
        self.wire_dtype = wire_dtype
        self.fraction_train = fraction_train
        self.min_train_nodes = min_train_nodes
        self.min_available_nodes = min_available_nodes
        self.node_timeout = node_timeout
        self.weighted_by_key = weighted_by_key
        self.arrayrecord_key = arrayrecord_key
        self.configrecord_key = configrecord_key
        self.seed = seed
        self.in_order = in_order
        self.privacy = privacy
        self.client_level = client_level
        self.on_reply = on_reply
        self.last_round: RoundReport | None = None
        self._adapter: dict[str, npt.NDArray[np.float32]] = {}
        self._record: ArrayRecord | None = None
        self._mean: Mean = WeightedMean()
        self._downlink = Downlink(self._tensors_for, arrayrecord_key)
        self._warned = False
        if trim and not self.can_trim:
            raise ValueError(f"{self.name} averages products of factors: trim must be 0")
        by_count = isinstance(update_bound, UpdateBound) and update_bound.sample_rate is not None
        if by_count and weighting != "public-counts":
            raise ValueError(
                "an update_bound with sample_rate needs the record counts that weighting = "
                f"'public-counts' asks for, got {weighting!r}; give it expected_batch_size"
            )
        if client_level is not None:
            check_client_level(self, one_step=getattr(client_level, "of_gradients", False))
        relative_error(wire_dtype)  # refuses what is no wire dtype
        self.plan(1)  # refuses numbers that no round could have, before anything starts

    @classmethod
    def from_settings(
        cls, settings: StrategySettings, wire: WireSettings | None = None, **others: Any
    ) -> Self:
        """Make the strategy that the settings ask for; ``others`` are further arguments."""
        dtype = (wire or WireSettings()).dtype
        return cls(**settings.arguments(), wire_dtype=dtype, **others)

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

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float | None = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
        *,
        checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
        early_stopping: EarlyStopping | None = None,
    ) -> Result:
        """Run the federation, as Flower's own ``start`` does, from a checkpoint if there is one.

        Replies are taken one by one and dropped, so memory does not grow with the number of
        clients; a node that asks for everything gets it within the round.

        Parameters
        ----------
        grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn
            As in Flower.  ``initial_arrays``: the adapter by PEFT's names.
        checkpoint : Checkpoint or path, optional
            Where the whole server state goes after every round, in one atomic file; if the file
            is there already, the run goes on from it.
        early_stopping : EarlyStopping, optional
            When to end before ``num_rounds``.

        Returns
        -------
        Result
            As in Flower, with the whole adapter in ``arrays`` whatever happened.

        Raises
        ------
        NotEnoughNodes
            If too few nodes connect within ``node_timeout``.
        CheckpointError
            If the checkpoint is damaged or of another run.
        """
        return run_rounds(
            self,
            grid,
            initial_arrays,
            num_rounds=num_rounds,
            timeout=timeout,
            train_config=train_config,
            evaluate_config=evaluate_config,
            evaluate_fn=evaluate_fn,
            checkpoint=Checkpoint.of(checkpoint),
            early_stopping=early_stopping,
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Ask the sampled nodes to train, each with the tensors that it lacks and the round plan.

        Raises
        ------
        NotEnoughNodes
            If too few nodes connect within ``node_timeout``.
        """
        self.take_arrays(arrays)
        nodes = self._choose_nodes(server_round, grid)
        common = {
            self.configrecord_key: ConfigRecord({**config, "server-round": server_round}),
            ROUND_PLAN_KEY: self.plan(server_round).to_record(),
        }
        if isinstance(self.client_level, SecureAggregation):
            nodes, common[SECURE_KEY] = self.client_level.open(
                grid, server_round, nodes, self.node_timeout
            )
        # A list: Flower's HTTP grid walks the messages twice.
        return self._downlink.open_round(
            nodes, common, default_rank=self._default_rank(), dtype=self.wire_dtype
        )

    def follow_up(self, reply: Message) -> Message | None:
        """Everything for a node that could not go on from what it was sent; else ``None``."""
        return self._downlink.follow_up(reply)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold valid replies into the mean of the active tensors and apply it.

        A failed, malformed, late or duplicate reply costs that client's share and a warning.

        Parameters
        ----------
        server_round : int
            The round that :meth:`configure_train` opened.
        replies : iterable of Message
            Each is looked at once and not kept.

        Returns
        -------
        tuple of ArrayRecord or None and MetricRecord
            The whole adapter after the round (``None`` if it was not applied, which leaves the
            adapter as it was), and counts: replies, failures, bytes.
        """
        plan = self.plan(server_round)
        failures: list[str] = []
        bytes_up = private = 0
        heaviest, all_weights = (0.0, 0), 0.0
        asked_nodes = self._downlink.asked()
        self._mean = self._new_mean(plan, asked_nodes)
        gate = ReplyGate(self, self._downlink, plan)
        self._begin(plan)
        for reply in replies:
            asked = self._downlink.sender(reply)
            try:
                if reply.has_error():
                    raise InvalidReply(_failure(reply.error))
                if asked is None:
                    raise InvalidReply("answers no open message of this round (a duplicate?)")
                bytes_up += payload_bytes(reply.content)
                update, weight = gate.check(asked, reply)
                self._fold(update, weight, reply, asked.rank)
                private += states_privacy(reply)
                heaviest = max(heaviest, (weight, asked.node))
                all_weights += weight
            except InvalidReply as error:
                node = asked.node if asked else reply.metadata.src_node_id
                if asked:
                    self._downlink.forget(node)
                self._note(failures, server_round, f"node {node}: {error}")
            del reply, asked  # not kept while the next one is fetched
        for node in self._downlink.close_round():
            self._note(failures, server_round, f"node {node}: no reply in time")

        valid = self._mean.count
        enough = self._is_enough(valid)
        applied = enough and self._apply_if_finite(plan)
        if applied:
            self._record = ArrayRecord({n: Array(value) for n, value in self._adapter.items()})
        elif not enough and self.client_level is None:
            text = "Round %d is not applied: %d valid replies, min_train_nodes is %d"
            log(WARNING, text, server_round, valid, self.min_train_nodes)
        if valid > 2 and heaviest[0] > all_weights / 2:
            text = "Node %d has more than half of the weight in round %d, by its own record count"
            log(WARNING, text, heaviest[1], server_round)
        if self.client_level is not None:
            private = valid if self.client_level.secure else 0
        self._warn_if_not_private(valid, private)
        self.last_round = RoundReport(
            server_round=server_round,
            plan=plan,
            asked=asked_nodes,
            valid=valid,
            failures=tuple(failures),
            applied=applied,
            private=private == valid and (valid > 0 or self._noised_by_server()),
            bytes_down=self._downlink.bytes_down,
            bytes_up=bytes_up,
        )
        metrics = MetricRecord(
            {
                "num-replies": valid,
                "num-failures": len(failures),
                "num-private": private,
                "bytes-down": self._downlink.bytes_down,
                "bytes-up": bytes_up,
            }
        )
        if self.client_level is not None:  # who answered may depend on what is protected
            metrics = MetricRecord()
        return self._record if applied else None, metrics

    def take_arrays(self, arrays: ArrayRecord) -> None:
        """Make these arrays the adapter, unless they are the strategy's own latest.

        Raises
        ------
        ValueError
            If they hold no LoRA factor.
        """
        if arrays is self._record:
            return
        adapter = {name: array.numpy() for name, array in arrays.items()}
        if not any(kind_of(name) in ("A", "B") for name in adapter):
            raise ValueError("the initial arrays hold no LoRA factor (lora_A / lora_B names)")
        self._adapter, self._record = adapter, arrays

    @property
    def arrays(self) -> ArrayRecord:
        """The whole adapter as of the latest round; empty before the first."""
        return self._record or ArrayRecord()

    def state_dict(self) -> dict[str, Any]:
        """All but the adapter that the next round depends on; plain JSON values."""
        return {"downlink": self._downlink.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], arrays: ArrayRecord) -> None:
        """Go on from :meth:`state_dict` and the adapter that belongs to it."""
        self.take_arrays(arrays)
        self._downlink.load_state_dict(state["downlink"])

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
        """Log method, active-factor rule, privacy, wire, sampling and weights as a tree."""
        log_summary(self)

    # What a method may do differently.

    def _begin(self, plan: RoundPlan) -> None:
        """Prepare for a round's replies; for methods that learn more from them than the mean."""

    def _fold(self, update: Update, weight: float, reply: Message, rank: int) -> None:
        """Fold a checked update in; may refuse it with InvalidReply before changing anything."""
        self._mean.add(update, weight)

    def _apply(self, plan: RoundPlan) -> None:
        """Move the active tensors by the mean change, in float64 before one rounding.

        New arrays take the place of old ones, which nothing may change: see ``Downlink``.
        """
        for name, change in self._mean.mean().items():
            moved = self._adapter[name].astype(np.float64) + change
            self._adapter[name] = moved.astype(np.float32)

    def _apply_if_finite(self, plan: RoundPlan) -> bool:
        """Apply the round unless values would leave float32's range; the adapter stays then."""
        before = dict(self._adapter)
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # seen below
                self._apply(plan)
        except NotFinite as error:
            log(WARNING, "Round %d is not applied: %s", plan.server_round, error)
            self._adapter = before
            return False
        for name, value in self._adapter.items():
            if value is not before.get(name) and not np.isfinite(value).all():
                text = "Round %d is not applied: it would make %s infinite"
                log(WARNING, text, plan.server_round, name)
                self._adapter = before
                return False
        return True

    def _choose_nodes(self, server_round: int, grid: Grid) -> list[int]:
        if self.client_level is not None:
            return poisson_nodes(
                grid,
                self.client_level,
                server_round,
                available=self.min_available_nodes,
                timeout=self.node_timeout,
            )
        return sample_nodes(
            grid,
            fraction=self.fraction_train,
            minimum=self.min_train_nodes,
            available=self.min_available_nodes,
            timeout=self.node_timeout,
            seed=(self.seed, server_round),
        )

    def _is_enough(self, valid: int) -> bool:
        """Whether a round's replies make a mean."""
        if isinstance(self._mean, SecureMean):
            return self._mean.close()
        # Whether a round counts must not tell who took part: then it always does.
        return self.client_level is not None or valid >= self.min_train_nodes

    def _new_mean(self, plan: RoundPlan, asked: int) -> Mean:
        if self.client_level is not None:
            shapes = {name: self._adapter[name].shape for name in plan.uploaded(self._adapter)}
            if isinstance(self.client_level, SecureAggregation):
                rates = {name: plan.learning_rate(name) for name in shapes}
                return SecureMean(self.client_level, shapes, rates)
            return ReleasedMean(self.client_level, plan.server_round, shapes)
        return TrimmedMean(self.trim, asked) if self.trim else WeightedMean()

    def _noised_by_server(self) -> bool:
        return self.client_level is not None and self.client_level.secure

    def _default_rank(self) -> int:
        """Rank of nodes that have stated none; 0 where all nodes are alike."""
        return 0

    def _tensors_for(self, rank: int) -> Update:
        """The adapter as nodes of a rank hold it; ValueError if there are none of that rank."""
        if rank != 0:
            raise ValueError(f"{self.name} has no ranks by client, got {rank}")
        return self._adapter

    def _note(self, failures: list[str], server_round: int, text: str) -> None:
        failures.append(text)
        log(WARNING, "Round %d goes on without %s", server_round, text)

    def _warn_if_not_private(self, valid: int, private: int) -> None:
        if private < valid and not self._warned:
            text = "%d of %d replies state no noise: this run is NOT PRIVATE"
            log(WARNING, text, valid - private, valid)
            self._warned = True


def _failure(error: Error) -> str:
    """What a client says went wrong, fit for a log: one line, no control characters, not long."""
    reason = (error.reason or "no reason given")[:_LONGEST_REASON]
    return f"error code {error.code}: {''.join(c if c.isprintable() else ' ' for c in reason)}"
