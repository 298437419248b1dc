"""A whole federation in this process: a tiny ViT, made-up images, a fake grid."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from client_app.round_handler import handle_train
from client_app.session import forget
from federation.run_files import RunFolder
from federation.settings import Settings
from server_app.federation_run import run_federation
from task.data import simulation_cache
from tests.fake_grid import FakeGrid
from tests.federation.tiny import RunConfig, changed, make_tiny

Federate = Callable[..., tuple[RunFolder, FakeGrid]]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Give the run config of a federation that trains in a second."""
    return make_tiny(tmp_path_factory.mktemp("federation"))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Give the folder in which :func:`federate` keeps its runs."""
    return tmp_path / "runs"


@pytest.fixture
def federate(tiny: RunConfig, runs: Path) -> Federate:
    """Run a federation; ``handlers`` replaces the three honest clients, ``grid_type`` the grid."""
    simulation_cache.clear()
    forget()
    ids = itertools.count(7)

    def run(handlers=None, *, grid_type=FakeGrid, run_id: int | None = None, **changes):
        config = changed({**tiny, "output-dir": str(runs)}, **changes)
        grid = grid_type(handlers or [handle_train] * 3, config)
        run_id = next(ids) if run_id is None else run_id
        for context in grid.contexts:
            context.run_id = run_id
        return run_federation(grid, Settings.from_run_config(config), run_id=run_id), grid

    return run
