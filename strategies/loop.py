"""The rounds of a run: train, evaluate, keep, and stop in time."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from logging import INFO
from typing import TYPE_CHECKING, Any, Literal

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from .checkpoint import Checkpoint, CheckpointError
from .exchange import exchange

if TYPE_CHECKING:
    from .base import LoRAStrategy

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
_HISTORIES = (
    "train_metrics_clientapp",
    "evaluate_metrics_clientapp",
    "evaluate_metrics_serverapp",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """When to stop before the last round: the metric has not become better for some rounds.

    Parameters
    ----------
    metric : str
        Name of a value that ``evaluate_fn`` returns.  It must come from public records, and not
        from the test split that the result is reported on.
    patience : int
        Rounds without improvement after which the run ends.
    min_delta : float (default: 0.0)
        Smallest change that counts as an improvement.
    mode : {"max", "min"} (default: "max")
        Whether more is better, or less.
    """

    metric: str
    patience: int
    min_delta: float = 0.0
    mode: Literal["max", "min"] = "max"

    def __post_init__(self) -> None:
        """Refuse a rule that never or always stops."""
        if self.patience < 1:
            raise ValueError(f"patience must be >= 1, got {self.patience}")
        if not 0 <= self.min_delta < math.inf:
            raise ValueError(f"min_delta must be >= 0, got {self.min_delta}")
        if self.mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', got {self.mode!r}")

    def is_over(self, history: Mapping[int, MetricRecord]) -> bool:
        """Whether the run should end, told by the metrics so far by round.

        Raises
        ------
        ValueError
            If a round has no such metric.
        """
        best, since = -math.inf, 0
        for server_round in sorted(history):
            value = history[server_round].get(self.metric)
            if not isinstance(value, int | float):
                raise ValueError(
                    f"early stopping needs the metric {self.metric!r} of evaluate_fn, which has "
                    f"{sorted(history[server_round])}"
                )
            score = float(value) if self.mode == "max" else -float(value)
            if score > best + self.min_delta:  # never true of a NaN
                best, since = score, 0
            else:
                since += 1
        return since >= self.patience


def run_rounds(
    strategy: LoRAStrategy,
    grid: Grid,
    initial_arrays: ArrayRecord,
    *,
    num_rounds: int,
    timeout: float | None,
    train_config: ConfigRecord | None,
    evaluate_config: ConfigRecord | None,
    evaluate_fn: EvaluateFn | None,
    checkpoint: Checkpoint | None,
    early_stopping: EarlyStopping | None,
) -> Result:
    """Run a federation; see :meth:`LoRAStrategy.start`."""
    started = time.monotonic()
    log(INFO, "Starting %s strategy:", type(strategy).__name__)
    strategy.summary()
    result = Result()
    result.arrays = initial_arrays
    strategy.take_arrays(initial_arrays)
    done = _resume(strategy, checkpoint, result) if checkpoint else None
    if done is None:
        done = 0
        _evaluate(evaluate_fn, 0, result)
    if checkpoint:  # also before the first round: what it asks for can be asked for again
        checkpoint.save(_state(strategy, done, result), result.arrays)
    for server_round in range(done + 1, num_rounds + 1):
        if early_stopping and early_stopping.is_over(result.evaluate_metrics_serverapp):
            log(
                INFO,
                "Stopping early after round %d: %s has not improved in %d rounds",
                server_round - 1,
                early_stopping.metric,
                early_stopping.patience,
            )
            break
        log(INFO, "[ROUND %d/%d]", server_round, num_rounds)
        _train(strategy, grid, server_round, result, train_config, timeout)
        _evaluate_on_clients(strategy, grid, server_round, result, evaluate_config, timeout)
        _evaluate(evaluate_fn, server_round, result)
        if checkpoint:
            checkpoint.save(_state(strategy, server_round, result), result.arrays)
    log(INFO, "Strategy execution finished in %.2fs", time.monotonic() - started)
    return result


def _train(
    strategy: LoRAStrategy,
    grid: Grid,
    server_round: int,
    result: Result,
    config: ConfigRecord | None,
    timeout: float | None,
) -> None:
    replies = exchange(
        grid,
        strategy.configure_train(server_round, result.arrays, config or ConfigRecord(), grid),
        timeout=timeout,
        follow_up=strategy.follow_up,
        in_order=strategy.in_order,
    )
    arrays, metrics = strategy.aggregate_train(server_round, replies)
    if arrays is not None:
        result.arrays = arrays
    if metrics is not None:
        log(INFO, "\t└──> Aggregated MetricRecord: %s", metrics)
        result.train_metrics_clientapp[server_round] = metrics


def _evaluate_on_clients(
    strategy: LoRAStrategy,
    grid: Grid,
    server_round: int,
    result: Result,
    config: ConfigRecord | None,
    timeout: float | None,
) -> None:
    # Ours ask nobody; somebody's subclass may, on records that are public.
    asked = strategy.configure_evaluate(server_round, result.arrays, config or ConfigRecord(), grid)
    messages = list(asked)
    if not messages:
        return
    replies = exchange(grid, messages, timeout=timeout, follow_up=lambda _: None)
    metrics = strategy.aggregate_evaluate(server_round, replies)
    if metrics is not None:
        result.evaluate_metrics_clientapp[server_round] = metrics


def _evaluate(evaluate_fn: EvaluateFn | None, server_round: int, result: Result) -> None:
    if evaluate_fn is None:
        return
    metrics = evaluate_fn(server_round, result.arrays)
    if metrics is not None:
        log(INFO, "\t└──> Global evaluation: %s", metrics)
        result.evaluate_metrics_serverapp[server_round] = metrics


def _state(strategy: LoRAStrategy, server_round: int, result: Result) -> dict[str, Any]:
    return {
        "method": strategy.name,
        "round": server_round,
        "strategy": strategy.state_dict(),
        "metrics": {
            name: {str(n): dict(record) for n, record in getattr(result, name).items()}
            for name in _HISTORIES
        },
    }


def _resume(strategy: LoRAStrategy, checkpoint: Checkpoint, result: Result) -> int | None:
    """Take up a checkpoint; the round that it was written after, or ``None`` without one."""
    saved = checkpoint.load()
    if saved is None:
        return None
    state = saved.state
    if state["method"] != strategy.name:
        raise CheckpointError(
            f"{checkpoint.path} is of a run with {state['method']!r}, this one's method is "
            f"{strategy.name!r}"
        )
    shapes = {n: a.shape for n, a in result.arrays.items()}
    if any(saved.arrays[n].shape != s if n in saved.arrays else True for n, s in shapes.items()):
        raise CheckpointError(f"{checkpoint.path} is of a run with another adapter")
    try:
        strategy.load_state_dict(state["strategy"], saved.arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path} does not fit this run: {error}") from error
    result.arrays = saved.arrays
    for name in _HISTORIES:
        records = {int(n): MetricRecord(values) for n, values in state["metrics"][name].items()}
        getattr(result, name).update(records)
    log(INFO, "Going on after round %d, from %s", state["round"], checkpoint.path)
    return int(state["round"])
