"""What a train message's reply says, for the tests of this room."""

from __future__ import annotations

import numpy as np
from flwr.app import Context, Message

from federation.messages import ClientFailure
from tests.federation.tiny import TRAIN_RECORDS

CANARY = "patient-4711-hiv-positive"
RECORDS = TRAIN_RECORDS // 3


def update_of(reply: Message) -> dict[str, np.ndarray]:
    assert reply.has_content(), reply.error
    return {name: array.numpy() for name, array in reply.content["arrays"].items()}


def same(one: Message, two: Message) -> bool:
    first, second = update_of(one), update_of(two)
    return list(first) == list(second) and all(
        first[name].tobytes() == second[name].tobytes() for name in first
    )


def failure_of(reply: Message) -> ClientFailure:
    """The failure whose fixed code and text the reply is; it holds nothing else."""
    assert reply.has_error() and not reply.has_content(), "the reply is no failure"
    failure = ClientFailure(reply.error.code)
    assert reply.error.reason == failure.to_error().reason
    return failure


def charged(context: Context) -> int:
    record = context.state.config_records.get("budget")
    return 0 if record is None else record["steps"]


def fail_with(error: Exception):
    def function(*_args, **_kwargs):
        raise error

    return function
