"""From a train message to its reply."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict

from federation.messages import COUNT_KEY, FINGERPRINT_KEY, METRICS_KEY, ClientFailure
from federation.settings import Settings, SettingsError
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
from strategies import (
    PRIVACY_KEY,
    ROUND_PLAN_KEY,
    SCORES_KEY,
    GradientEnergies,
    NeedFull,
    ProtocolError,
    RoundPlan,
    UnusableMessage,
    ask_for_everything,
    receive_adapter,
)
from task.backbones import backbone_loads
from task.data import load_client_records
from task.errors import DataError, ModelError

from .client_level import outgoing_records, secure_answer, summed_gradients, unit_statement
from .local_training import TrainingError, step_kind, train_round
from .placement import choose_device, choose_rank, set_threads
from .session import open_session
from .trace import MessageTrace, traced_message

_LOGGER = logging.getLogger(__name__)
_BUDGET_STATE = "budget"
_CPU_MEMORY = "DefaultCPUAllocator"


class MessageError(ValueError):
    """A train message that this client cannot use."""


class BackboneDiffers(ValueError):
    """Server and client do not hold the same frozen weights."""


# Which code stands for which exception; the first that fits.
_FAILURES: tuple[tuple[type[Exception], ClientFailure], ...] = (
    (SettingsError, ClientFailure.SETTINGS),
    (MessageError, ClientFailure.MESSAGE),
    (UnusableMessage, ClientFailure.MESSAGE),
    (ProtocolError, ClientFailure.PRIVACY),
    (BackboneDiffers, ClientFailure.BACKBONE_DIFFERS),
    (DataError, ClientFailure.DATA),
    (ModelError, ClientFailure.MODEL),
    (BudgetExhausted, ClientFailure.BUDGET_EXHAUSTED),
    (AccountingError, ClientFailure.PRIVACY),
    (EngineError, ClientFailure.PRIVACY),
    (TrainingError, ClientFailure.PRIVACY),
)
_OWN_TEXTS = {code for _, code in _FAILURES}


def handle_train(message: Message, context: Context) -> Message:
    """Train on a message and reply; every failure becomes a reply with a fixed code.

    Nothing is raised: Flower would forward the exception's text to the server, and its two
    engines differ in what they keep of ``context.state`` after an exception.
    """
    try:
        if (answer := secure_answer(message, context)) is not None:
            return Message(content=answer, reply_to=message)
        with traced_message() as trace:
            return Message(content=_train(message, context, trace), reply_to=message)
    except Exception as error:
        failure = _failure_of(error)
        # Texts of our own errors quote no record; of any other only type and place are kept.
        text = str(error) if failure in _OWN_TEXTS else _where(error)
        _LOGGER.error("This client takes no part in the round: %s", text)
    return Message(failure.to_error(), reply_to=message)


def _failure_of(error: Exception) -> ClientFailure:
    for kind, code in _FAILURES:
        if isinstance(error, kind):
            return code
    # On the CPU torch raises a plain RuntimeError for want of memory.
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_MEMORY in str(error)
    return ClientFailure.OUT_OF_MEMORY if memory else ClientFailure.INTERNAL


def _train(message: Message, context: Context, trace: MessageTrace) -> RecordDict:
    settings = Settings.from_run_config(context.run_config)
    plan, fingerprint = _unpack(message)
    if plan.scores != "none" and settings.strategy.score != "client":
        raise MessageError("the round plan asks for scores, strategy.score does not")
    rank = choose_rank(settings, context.node_config)
    wire_rank = rank if settings.strategy.method == "flex-lora" else 0
    try:
        adapter = receive_adapter(message, context.state, rank=wire_rank)
    except NeedFull:  # nothing was trained, so nothing is charged
        return ask_for_everything(context.state, rank=wire_rank)
    device = choose_device(settings.device, context.node_config)
    threads = set_threads(context.node_config)
    with trace.span("session"):
        session = open_session(settings, device, rank)
    model = session.task_model
    if fingerprint != model.fingerprint:
        raise BackboneDiffers(
            f"the server's backbone has fingerprint {fingerprint[:16]}..., this client's "
            f"{model.fingerprint[:16]}...: the frozen weights (model.name, model.revision, or the "
            "cached embedded backbone) must be the same on all machines"
        )
    with trace.span("records"):
        records = load_client_records(
            settings.data, model.encoder, context.node_config, seed=settings.seed
        )
    with trace.span("calibration"):
        privacy_plan = PrivacyPlan.for_client(
            settings.privacy, num_records=len(records), steps=settings.total_steps
        )
    received = {name: torch.from_numpy(value) for name, value in adapter.items()}
    model.load_adapter_state(received)
    # Charged before the first step: a crash from here on costs budget, never privacy.
    budget = _charge(context, privacy_plan, plan.local_steps)
    gradient = PrivateGradient(
        privacy_plan,
        session.engine,
        len(records),
        lambda indices: model.per_record_losses(records.batch(indices)),
        _source(settings, context, plan.server_round),
        settings.privacy.max_physical_batch_size,
    )
    kind = step_kind(plan.active(1, model.adapter))
    noise_std = privacy_plan.noise_std(kind) / privacy_plan.expected_batch_size
    energies = GradientEnergies(plan, noise_std) if plan.scores != "none" else None
    in_shares = settings.privacy.mode == "record-distributed"
    train = summed_gradients if in_shares else train_round
    try:
        with _own_random_state(settings, context, plan.server_round):
            update = train(plan, model.adapter, gradient, energies, trace)
    finally:
        model.load_adapter_state(received)  # this process may play another client next
    trace.values.update(
        round=plan.server_round,
        node=_who(context),
        steps=gradient.steps_taken,
        threads=threads,
        backbone_loads=backbone_loads(),
    )
    metrics = MetricRecord()
    if settings.strategy.weighting == "public-counts":
        metrics[COUNT_KEY] = len(records)
    rounding = np.random.default_rng((settings.seed, _who(context), plan.server_round))
    values = {name: value.numpy() for name, value in update.items()}
    size = sum(value.numel() for value in received.values())
    reply = RecordDict(
        {
            **outgoing_records(settings, message, context, plan, values, size, rounding),
            METRICS_KEY: metrics,
            PRIVACY_KEY: unit_statement(settings) or _statement(budget, settings, noise_std),
        }
    )
    if energies is not None:
        reply[SCORES_KEY] = MetricRecord(dict(energies.scores()))
    return reply


def _unpack(message: Message) -> tuple[RoundPlan, str]:
    config = message.content.get("config")
    plan = message.content.get(ROUND_PLAN_KEY)
    if not isinstance(config, ConfigRecord) or not isinstance(plan, ConfigRecord):
        raise MessageError(f"the train message lacks its config or its {ROUND_PLAN_KEY}")
    try:
        return RoundPlan.from_record(plan), str(config[FINGERPRINT_KEY])
    except (KeyError, ValueError, TypeError) as error:
        raise MessageError(f"the train message cannot be read: {error}") from error


def _charge(context: Context, plan: PrivacyPlan, steps: int) -> StepBudget:
    """Charge a round to the run's budget, whose plan may not change once it has begun."""
    numbers = json.dumps(dataclasses.asdict(plan))
    state = context.state.config_records.get(_BUDGET_STATE)
    if state is None:
        state = ConfigRecord({"steps": 0, "plan": numbers})
    if state["plan"] != numbers:
        raise AccountingError(
            "the privacy plan differs from that of the run's earlier rounds: the site's data or "
            "the run config changed in the middle of the run"
        )
    budget = StepBudget(plan, charged=int(state["steps"]))  # type: ignore[arg-type]
    budget.charge(steps)
    context.state[_BUDGET_STATE] = ConfigRecord({"steps": budget.charged, "plan": numbers})
    return budget


