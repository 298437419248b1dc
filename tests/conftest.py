"""What all tests share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _inside_a_run() -> None:
    """Flower's messages can be made inside a run only; this internal class says that we are."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
