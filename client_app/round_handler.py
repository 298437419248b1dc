"""From a train message to its reply."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from federation.messages import COUNT_KEY, FINGERPRINT_KEY, METRICS_KEY, PRIVACY_KEY, ClientFailure
from federation.settings import Settings, SettingsError, Value
from privacy import (
    AccountingError,
    BudgetExhausted,
    EngineError,
    PrivacyPlan,
    PrivateGradient,
    RandomSource,
    SecureSource,
    SeededTestSource,
    StepBudget,
)
from strategies import ROUND_PLAN_KEY, RoundPlan
from task.data import load_client_records
from task.errors import DataError, ModelError

from .local_training import TrainingError, train_round
from .placement import choose_device
from .session import open_session

_LOGGER = logging.getLogger(__name__)
_BUDGET_STATE = "budget"


class MessageError(ValueError):
    """A train message that this client cannot use."""


class BackboneDiffers(ValueError):
    """Server and client do not hold the same frozen weights."""


# Which code stands for which exception; the first that fits.
_FAILURES: tuple[tuple[type[Exception], ClientFailure], ...] = (
    (SettingsError, ClientFailure.SETTINGS),
    (MessageError, ClientFailure.MESSAGE),
    (BackboneDiffers, ClientFailure.BACKBONE_DIFFERS),
    (DataError, ClientFailure.DATA),
    (ModelError, ClientFailure.MODEL),
    (BudgetExhausted, ClientFailure.BUDGET_EXHAUSTED),
    (AccountingError, ClientFailure.PRIVACY),
    (EngineError, ClientFailure.PRIVACY),
    (TrainingError, ClientFailure.PRIVACY),
    (torch.OutOfMemoryError, ClientFailure.OUT_OF_MEMORY),
    (MemoryError, ClientFailure.OUT_OF_MEMORY),
)


def handle_train(message: Message, context: Context) -> Message:
    """Train on a message and reply; every failure becomes a reply with a fixed code.

    Nothing is raised: Flower would forward the exception's text to the server, and its two
    engines differ in what they keep of ``context.state`` after an exception.
    """
    try:
        return Message(content=_train(message, context), reply_to=message)
    except Exception as error:
        failure = next((code for kind, code in _FAILURES if isinstance(error, kind)), None)
        # Texts of our own errors quote no record; of any other only type and place are kept.
        text = _where(error) if failure is None else str(error)
        _LOGGER.error("This client takes no part in the round: %s", text)
        failure = failure or ClientFailure.INTERNAL
    return Message(failure.to_error(), reply_to=message)


def _train(message: Message, context: Context) -> RecordDict:
    settings = Settings.from_run_config(context.run_config)
    plan, arrays, fingerprint = _unpack(message)
    device = choose_device(settings.device, context.node_config)
    session = open_session(settings, device)
    model = session.task_model
    if fingerprint != model.fingerprint:
        raise BackboneDiffers(
            f"the server's backbone has fingerprint {fingerprint[:16]}..., this client's "
            f"{model.fingerprint[:16]}...: the frozen weights (model.name, model.revision, or the "
            "cached embedded backbone) must be the same on all machines"
        )
    records = load_client_records(
        settings.data, model.encoder, context.node_config, seed=settings.seed
    )
    privacy_plan = PrivacyPlan.for_client(
        settings.privacy, num_records=len(records), steps=settings.total_steps
    )
    # Charged before the first step: a crash from here on costs budget, never privacy.
    budget = _charge(context, privacy_plan, plan.local_steps)
    model.load_adapter_state({name: torch.from_numpy(a.numpy()) for name, a in arrays.items()})
    gradient = PrivateGradient(
        privacy_plan,
        session.engine,
        len(records),
        lambda indices: model.per_record_losses(records.batch(indices)),
        _source(settings, context.node_config, plan.server_round),
    )
    update = train_round(plan, model.adapter, gradient)
    metrics = {}
    if settings.strategy.weighting == "public-counts":
        metrics[COUNT_KEY] = len(records)
    return RecordDict(
        {
            "arrays": ArrayRecord({n: Array(value.numpy()) for n, value in update.items()}),
            METRICS_KEY: MetricRecord(metrics),
            PRIVACY_KEY: _statement(budget, settings),
        }
    )


def _unpack(message: Message) -> tuple[RoundPlan, ArrayRecord, str]:
    arrays = message.content.get("arrays")
    config = message.content.get("config")
    plan = message.content.get(ROUND_PLAN_KEY)
    if not isinstance(arrays, ArrayRecord):
        raise MessageError("the train message has no ArrayRecord 'arrays'")
    if not isinstance(config, ConfigRecord) or not isinstance(plan, ConfigRecord):
        raise MessageError(f"the train message lacks its config or its {ROUND_PLAN_KEY}")
    try:
        return RoundPlan.from_record(plan), arrays, str(config[FINGERPRINT_KEY])
    except (KeyError, ValueError) as error:
        raise MessageError(f"the train message cannot be read: {error}") from error


def _charge(context: Context, plan: PrivacyPlan, steps: int) -> StepBudget:
    state = context.state.config_records.get(_BUDGET_STATE, ConfigRecord({"steps": 0}))
    budget = StepBudget(plan, charged=int(state["steps"]))  # type: ignore[arg-type]
    budget.charge(steps)
    context.state[_BUDGET_STATE] = ConfigRecord({"steps": budget.charged})
    return budget


def _source(
    settings: Settings, node_config: Mapping[str, Value], server_round: int
) -> RandomSource:
    seed = settings.privacy.insecure_test_seed
    if seed < 0:
        return SecureSource()
    return SeededTestSource((seed, int(node_config.get("partition-id", 0)), server_round))


def _statement(budget: StepBudget, settings: Settings) -> ConfigRecord:
    """What the client's privacy rests on: public numbers only."""
    return ConfigRecord(
        {
            "sample-rate": budget.plan.sample_rate,
            "noise-multiplier": budget.plan.noise_multiplier,
            "target-delta": budget.plan.target_delta,
            "steps": budget.charged,
            "secure-noise": settings.privacy.insecure_test_seed < 0,
        }
    )


def _where(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f"{trace.tb_frame.f_code.co_name}, line {trace.tb_lineno}" if trace else "unknown"
    return f"{type(error).__name__} in {place}"
