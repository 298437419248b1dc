"""For somebody else's ClientApp: a mod that speaks the wire, and a helper that freezes factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType

from .base import ROUND_PLAN_KEY
from .node_state import (
    WIRE_KEY,
    NeedFull,
    ask_for_everything,
    held_arrays,
    receive_adapter,
    update_records,
)
from .round_plan import RoundPlan
from .tensor_names import kind_of

if TYPE_CHECKING:
    from torch import nn

ARRAYS_KEY = "arrays"


def active_factors(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Let a ClientApp that knows nothing of active factors work with these strategies.

    A mod: ``ClientApp(mods=[active_factors])``.  On the way in it completes ``arrays`` to the
    whole adapter, from what this node holds and what the server sent.  On the way out it takes
    the app's ``arrays``, the adapter's values after training, and leaves the change of exactly
    the tensors that are active this round.  Other records, and messages that are not for training,
    pass as they are.

    Notes
    -----
    Adds no noise: without a private training step the federation is not private, and the server
    says so.  What the app does to factors that are not active is dropped; :func:`freeze_inactive`
    keeps it from doing anything to them.

    Raises
    ------
    ValueError
        If the app returns no ``arrays``, or lacks a tensor that was active.
    """
    if message.metadata.message_type != MessageType.TRAIN:
        return call_next(message, context)
    wire = message.content.get(WIRE_KEY)
    if isinstance(wire, ConfigRecord) and wire.get("rank", 0) != 0:
        raise ValueError("flex-lora has ranks by client, which this mod knows nothing of")
    try:
        before = receive_adapter(message, context.state)
    except NeedFull:
        return Message(content=ask_for_everything(context.state), reply_to=message)
    if any(kind_of(name) == "fold" for name in before):
        raise ValueError(
            "the server folds terms into the frozen weights (fedex-lora, flora), which this mod "
            "cannot do to your model; take another strategy"
        )
    plan = round_plan(message)
    message.content[ARRAYS_KEY] = ArrayRecord(dict(held_arrays(context.state)))
    reply = call_next(message, context)
    if reply.has_error():
        return reply
    after = reply.content.get(ARRAYS_KEY)
    active = plan.uploaded(before)
    if not isinstance(after, ArrayRecord) or not set(active) <= set(after):
        lost = [name for name in active if not isinstance(after, ArrayRecord) or name not in after]
        raise ValueError(
            f"the app's reply must have the trained adapter under {ARRAYS_KEY!r}, by the names "
            f"that it was sent; missing: {', '.join(lost[:3])}"
        )
    update = _change(before, after, active)
    rng = np.random.default_rng((plan.server_round, context.node_id))
    for key, record in update_records(message, context.state, update, rng).items():
        reply.content[key] = record
    return reply


def freeze_inactive(model: nn.Module, message: Message) -> list[str]:
    """Let exactly the round's active adapter tensors require gradients, and nothing else change.

    Call it before your own training loop; make the optimizer of parameters that require one.

    Parameters
    ----------
    model : torch.nn.Module
        A PEFT model with the adapter ``default``.
    message : Message
        The train message.

    Returns
    -------
    list of str
        Names, as PEFT saves them, of the tensors that will train.

    Notes
    -----
    A plan that alternates within the round (LA-LoRA) leaves both factors trainable: your loop
    takes its steps itself, and would have to ask the plan before each.

    Raises
    ------
    ValueError
        If the message has no round plan, or the model has none of the tensors to train.
    """
    plan = round_plan(message)
    adapter = message.content.array_records.get(ARRAYS_KEY, ArrayRecord())
    parameters = {_saved_name(name): value for name, value in model.named_parameters()}
    ours = [name for name in parameters if name in adapter]
    active = set(plan.uploaded(ours))
    if not active:
        raise ValueError("the model has none of the adapter tensors that this round trains")
    for name in ours:
        parameters[name].requires_grad_(name in active)
    return [name for name in ours if name in active]


def round_plan(message: Message) -> RoundPlan:
    """Read the plan that a train message carries.

    Raises
    ------
    ValueError
        If it carries none, or one of another version of this library.
    """
    record = message.content.config_records.get(ROUND_PLAN_KEY)
    if record is None:
        raise ValueError(
            f"the message has no {ROUND_PLAN_KEY!r}: it is not from a strategy of this library"
        )
    return RoundPlan.from_record(record)


def _change(
    before: Mapping[str, npt.NDArray[np.float32]], after: ArrayRecord, active: tuple[str, ...]
) -> dict[str, npt.NDArray[np.float32]]:
    update = {}
    for name in active:
        value = after[name].numpy()
        if value.shape != before[name].shape:
            raise ValueError(
                f"the app's {name} has shape {value.shape}, it was sent {before[name].shape}"
            )
        update[name] = value.astype(np.float32) - before[name]
    return update


def _saved_name(name: str) -> str:
    """Name under which PEFT saves a live parameter of the adapter ``default``."""
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")
