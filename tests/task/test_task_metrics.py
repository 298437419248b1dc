"""Evaluation: right numbers, whatever the batch size, and the mode is given back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from task.data.images import array_inputs
from task.data.records import Records
from task.metrics import evaluate
from task.model import build_task_model


@pytest.fixture
def built(settings_of, lora):
    built = build_task_model(settings_of("vit"), lora, 3, seed=5)
    generator = torch.Generator().manual_seed(1)
    built.load_adapter_state(
        {n: torch.randn(t.shape, generator=generator) for n, t in built.adapter_state().items()}
    )
    return built


@pytest.fixture
def records(built):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (23, 16, 16), dtype=np.uint8)
    inputs = array_inputs(pixels, built.encoder, "made up")
    return Records(inputs, generator.integers(0, 3, 23))


@pytest.mark.parametrize("training", [True, False])
def test_evaluate(training, built, records):
    built.model.train(training)
    built.model.base_model.eval()
    modes = [module.training for module in built.model.modules()]
    got = evaluate(built, records, batch_size=5)
    assert modes == [module.training for module in built.model.modules()]
    assert set(got) == {"accuracy", "loss", "num-examples"}
    batch = records.batch(range(23))
    logits = built.logits(batch)
    assert got["num-examples"] == 23
    assert got["accuracy"] == (logits.argmax(1) == batch["labels"]).float().mean()
    assert got["loss"] == pytest.approx(F.cross_entropy(logits, batch["labels"]).item(), rel=1e-5)
    assert evaluate(built, records, device="cpu") == pytest.approx(got, rel=1e-5)


def test_nothing_to_evaluate_on(built, records):
    with pytest.raises(ValueError, match="no records"):
        evaluate(built, records.subset([]))
