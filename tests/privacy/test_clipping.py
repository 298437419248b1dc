"""Joint clipping: the bound, for any record whatsoever."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from privacy import clip_and_sum, joint_norms

ROUNDING = 1e-5


def rows_of(seed: int, records: int, scale: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"adapter": (3, 4), "head.weight": (2, 5), "head.bias": (2,)}
    return {
        name: scale * torch.randn((records, *shape), generator=generator)
        for name, shape in shapes.items()
    }


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((one[n] - other[n]).double().square().sum()) for n in one))


@given(st.integers(0, 10_000), st.integers(1, 12), st.floats(1e-3, 1e4), st.floats(0.01, 10))
def test_one_record_moves_the_sum_by_at_most_the_clip_norm(seed, records, scale, norm):
    """Sensitivity over adapters and head jointly: neighbouring batches differ by one record."""
    rows = rows_of(seed, records, scale)
    without = {name: row[:-1] for name, row in rows.items()}
    moved = distance(clip_and_sum(rows, norm), clip_and_sum(without, norm))
    assert moved <= norm * (1 + ROUNDING) + 1e-6 * records * norm


def test_clips_each_record_not_the_mean():
    """Mistake: clipping the batch mean, whose sensitivity grows with the batch."""
    rows = {"w": torch.tensor([[3.0, 0.0], [0.0, 0.5]])}
    assert clip_and_sum(rows, 1.0)["w"].tolist() == [1.0, 0.5]


def test_the_norm_is_joint_over_all_tensors():
    """Mistake: one norm per tensor, sqrt(tensors) times the sensitivity."""
    rows = {"a": torch.tensor([[3.0]]), "b": torch.tensor([[4.0]])}
    assert joint_norms(rows).tolist() == [5.0]
    clipped = clip_and_sum(rows, 1.0)
    assert clipped["a"].item() == pytest.approx(0.6)
    assert clipped["b"].item() == pytest.approx(0.8)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_a_non_finite_record_contributes_exactly_zero(poison):
    rows = rows_of(1, 4, 1.0)
    clean = {name: row[[0, 1, 3]] for name, row in rows.items()}
    rows["adapter"][2, 0, 0] = poison
    got = clip_and_sum(rows, 1.0)
    assert all(torch.isfinite(value).all() for value in got.values())
    assert distance(got, clip_and_sum(clean, 1.0)) < 1e-6


def test_a_zero_gradient_is_no_division_by_zero():
    got = clip_and_sum({"w": torch.zeros(2, 3)}, 1.0)
    assert got["w"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("norm", [math.inf, 1e6])
def test_a_wide_norm_just_adds_up(norm):
    rows = rows_of(2, 5, 1.0)
    assert distance(clip_and_sum(rows, norm), {n: r.sum(0) for n, r in rows.items()}) < 1e-5
