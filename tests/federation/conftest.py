"""A whole federation in this process: a tiny ViT, made-up images, a fake grid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from client_app.round_handler import handle_train
from client_app.session import _session
from federation.run_files import RunFolder
from federation.settings import Settings
from server_app.federation_run import run_federation
from task.data import simulation_cache
from tests import models
from tests.fake_grid import FakeGrid

RunConfig = dict[str, str | int | float | bool]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Give the run config of a federation that trains in a second."""
    folder = tmp_path_factory.mktemp("federation")
    (folder / "vit").mkdir()
    models.make_vit(folder / "vit")
    generator = np.random.default_rng(0)
    labels = np.arange(240) % 3
    images = generator.integers(0, 60, (240, 16, 16), dtype=np.uint8)
    for label in range(3):  # a bright bar where the label says
        images[labels == label, 5 * label : 5 * label + 4] += 150
    data = folder / "data.npz"
    np.savez(data, x_train=images[:180], y_train=labels[:180], x_test=images[180:],
             y_test=labels[180:])  # fmt: skip
    return {
        "model.source": "timm",
        "model.name": str(folder / "vit"),
        "data.source": "npz",
        "data.path": str(data),
        "data.num-labels": 3,
        "data.partitioner": "iid",
        "lora.r": 2,
        "lora.lora-alpha": 2,
        "strategy.num-rounds": 2,
        "strategy.local-steps": 2,
        "privacy.sample-rate": 0.3,
        "device": "cpu",
    }


@pytest.fixture
def federate(tiny: RunConfig, tmp_path: Path) -> Callable[..., tuple[RunFolder, FakeGrid]]:
    """Run a federation; keyword ``handlers`` replaces the three honest clients."""
    simulation_cache.clear()
    _session.cache_clear()

    def run(handlers=None, *, run_id: int = 7, **changes) -> tuple[RunFolder, FakeGrid]:
        config = {**tiny, "output-dir": str(tmp_path / "runs")}
        config.update({key.replace("__", ".").replace("_", "-"): v for key, v in changes.items()})
        grid = FakeGrid(handlers or [handle_train] * 3, config)
        return run_federation(grid, Settings.from_run_config(config), run_id=run_id), grid

    return run
