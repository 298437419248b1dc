"""A whole run: build, train, evaluate each round, keep the adapter, state the result."""

from __future__ import annotations

import math
from logging import INFO, WARNING

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from flwr.common import log
from flwr.serverapp import Grid

from federation.messages import COUNT_KEY, FINGERPRINT_KEY
from federation.run_files import RunFolder, runs_folder
from federation.settings import Settings
from strategies import STRATEGIES, Checkpoint, EarlyStopping, LoRAStrategy
from task.data import load_test_records, num_labels
from task.model import build_task_model

from .client_account import ClientAccount, make_account, sum_guarantee
from .noised_accuracy import NoisedAccuracy
from .observer import VALIDATION_ACCURACY, Observer, load_adapter, split_validation
from .planned_bound import PlannedBound
from .privacy_report import as_text, make_report
from .privacy_tracker import PrivacyTracker
from .resume import TrainingId, find_earlier_run, take_over
from .sum_report import make_sum_report, sum_report_text


class NothingLearned(RuntimeError):
    """No round of the run could be applied."""


def make_strategy(
    settings: Settings,
    tracker: PrivacyTracker | ClientAccount,
    accuracy: NoisedAccuracy | None = None,
) -> LoRAStrategy:
    """Build the run's strategy, whose replies these two observe."""

    def on_reply(node: int, message: Message) -> None:
        tracker.observe(node, message)
        if accuracy is not None:
            accuracy.observe(message)

    bounded = settings.strategy.norm_bound == "auto" and settings.privacy.mode == "record"
    return STRATEGIES[settings.strategy.method].from_settings(
        settings.strategy,
        settings.wire,
        train_head=settings.model.head == "train",
        seed=settings.seed,
        weighted_by_key=COUNT_KEY,
        update_bound=PlannedBound(settings) if bounded else None,
        # Seeded test noise is there to be repeated: then sums shall have the same bits too.
        in_order=settings.privacy.insecure_test_seed >= 0,
        privacy=sum_guarantee(settings) or _guarantee(settings),
        client_level=tracker.level if isinstance(tracker, ClientAccount) else None,
        on_reply=on_reply,
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
        With ``metrics.jsonl``, the privacy report, ``result.json`` and the adapter.

    Raises
    ------
    NothingLearned
        If no round had enough valid replies; there is no result then.
    SettingsError
        If ``resume`` names no run that these settings could go on from.
    """
    earlier = find_earlier_run(settings) if settings.resume else None
    folder = RunFolder.create(
        runs_folder(settings.output_dir), method=settings.strategy.method, run_id=run_id
    )
    folder.write_settings(settings.model_dump(by_alias=True))
    log(INFO, "Run folder: %s", folder.path)
    _warn_if_not_private(settings)

    model = build_task_model(
        settings.model, settings.lora, num_labels(settings.data), seed=settings.seed
    ).to(_server_device(settings))
    validation, test = split_validation(
        load_test_records(settings.data, model.encoder),
        settings.data.validation_fraction,
        settings.seed,
    )
    initial = {name: Array(value.numpy()) for name, value in model.adapter_state().items()}
    tracker = make_account(settings, sum(math.prod(a.shape) for a in initial.values()))
    accuracy = NoisedAccuracy() if settings.privacy.evaluation_noise_multiplier else None
    strategy = make_strategy(settings, tracker, accuracy)
    rounds = settings.strategy.num_rounds
    every = settings.strategy.evaluate_every
    observer = Observer(folder, rounds, strategy, model, test, validation, tracker, every, accuracy)
    train_config = ConfigRecord({FINGERPRINT_KEY: model.fingerprint})
    training = TrainingId(train_config)
    checkpoint = Checkpoint(
        folder.checkpoint, {"observer": observer, "account": tracker, "training": training}
    )
    if earlier is not None:
        take_over(earlier, folder)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(initial),
        num_rounds=rounds,
        timeout=settings.strategy.round_timeout,
        train_config=train_config,
        evaluate_fn=observer,
        checkpoint=checkpoint,
        early_stopping=_early_stopping(settings),
    )
    if not observer.rounds_applied:
        raise NothingLearned(
            f"none of the {rounds} rounds had "
            f"{settings.strategy.min_train_nodes} valid replies (strategy.min-train-nodes); the "
            "reasons stand above, round by round"
        )
    # A run that went on from its last round evaluated nothing: the strategy has the adapter.
    load_adapter(model, strategy.arrays)
    model.save_adapter(folder.adapter)
    first, last = observer.rows[0], observer.rows[-1]
    if isinstance(tracker, ClientAccount):
        report = make_sum_report(settings, tracker)
        folder.write_privacy_report(report, sum_report_text(report))
    else:
        report = make_report(settings, tracker)
        folder.write_privacy_report(report, as_text(report))
    folder.write_result(
        {
            "method": settings.strategy.method,
            "rounds": last["round"],
            "stopped_early": last["round"] < rounds,
            "clients": max(row["clients"] or 0 for row in observer.rows) or None,
            "accuracy_start": first["accuracy"],
            "accuracy_end": last["accuracy"],
            "epsilon": last["epsilon"],
            **{key: last[key] for key in ("client_epsilon", "guards_against") if key in last},
            "delta": settings.privacy.target_delta,
            "bytes_up": last["bytes_up"],
            "bytes_down": last["bytes_down"],
            "seconds": last["seconds"],
            "adapter": str(folder.adapter),
        }
    )
    log(INFO, "Result: %s", folder.result)
    return folder


def _early_stopping(settings: Settings) -> EarlyStopping | None:
    if not settings.strategy.early_stopping_patience:
        return None
    return EarlyStopping(
        metric=VALIDATION_ACCURACY,
        patience=settings.strategy.early_stopping_patience,
        min_delta=settings.strategy.early_stopping_min_delta,
    )


def _guarantee(settings: Settings) -> str:
    privacy = settings.privacy
    if privacy.mode == "none" or privacy.insecure_test_seed >= 0:
        return "none: this run is NOT PRIVATE"
    if settings.resume:
        return "what the earlier run spent and this one adds: the epsilon of each round's line"
    return (
        f"epsilon {privacy.target_epsilon:g} at delta {privacy.target_delta:g} at most, over all "
        "rounds, against the server too"
    )


def _server_device(settings: Settings) -> str:
    if settings.device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    return settings.device


def _warn_if_not_private(settings: Settings) -> None:
    if settings.privacy.mode == "none":
        log(WARNING, "privacy.mode is 'none': this run is NOT PRIVATE")
    elif settings.privacy.insecure_test_seed >= 0:
        log(WARNING, "privacy.insecure-test-seed is set: this run is NOT PRIVATE, for tests only")
