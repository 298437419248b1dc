"""What a train message's reply says, for the tests of this room."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from flwr.app import Context, Message

from federation.messages import ClientFailure
from privacy import Ledger, LedgerError
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


def ledger_of(context: Context) -> Ledger:
    """The ledger of a simulated client whose run has no folder of its own."""
    ledgers = Path(context.run_config["output-dir"]) / "ledgers" / str(context.run_id)
    name = f"client-{context.node_config['partition-id']}"
    return Ledger(ledgers / name, ledgers / "heads" / f"{name}.json")


def charged(context: Context) -> int:
    """All steps that its ledger was ever charged; 0 where no ledger was made."""
    if "partition-id" not in context.node_config:
        return 0
    try:
        plans = ledger_of(context).book().plans.values()
    except LedgerError as error:
        if "there is none" in str(error):
            return 0
        raise
    return sum(plan.steps for plan in plans)


def fail_with(error: Exception):
    def function(*_args, **_kwargs):
        raise error

    return function
