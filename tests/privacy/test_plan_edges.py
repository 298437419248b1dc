"""The plan's and the budget's edges."""

from __future__ import annotations

import math

import pytest
import torch

from privacy import (
    BudgetExhausted,
    PrivacyPlan,
    PrivacySettings,
    PrivateGradient,
    SecureSource,
)
from privacy import plan as plan_module


def plan_of(**changes) -> PrivacyPlan:
    numbers = {
        "sample_rate": 0.2, "expected_batch_size": 20.0, "max_grad_norm": 1.0,
        "noise_multiplier": 2.0, "steps": 25, "target_delta": 1e-5,
    }  # fmt: skip
    return PrivacyPlan(**{**numbers, **changes})


class Zeros:
    """An engine whose clipped sums are zero."""

    def clipped_sum(self, active, losses, records, max_grad_norm):
        return {name: torch.zeros(2) for name in active}


@pytest.mark.parametrize(("charged", "most"), [(2, 25), (25, 2), (2, 2)])
def test_not_one_step_more_than_was_charged_or_planned(charged, most):
    """Mistakes: one step too many, or the last one refused."""
    gradient = PrivateGradient(
        plan_of(steps=most), Zeros(), 100, torch.as_tensor, SecureSource(), charged
    )
    for _ in range(2):
        assert set(gradient.step(["w"], "B")) == {"w"}
    with pytest.raises(BudgetExhausted, match="all 2 steps"):
        gradient.step(["w"], "B")
    assert gradient.steps_taken == 2


def test_a_step_that_failed_is_spent():
    class Broken(Zeros):
        def clipped_sum(self, *_):
            raise RuntimeError

    gradient = PrivateGradient(
        plan_of(sample_rate=1.0, expected_batch_size=100), Broken(), 100, torch.as_tensor,
        SecureSource(), 1,
    )  # fmt: skip
    with pytest.raises(RuntimeError):
        gradient.step(["w"], "B")
    with pytest.raises(BudgetExhausted):
        gradient.step(["w"], "B")


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_grad_norm_a": math.inf},
        {"max_grad_norm_b": math.inf},
        {"max_grad_norm_a": 0.0},
        {"max_grad_norm_b": -1.0},
        {"max_grad_norm": math.nan},
        {"max_grad_norm_a": math.nan},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"expected_batch_size": math.nan},
        {"expected_batch_size": math.inf},
        {"sample_rate": math.nan},
        {"sample_rate": 1.0001},
        {"target_delta": math.nan},
    ],
)
def test_no_plan_has_a_step_that_nothing_bounds(wrong):
    """An own norm of infinity would leave A's steps without any clipping under the noise."""
    with pytest.raises(ValueError, match=r"must be|finite"):
        plan_of(**wrong)


@pytest.fixture
def _quick_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "calibrate_noise_multiplier", lambda **_: 1.0)


@pytest.mark.usefixtures("_quick_calibration")
def test_the_wishes_clip_norms_arrive_in_the_plan():
    """Mistake: a factor's own norm lost on the way, so that another C clips than was asked for."""
    wishes = PrivacySettings(
        sample_rate=0.2, max_grad_norm=2.0, max_grad_norm_a=0.25, max_grad_norm_b=0.5
    )
    plan = PrivacyPlan.for_client(wishes, num_records=100, steps=1)
    assert [plan.clip_norm(kind) for kind in ("A", "B", "mixed")] == [0.25, 0.5, 2.0]
    common = PrivacyPlan.for_client(
        PrivacySettings(sample_rate=0.2, max_grad_norm=2.0), num_records=100, steps=1
    )
    assert [common.clip_norm(kind) for kind in ("A", "B", "mixed")] == [2.0, 2.0, 2.0]


@pytest.mark.usefixtures("_quick_calibration")
@pytest.mark.parametrize("records", [17, 33, 101])
def test_the_normaliser_is_rate_times_records_unrounded(records):
    """Mistake: int(n q), which is neither the rate's nor constant between neighbours."""
    plan = PrivacyPlan.for_client(PrivacySettings(sample_rate=0.3), num_records=records, steps=1)
    assert plan.expected_batch_size == pytest.approx(0.3 * records, rel=1e-12)
