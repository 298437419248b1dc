"""Batches in parts: the same sum, sampling and noise as the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from privacy import FusedEngine, PrivacyPlan, PrivateGradient, SeededTestSource, clip_and_sum
from privacy.virtual_batches import clipped_sum_in_parts
from tests.privacy.test_hook_engine import active_names, relative_error, rows_of


class RowEngine:
    """An engine whose records' gradients are their numbers; remembers the parts it saw."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self.parts: list[list[int]] = []

    def clipped_sum(self, active, losses, num_records, max_grad_norm):
        chosen = losses() if num_records else torch.zeros(0, dtype=torch.int64)
        self.parts.append(chosen.tolist())
        rows = self.rows[chosen]
        if not num_records:
            return {"w": torch.zeros_like(self.rows[0])}
        return clip_and_sum({"w": rows}, max_grad_norm)


@given(st.integers(0, 40), st.integers(0, 12), st.integers(0, 1000))
def test_parts_hold_every_record_once_and_give_the_same_sum(drawn, most, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(50, 3, generator=generator)
    indices = np.sort(np.random.default_rng(seed).choice(50, drawn, replace=False))
    engine, whole = RowEngine(rows), RowEngine(rows)
    got = clipped_sum_in_parts(engine, ["w"], torch.as_tensor, indices, 1.0, most)
    expected = clipped_sum_in_parts(whole, ["w"], torch.as_tensor, indices, 1.0, 0)
    assert [i for part in engine.parts for i in part] == indices.tolist()
    assert len(whole.parts) == 1
    sizes = [len(part) for part in engine.parts]
    assert max(sizes) <= (most or drawn) and max(sizes) - min(sizes) <= 1
    assert torch.allclose(got["w"], expected["w"], atol=1e-5)


def test_a_record_in_a_part_is_clipped_by_its_own_norm():
    """Mistake: clipping each part's sum, or each part to its share of C."""
    engine = RowEngine(torch.tensor([[3.0], [5.0], [0.5], [4.0]]))
    got = clipped_sum_in_parts(engine, ["w"], torch.as_tensor, np.arange(4), 1.0, 2)
    assert got["w"].item() == pytest.approx(3.5)


def test_a_limit_below_zero_is_refused():
    engine = RowEngine(torch.ones(2, 1))
    with pytest.raises(ValueError, match="max_physical_batch_size must be 0 or more, got -1"):
        clipped_sum_in_parts(engine, ["w"], torch.as_tensor, np.arange(2), 1.0, -1)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_step_in_parts_draws_and_releases_what_the_whole_does(rate):
    """Same coins, same noise, one step counted, an empty batch included."""
    rows = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    plan = PrivacyPlan(
        sample_rate=rate or 1e-9,
        expected_batch_size=20 * (rate or 1e-9),
        max_grad_norm=1.0,
        noise_multiplier=1.0,
        steps=3,
        target_delta=1e-5,
    )
    released = {}
    for most in (0, 3):
        engine = RowEngine(rows)
        step = PrivateGradient(plan, engine, 20, torch.as_tensor, SeededTestSource((1,)), 3, most)
        released[most] = step.step(["w"], "B")["w"]
        assert step.steps_taken == 1
        assert (len(engine.parts) > 1) == (rate > 0 and most > 0)
        assert all(len(part) <= (most or 20) for part in engine.parts)
    assert torch.allclose(released[0], released[3], rtol=1e-5)


@pytest.mark.parametrize("kind", ["swin", "bert"])
def test_parts_agree_on_a_model(model_of, kind):
    task_model = model_of(kind)
    engine = FusedEngine(task_model.model, task_model.adapter)
    batch = task_model.made_up_batch(7)
    active = active_names(task_model, "B+head")

    def losses(indices):
        return task_model.per_record_losses(rows_of(batch, indices))

    whole = clipped_sum_in_parts(engine, active, losses, np.arange(7), 0.1, 0)
    parts = clipped_sum_in_parts(engine, active, losses, np.arange(7), 0.1, 3)
    assert relative_error(parts, whole) < 1e-5
