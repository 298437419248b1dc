"""What the server measures after each round, and the line that it writes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from logging import INFO
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.common import log

from federation.round_lines import round_line
from federation.run_files import RunFolder
from strategies import LoRAStrategy
from task.data import Records
from task.metrics import evaluate
from task.model import TaskModel

from .client_account import ClientAccount
from .noised_accuracy import NoisedAccuracy
from .privacy_tracker import PrivacyTracker

VALIDATION_ACCURACY = "validation-accuracy"


def load_adapter(model: TaskModel, arrays: ArrayRecord) -> None:
    """Put the tensors of an ArrayRecord into the model, in place."""
    model.load_adapter_state({n: torch.from_numpy(a.numpy()) for n, a in arrays.items()})


def split_validation(test: Records, fraction: float, seed: int) -> tuple[Records, Records]:
    """Split public records into those that may stop a run and those that it is judged by.

    Parameters
    ----------
    test : Records
        The public test records.
    fraction : float
        Share that goes to validation, in [0, 1).
    seed : int
        Draws which.

    Returns
    -------
    validation, test : Records
        Disjoint; the first is empty if ``fraction`` is 0.

    Raises
    ------
    ValueError
        If one of them would be empty otherwise.
    """
    order = np.random.default_rng((seed, 0)).permutation(len(test))
    count = round(fraction * len(test))
    if fraction and not 0 < count < len(test):
        raise ValueError(
            f"data.validation-fraction is {fraction:g} of {len(test)} test records: accepted is a "
            "share that leaves at least one on either side"
        )
    return test.subset(np.sort(order[:count])), test.subset(np.sort(order[count:]))


class Observer:
    """Writes each round's line, and evaluates on public records.

    Parameters
    ----------
    folder : RunFolder
        Gets the lines.
    rounds : int
        Rounds of the run, for the time left.
    strategy : LoRAStrategy
        Its last round's report is part of the line.
    model : TaskModel
        Evaluated; holds the latest adapter afterwards.
    test : Records
        What accuracy is reported on.
    validation : Records
        What early stopping goes by; may be empty.
    tracker : PrivacyTracker
        Knows epsilon.
    every : int (default: 1)
        Rounds from one evaluation to the next; the start and the last round always have one.
    noised_accuracy : NoisedAccuracy, optional
        What clients state of the model that the round began with.
    """

    def __init__(
        self,
        folder: RunFolder,
        rounds: int,
        strategy: LoRAStrategy,
        model: TaskModel,
        test: Records,
        validation: Records,
        tracker: PrivacyTracker | ClientAccount,
        every: int = 1,
        noised_accuracy: NoisedAccuracy | None = None,
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self._folder, self._rounds, self._strategy = folder, rounds, strategy
        self._model, self._test, self._validation = model, test, validation
        self._tracker, self._every = tracker, every
        self._noised_accuracy = noised_accuracy
        self._started = self._latest = time.monotonic()

    @property
    def rounds_applied(self) -> int:
        """Rounds that moved the adapter."""
        return sum(row["applied"] for row in self.rows)

    def __call__(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Flower's ``evaluate_fn``: round 0 is the start; ``None`` if it is not evaluated."""
        record = None
        if server_round % self._every == 0 or server_round == self._rounds:
            record = self._evaluate(arrays)
        row = self._row(server_round, record)
        self.rows.append(row)
        self._folder.append_metrics(row)
        log(INFO, "%s", round_line(row, self._rounds))
        return record

    def _evaluate(self, arrays: ArrayRecord) -> MetricRecord:
        load_adapter(self._model, arrays)
        metrics = evaluate(self._model, self._test)
        record = MetricRecord({"accuracy": metrics["accuracy"], "loss": metrics["loss"]})
        if len(self._validation):
            record[VALIDATION_ACCURACY] = evaluate(self._model, self._validation)["accuracy"]
        return record

    def _row(self, server_round: int, metrics: MetricRecord | None) -> dict[str, Any]:
        report = self._strategy.last_round if server_round else None
        before = self.rows[-1] if self.rows else {"bytes_up": 0, "bytes_down": 0}
        epsilon = self._tracker.largest_epsilon()
        now = time.monotonic()
        row = {
            "round": server_round,
            "accuracy": metrics["accuracy"] if metrics else None,
            "loss": metrics["loss"] if metrics else None,
            "epsilon": epsilon if math.isfinite(epsilon) else None,
            "bytes_up": (before["bytes_up"] or 0) + (report.bytes_up if report else 0),
            "bytes_down": (before["bytes_down"] or 0) + (report.bytes_down if report else 0),
            "clients": report.valid if report else 0,
            "failures": len(report.failures) if report else 0,
            "applied": report.applied if report else False,
            "private": report.private if report else False,
            "active": report.plan.describe() if report else "",
            "seconds": now - self._started,
            "round_seconds": now - self._latest,
        }
        if metrics and VALIDATION_ACCURACY in metrics:
            row["validation_accuracy"] = metrics[VALIDATION_ACCURACY]
        if self._noised_accuracy is not None and server_round:
            row["noised_accuracy"] = self._noised_accuracy.take()
        self._latest = now
        return self._tracker.in_its_unit(row) if isinstance(self._tracker, ClientAccount) else row

    def state_dict(self) -> dict[str, Any]:
        """The lines so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after these lines, and write them into this run's folder."""
        self.rows = [dict(row) for row in state["rows"]]
        self._started = time.monotonic() - self.rows[-1]["seconds"]
        self._latest = time.monotonic()
        self._folder.replace_metrics(self.rows)
