"""The plan: one truth for sampler, normaliser, clipping, noise and accountant."""

from __future__ import annotations

import dataclasses
import math

import pytest
from dp_accounting import (
    GaussianDpEvent,
    NeighboringRelation,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.pld import PLDAccountant
from pydantic import ValidationError

from privacy import (
    AccountingError,
    PoissonSampler,
    PrivacyPlan,
    PrivacySettings,
    SecureSource,
    pld_epsilon,
)


def plan_of(**changes):
    numbers = {
        "sample_rate": 0.2,
        "expected_batch_size": 20.0,
        "max_grad_norm": 1.0,
        "noise_multiplier": 2.0,
        "steps": 200,
        "target_delta": 1e-5,
    }
    return PrivacyPlan(**{**numbers, **changes})


def test_a_common_rate_gives_every_client_the_same_noise():
    wishes = PrivacySettings(sample_rate=0.2)
    plans = [PrivacyPlan.for_client(wishes, num_records=n, steps=40) for n in (50, 700)]
    assert plans[0].noise_multiplier == plans[1].noise_multiplier
    assert [plan.expected_batch_size for plan in plans] == [10, 140]


def test_a_common_batch_is_capped_at_everybody():
    wishes = PrivacySettings(expected_batch_size=32)
    small = PrivacyPlan.for_client(wishes, num_records=20, steps=10)
    large = PrivacyPlan.for_client(wishes, num_records=320, steps=10)
    assert (small.sample_rate, small.expected_batch_size) == (1.0, 20)
    assert (large.sample_rate, large.expected_batch_size) == (0.1, 32)
    assert small.noise_multiplier > large.noise_multiplier


def test_the_rate_accounted_is_the_rate_sampled():
    """Mistake: accounting 1 / int(n / b), or normalising by int(n q)."""
    plan = PrivacyPlan.for_client(
        PrivacySettings(expected_batch_size=32), num_records=100, steps=10
    )
    assert plan.sample_rate == 0.32
    assert plan.expected_batch_size == pytest.approx(32)
    expected = pld_epsilon(
        sample_rate=0.32, noise_multiplier=plan.noise_multiplier, steps=10, delta=1e-5
    )
    assert plan.epsilon() == expected
    with pytest.raises(ValueError, match="expected batch"):
        PoissonSampler(plan, 101, SecureSource())


def test_epsilon_is_of_all_rounds_not_of_one():
    plan = PrivacyPlan.for_client(PrivacySettings(sample_rate=0.2), num_records=100, steps=200)
    assert plan.epsilon(10) < 0.5 * plan.epsilon()
    assert 7.9 < plan.epsilon() <= 8.0
    assert plan.checked_epsilon() == plan.epsilon()


def test_own_clip_norms_by_factor():
    plan = plan_of(max_grad_norm_a=0.5, max_grad_norm_b=2.0)
    assert [plan.clip_norm(kind) for kind in ("A", "B", "mixed")] == [0.5, 2.0, 1.0]
    assert [plan.noise_std(kind) for kind in ("A", "B", "mixed")] == [1.0, 4.0, 2.0]


def test_without_privacy_nothing_is_claimed():
    plan = PrivacyPlan.for_client(
        PrivacySettings(sample_rate=0.2, mode="none"), num_records=100, steps=10
    )
    assert not plan.is_private
    assert plan.noise_std("B") == 0
    assert math.isinf(plan.clip_norm("B"))
    assert math.isinf(plan.epsilon())
    assert math.isinf(plan.checked_epsilon())


def test_a_delta_that_allows_publishing_a_record_is_refused():
    wishes = PrivacySettings(sample_rate=0.2, target_delta=1e-2)
    with pytest.raises(AccountingError, match="target-delta must be below"):
        PrivacyPlan.for_client(wishes, num_records=100, steps=10)


def test_a_plan_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan_of().noise_multiplier = 0.1  # type: ignore[misc]


@pytest.mark.parametrize(
    "wrong",
    [
        {"sample_rate": 0.0},
        {"expected_batch_size": 0.0},
        {"steps": 0},
        {"target_delta": 1.0},
        {"max_grad_norm": 0.0},
        {"noise_multiplier": -1.0},
        {"max_grad_norm": math.inf},
    ],
)
def test_impossible_plans_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must be|finite"):
        plan_of(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [{}, {"sample_rate": 0.1, "expected_batch_size": 8}, {"sample_rate": 0.1, "target_epsilon": 0}],
)
def test_settings_refuse_contradictions(wrong):
    with pytest.raises(ValidationError):
        PrivacySettings(**wrong)


WITH_EVALUATIONS = PrivacySettings(sample_rate=0.2, evaluation_noise_multiplier=20.0)


def test_evaluations_are_paid_for_by_the_target(monkeypatch):
    plan = PrivacyPlan.for_client(WITH_EVALUATIONS, num_records=100, steps=40, rounds=10)
    without = PrivacyPlan.for_client(
        PrivacySettings(sample_rate=0.2), num_records=100, steps=40, rounds=10
    )
    assert (plan.evaluations, without.evaluations) == (10, 0)
    assert plan.noise_multiplier > without.noise_multiplier
    assert 7.9 < plan.epsilon() <= 8.0
    assert plan.epsilon(40, 0) < plan.epsilon(40, 5) < plan.epsilon()
    assert plan.checked_epsilon() == plan.epsilon()


def test_what_evaluations_cost_agrees_with_dp_accountings_own_composition():
    plan = PrivacyPlan.for_client(WITH_EVALUATIONS, num_records=100, steps=40, rounds=10)
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    step = PoissonSampledDpEvent(plan.sample_rate, GaussianDpEvent(plan.noise_multiplier))
    accountant.compose(SelfComposedDpEvent(step, 40))
    accountant.compose(SelfComposedDpEvent(GaussianDpEvent(20.0), 10))
    assert plan.epsilon() == pytest.approx(accountant.get_epsilon(1e-5), rel=0.005)


def test_a_budget_that_evaluations_use_up_is_refused():
    wishes = PrivacySettings(sample_rate=0.2, evaluation_noise_multiplier=0.5, target_epsilon=1.0)
    with pytest.raises(AccountingError, match="does not even pay"):
        PrivacyPlan.for_client(wishes, num_records=100, steps=40, rounds=10)
    # Without rounds to evaluate in there is nothing to pay for.
    assert PrivacyPlan.for_client(wishes, num_records=100, steps=40).evaluations == 0


@pytest.mark.parametrize("numbers", [(1, 0.0), (0, 1.0), (-1, 1.0)])
def test_evaluations_without_noise_are_no_plan(numbers):
    with pytest.raises(ValueError, match="evaluations need noise"):
        plan_of(evaluations=numbers[0], evaluation_noise_multiplier=numbers[1])
