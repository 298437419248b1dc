"""The tiny federation's files and run config, for every room that tests with real messages."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests import models

RunConfig = dict[str, str | int | float | bool]
CLASSES = 3
TRAIN_RECORDS = 180


def make_tiny(folder: Path) -> RunConfig:
    """Write a tiny ViT and made-up images; return the run config that uses them."""
    (folder / "vit").mkdir()
    models.make_vit(folder / "vit")
    generator = np.random.default_rng(0)
    labels = np.arange(240) % CLASSES
    images = generator.integers(0, 60, (240, 16, 16), dtype=np.uint8)
    for label in range(CLASSES):  # a bright bar where the label says
        images[labels == label, 5 * label : 5 * label + 4] += 150
    data = folder / "data.npz"
    train, test = slice(0, TRAIN_RECORDS), slice(TRAIN_RECORDS, None)
    np.savez(
        data, x_train=images[train], y_train=labels[train], x_test=images[test], y_test=labels[test]
    )
    return {
        "model.source": "timm",
        "model.name": str(folder / "vit"),
        "data.source": "npz",
        "data.path": str(data),
        "data.num-labels": CLASSES,
        "data.partitioner": "iid",
        "lora.r": 2,
        "lora.lora-alpha": 2,
        "strategy.num-rounds": 2,
        "strategy.local-steps": 2,
        "privacy.sample-rate": 0.3,
        "device": "cpu",
    }


def changed(config: RunConfig, **changes: str | int | float | bool) -> RunConfig:
    """Return the config with other values: ``strategy__lr_a`` stands for ``strategy.lr-a``."""
    kebab = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    return {**config, **kebab}