def _who(context: Context) -> int:
    """A number of this client's own: its partition in simulation, its node id elsewhere."""
    return int(context.node_config.get("partition-id", context.node_id))


def _source(settings: Settings, context: Context, server_round: int) -> RandomSource:
    seed = settings.privacy.insecure_test_seed
    if seed < 0:
        return SecureSource()
    return SeededTestSource((seed, _who(context), server_round))


@contextlib.contextmanager
def _own_random_state(settings: Settings, context: Context, server_round: int) -> Iterator[None]:
    """Seed torch for adapter dropout, for this round only.

    Without it an update would depend on which other clients this process played before.  The
    seed is secret: a record's mask depends on its place in the batch, so with known masks one
    record's absence would change the gradients of all that follow it.
    """
    words = _source(settings, context, server_round).words(1)
    with torch.random.fork_rng():
        torch.manual_seed(int(words[0] >> np.uint64(1)))
        yield


def _statement(budget: StepBudget, settings: Settings, noise_std: float) -> ConfigRecord:
    """What the client's privacy rests on: public numbers only.

    The noise on each value of a mean gradient, sigma C / b, tells the record count by b; it is
    stated only where settings declare the count public.
    """
    plan = budget.plan
    statement = ConfigRecord(
        {
            "sample-rate": plan.sample_rate,
            "noise-multiplier": plan.noise_multiplier,
            "target-delta": plan.target_delta,
            "steps": budget.charged,
            "secure-noise": settings.privacy.insecure_test_seed < 0,
        }
    )
    if settings.counts_are_public:
        statement["noise-std"] = noise_std
    return statement


def _where(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return type(error).__name__
    code = trace.tb_frame.f_code
    return f"{type(error).__name__} in {code.co_name}, {code.co_filename}:{trace.tb_lineno}"
