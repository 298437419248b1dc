"""Plans, requests and records that are cheap to make, for tests of the ledger."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from privacy import BudgetLimit, Ledger, PrivacyPlan, Request

PLAN = PrivacyPlan(
    sample_rate=0.1,
    expected_batch_size=10.0,
    max_grad_norm=1.0,
    noise_multiplier=2.0,
    steps=20,
    target_delta=1e-6,
)
WIDE = {"a": BudgetLimit(1e6, 1e-5), "b": BudgetLimit(1e6, 1e-5)}


def digests(*names: object) -> list[bytes]:
    return [hashlib.sha256(str(name).encode()).digest() for name in names]


def new_ledger(folder: Path) -> Ledger:
    return Ledger.create(folder / "ledger", folder / "second" / "head.json")


def admit(ledger: Ledger, dataset: str, *names: object, stamp: str = "") -> str:
    """Show records to the ledger; the stamp tells them apart unless one is given."""
    return ledger.admit(dataset, stamp or repr(names), lambda: digests(*names))


def request(
    records: str,
    dataset: str = "a",
    *,
    training: str = "training",
    server_round: int = 1,
    inputs: str = "inputs",
    steps: int = 2,
    secure: bool = True,
    **plan: Any,
) -> Request:
    return Request(
        dataset=dataset,
        training=training,
        server_round=server_round,
        inputs=inputs,
        plan=dataclasses.replace(PLAN, **plan),
        secure_noise=secure,
        steps=steps,
        records=records,
    )


def steps_of(ledger: Ledger) -> int:
    """All steps that the ledger ever charged."""
    return sum(plan.steps for plan in ledger.book().plans.values())
