"""A whole run: build, train, evaluate each round, keep the adapter, state the result."""

from __future__ import annotations

import math
import time
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid

from federation.messages import COUNT_KEY, FINGERPRINT_KEY
from federation.round_lines import round_line
from federation.run_files import RunFolder, default_runs_folder
from federation.settings import Settings
from strategies import STRATEGIES, LoRAStrategy
from task.data import Records, load_test_records, num_labels
from task.metrics import evaluate
from task.model import TaskModel, build_task_model

from .privacy_tracker import PrivacyTracker


class NothingLearned(RuntimeError):
    """No round of the run could be applied."""


class _Observer:
    """Evaluates after each round and writes the round's line."""

    def __init__(
        self,
        settings: Settings,
        folder: RunFolder,
        strategy: LoRAStrategy,
        model: TaskModel,
        test: Records,
        tracker: PrivacyTracker,
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self.rounds_applied = 0
        self._settings, self._folder, self._strategy = settings, folder, strategy
        self._model, self._test, self._tracker = model, test, tracker
        self._bytes_up = self._bytes_down = 0
        self._started = self._latest = time.monotonic()

    def __call__(self, server_round: int, arrays: ArrayRecord) -> MetricRecord:
        """Flower's ``evaluate_fn``: round 0 is the start."""
        load_adapter(self._model, arrays)
        metrics = evaluate(self._model, self._test)
        report = self._strategy.last_round if server_round else None
        if report is not None:
            self._bytes_up += report.bytes_up
            self._bytes_down += report.bytes_down
            self.rounds_applied += report.applied
        epsilon = self._tracker.largest_epsilon()
        now = time.monotonic()
        row: dict[str, Any] = {
            "round": server_round,
            "accuracy": metrics["accuracy"],
            "loss": metrics["loss"],
            "epsilon": epsilon if math.isfinite(epsilon) else None,
            "bytes_up": self._bytes_up,
            "bytes_down": self._bytes_down,
            "clients": report.valid if report else 0,
            "failures": len(report.failures) if report else 0,
            "applied": report.applied if report else False,
            "active": report.plan.describe() if report else "",
            "seconds": now - self._started,
            "round_seconds": now - self._latest,
        }
        self._latest = now
        self.rows.append(row)
        self._folder.append_metrics(row)
        log(INFO, "%s", round_line(row, self._settings.strategy.num_rounds))
        return MetricRecord({"accuracy": metrics["accuracy"], "loss": metrics["loss"]})


def load_adapter(model: TaskModel, arrays: ArrayRecord) -> None:
    """Put the tensors of an ArrayRecord into the model, in place."""
    model.load_adapter_state({n: torch.from_numpy(a.numpy()) for n, a in arrays.items()})


def make_strategy(settings: Settings, tracker: PrivacyTracker) -> LoRAStrategy:
    """Build the run's strategy."""
    return STRATEGIES[settings.strategy.method].from_settings(
        settings.strategy,
        train_head=settings.model.head == "train",
        seed=settings.seed,
        weighted_by_key=COUNT_KEY,
        on_reply=tracker.observe,
    )


def run_federation(grid: Grid, settings: Settings, *, run_id: int) -> RunFolder:
    """Train a federation and leave a complete run folder behind.

    Parameters
    ----------
    grid : Grid
        Flower's connection to the nodes.
    settings : Settings
        The run's settings.
    run_id : int
        Flower's id of the run; ends the folder's name.

    Returns
    -------
    RunFolder
        With ``metrics.jsonl``, ``result.json`` and the adapter.

    Raises
    ------
    NothingLearned
        If no round had enough valid replies; there is no result then.
    """
    runs = Path(settings.output_dir).expanduser() if settings.output_dir else default_runs_folder()
    folder = RunFolder.create(runs, method=settings.strategy.method, run_id=run_id)
    folder.write_settings(settings.model_dump(by_alias=True))
    log(INFO, "Run folder: %s", folder.path)
    _warn_if_not_private(settings)

    model = build_task_model(
        settings.model, settings.lora, num_labels(settings.data), seed=settings.seed
    ).to(_server_device(settings))
    test = load_test_records(settings.data, model.encoder)
    tracker = PrivacyTracker(settings.privacy.target_delta, settings.total_steps)
    strategy = make_strategy(settings, tracker)
    observer = _Observer(settings, folder, strategy, model, test, tracker)
    started = time.monotonic()
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(
            {name: Array(value.numpy()) for name, value in model.adapter_state().items()}
        ),
        num_rounds=settings.strategy.num_rounds,
        timeout=settings.strategy.round_timeout,
        train_config=ConfigRecord({FINGERPRINT_KEY: model.fingerprint}),
        evaluate_fn=observer,
    )
    if not observer.rounds_applied:
        raise NothingLearned(
            f"none of the {settings.strategy.num_rounds} rounds had "
            f"{settings.strategy.min_train_nodes} valid replies (strategy.min-train-nodes); the "
            "reasons stand above, round by round"
        )
    # The model holds the last round's adapter: the observer loaded it.
    model.save_adapter(folder.adapter)
    first, last = observer.rows[0], observer.rows[-1]
    folder.write_result(
        {
            "method": settings.strategy.method,
            "rounds": settings.strategy.num_rounds,
            "clients": max(row["clients"] for row in observer.rows),
            "accuracy_start": first["accuracy"],
            "accuracy_end": last["accuracy"],
            "epsilon": last["epsilon"],
            "delta": settings.privacy.target_delta,
            "bytes_up": last["bytes_up"],
            "bytes_down": last["bytes_down"],
            "seconds": time.monotonic() - started,
            "adapter": str(folder.adapter),
        }
    )
    log(INFO, "Result: %s", folder.result)
    return folder


def _server_device(settings: Settings) -> str:
    if settings.device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    return settings.device


def _warn_if_not_private(settings: Settings) -> None:
    if settings.privacy.mode == "none":
        log(WARNING, "privacy.mode is 'none': this run is NOT PRIVATE")
    elif settings.privacy.insecure_test_seed >= 0:
        log(WARNING, "privacy.insecure-test-seed is set: this run is NOT PRIVATE, for tests only")
