"""What all tests share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

_NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def _inside_a_run() -> None:
    """Flower's messages can be made inside a run only; this internal class says that we are."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


@pytest.fixture(scope="session", autouse=True)
def _calibrations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep calibrations of all processes that tests start away from the user's own.

    The backbone's cache stays where it is: pretraining takes a minute.
    """
    folder = tmp_path_factory.mktemp("calibrations")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWER_DP_LORA_CALIBRATIONS", str(folder / "shared"))
        yield folder


@pytest.fixture(autouse=True)
def _no_kept_calibration(_calibrations: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin each test without a kept calibration; some calibrate with accountants of their own."""
    folder = _calibrations / str(next(_NUMBERS))
    monkeypatch.setenv("FLOWER_DP_LORA_CALIBRATIONS", str(folder))
