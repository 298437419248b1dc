"""What a client does where only a noised sum over clients is ever used."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor, nn

from federation.settings import Settings
from privacy import (
    BudgetExhausted,
    DistributedMechanism,
    DistributedPlan,
    PrivateGradient,
    clip_update,
)
from privacy.client_settings import CLIENT_MODES, SECURE_MODES, SUM_MODES
from strategies import (
    SECURE_KEY,
    WIRE_KEY,
    GradientEnergies,
    MaskLimits,
    ProtocolError,
    RoundPlan,
    answer_stage,
    masked_records,
    update_records,
)

from .local_training import step_kind
from .trace import MessageTrace

Update = Mapping[str, npt.NDArray[np.float32]]
_ROUNDS_STATE = "client-level-rounds"


def secure_answer(message: Message, context: Context) -> RecordDict | None:
    """Answer to a message of secure aggregation that asks for no training; else ``None``.

    Raises
    ------
    ProtocolError
        If the message is not of an honest run, or the run has no secure aggregation.
    """
    if SECURE_KEY not in message.content:
        return None
    settings = Settings.from_run_config(context.run_config)
    if settings.privacy.mode not in SECURE_MODES:
        raise ProtocolError("a message of secure aggregation in a run that has none")
    return answer_stage(message, context.state, context.node_id, _limits(settings))


def unit_statement(settings: Settings) -> ConfigRecord | None:
    """What a reply says of its privacy where clients are the unit; ``None`` elsewhere.

    Nothing of it depends on the client's data: it adds no noise and promises none.
    """
    privacy = settings.privacy
    if privacy.mode in CLIENT_MODES:
        return ConfigRecord({"unit": "client", "max-update-norm": privacy.max_update_norm})
    if privacy.mode in SUM_MODES:
        return ConfigRecord({"unit": "record", "max-grad-norm": privacy.max_grad_norm})
    return None


def summed_gradients(
    plan: RoundPlan,
    adapter: Mapping[str, nn.Parameter],
    gradient: PrivateGradient,
    energies: GradientEnergies | None,
    trace: MessageTrace,
) -> dict[str, Tensor]:
    """Take the place of ``train_round`` where noise comes in shares: a sum of clipped gradients.

    There is one step a round, which the server takes: a second local step would use a sum that
    only a share of the noise protects.

    Raises
    ------
    ProtocolError
        If the round plan asks for more than the one step.
    """
    if plan.local_steps != 1 or plan.optimizer != "sgd" or plan.low_pass or energies is not None:
        raise ProtocolError("a round of privacy.mode = 'record-distributed' is one step of SGD")
    active = plan.active(1, adapter)
    with trace.span("steps"):
        means = gradient.step(active, step_kind(active))  # the privacy plan's noise is none
    batch = gradient.plan.expected_batch_size
    return {name: value.cpu().double() * batch for name, value in means.items()}


def outgoing_records(
    settings: Settings,
    message: Message,
    context: Context,
    plan: RoundPlan,
    update: Update,
    values: int,
    rounding: np.random.Generator,
) -> dict[str, ArrayRecord | MetricRecord | ConfigRecord]:
    """Records of the update as it leaves this client.

    Where clients are the unit it is clipped as a whole; under secure aggregation it also carries
    this client's noise, and a mask.

    Parameters
    ----------
    values : int
        Values of the whole adapter.
    rounding : numpy.random.Generator
        For the wire's own rounding.

    Raises
    ------
    BudgetExhausted
        If the run has taken as many masked updates as its noise is calibrated for.
    ProtocolError
        If the message is not of an honest run.
    """
    if settings.privacy.mode not in SUM_MODES:
        return {**update_records(message, context.state, update, rounding)}
    if settings.privacy.mode not in SECURE_MODES:
        clipped = clip_update(update, settings.privacy.max_update_norm)
        update = {name: value.astype(np.float32) for name, value in clipped.items()}
        return {**update_records(message, context.state, update, rounding)}
    noise_plan = DistributedPlan.for_run(
        settings.privacy, rounds=settings.strategy.num_rounds, values=values
    )
    record = message.content.get(SECURE_KEY)
    if not isinstance(record, ConfigRecord) or record.get("scale") != noise_plan.scale:
        raise ProtocolError(f"the server does not sum in units of 1 / {noise_plan.scale:g}")
    _charge_round(context.state, noise_plan.rounds)
    mechanism = DistributedMechanism(
        noise_plan, insecure_test_seed=settings.privacy.insecure_test_seed
    )
    flat = np.concatenate([update[name].ravel().astype(np.float64) for name in sorted(update)])
    client = int(context.node_config.get("partition-id", context.node_id))
    vector = mechanism.encode(flat, plan.server_round, client)
    records = masked_records(message, context.state, context.node_id, _limits(settings), vector)
    held = context.state.config_records[WIRE_KEY]
    wire = ConfigRecord({"version": held["version"], "rank": held["rank"]})
    return {**records, WIRE_KEY: wire}


def _limits(settings: Settings) -> MaskLimits:
    privacy = settings.privacy
    return MaskLimits(privacy.least_clients, privacy.registered_clients)


def _charge_round(state: RecordDict, most: int) -> None:
    """Count a round before its update is masked; never given back."""
    kept = state.config_records.get(_ROUNDS_STATE)
    spent = 0 if kept is None else int(kept["rounds"])  # type: ignore[arg-type]
    if spent >= most:
        raise BudgetExhausted(f"{spent} of {most} rounds are spent, one more was asked for")
    state[_ROUNDS_STATE] = ConfigRecord({"rounds": spent + 1})
