"""Noise in shares for single records: what Poisson sampling makes of a concentrated mechanism."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import rdp_privacy_accountant as rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError
from scipy.special import logsumexp

from privacy import (
    AccountingError,
    DistributedMechanism,
    DistributedPlan,
    PrivacyPlan,
    PrivacySettings,
    SeededTestSource,
    concentrated_epsilon,
    sampled_rdp,
)
from privacy.zcdp import largest_ratio

WISHES = {
    "mode": "record-distributed", "registered_clients": 20, "least_clients": 15,
    "colluding_clients": 2, "registered_records": 5000, "sample_rate": 0.05, "max_grad_norm": 0.7,
    "target_epsilon": 3.0,
}  # fmt: skip


@pytest.mark.parametrize("order", [2, 3, 8, 40])
@pytest.mark.parametrize(("q", "sigma"), [(0.01, 0.8), (0.2, 2.0), (0.5, 10.0), (1.0, 3.0)])
def test_the_sampled_divergence_is_that_of_googles_accountant_for_the_gaussian(order, q, sigma):
    """The continuous Gaussian's divergences meet the concentrated bound, so both must agree."""
    accountant = rdp.RdpAccountant([order])
    accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)))
    assert sampled_rdp(1 / sigma, q, order) == pytest.approx(accountant._rdp[0], rel=1e-6)


@pytest.mark.parametrize(("q", "sigma", "shift"), [(0.1, 2.0, 1), (0.3, 3.0, 4), (0.7, 1.0, 1)])
@pytest.mark.parametrize("order", [2, 5, 12])
def test_the_bound_holds_in_both_directions_for_the_discrete_gaussian(q, sigma, shift, order):
    """Divergences summed up over the whole numbers, by definition."""
    x = np.arange(-400.0, 401.0)
    without, with_it = -(x**2) / (2 * sigma**2), -((x - shift) ** 2) / (2 * sigma**2)
    without, with_it = without - logsumexp(without), with_it - logsumexp(with_it)
    mixed = np.logaddexp(math.log1p(-q) + without, math.log(q) + with_it)
    bound = sampled_rdp(shift / sigma, q, order)
    divergences = [
        float(logsumexp(order * one + (1 - order) * other)) / (order - 1)
        for one, other in ((mixed, without), (without, mixed))
    ]
    assert 0 < divergences[1] <= divergences[0] <= bound * (1 + 1e-9)


@pytest.mark.parametrize(("q", "sigma", "rounds"), [(0.05, 1.0, 200), (0.2, 4.0, 50)])
def test_epsilon_is_above_the_exact_one_and_near_it(q, sigma, rounds):
    accountant = PLDAccountant()
    event = PoissonSampledDpEvent(q, GaussianDpEvent(sigma))
    accountant.compose(SelfComposedDpEvent(event, rounds))
    exact = accountant.get_epsilon(1e-5)
    bound = concentrated_epsilon(1 / sigma, q, rounds, 1e-5)
    assert exact <= bound <= 1.2 * exact


def test_sampling_never_costs_more_and_no_round_costs_nothing():
    for q in (0.001, 0.5, 0.999):
        assert concentrated_epsilon(0.5, q, 10, 1e-5) <= concentrated_epsilon(0.5, 1.0, 10, 1e-5)
    assert concentrated_epsilon(0.5, 0.5, 0, 1e-5) == 0.0


def test_the_ratio_that_a_budget_allows_meets_it():
    for q in (0.02, 1.0):
        ratio = largest_ratio(2.0, 1e-5, q, 100)
        assert 0.999 * 2.0 < concentrated_epsilon(ratio, q, 100, 1e-5) <= 2.0
    with pytest.raises(AccountingError, match="cannot be reached"):
        largest_ratio(1e-9, 1e-5, 1.0, 10**9)


def test_a_runs_plan_meets_its_budget_and_divides_by_what_is_public():
    plan = DistributedPlan.for_run(PrivacySettings(**WISHES), rounds=100, values=60_000)
    assert plan.unit == "record" and plan.clip_norm == 0.7 and plan.sample_rate == 0.05
    assert plan.denominator == pytest.approx(250.0)
    assert 0.999 * 3.0 < plan.epsilon() <= 3.0
    # By hand: the ratio from the shares of honest clients in the smallest sum.
    ratio = (0.7 * (1 + 1e-3) * plan.scale + math.sqrt(60_000)) / (math.sqrt(13) * plan.sigma)
    accountant = rdp.RdpAccountant(list(range(2, 400)))
    accountant.compose(
        SelfComposedDpEvent(PoissonSampledDpEvent(0.05, GaussianDpEvent(1 / ratio)), 100)
    )
    assert plan.epsilon() == pytest.approx(accountant.get_epsilon(1e-5), rel=0.01)


def test_a_batch_far_above_its_mean_still_fits():
    """Room for 2^-40: by simulation, no batch of 200,000 comes near (fixed seed)."""
    plan = DistributedPlan.for_run(PrivacySettings(**WISHES), rounds=100, values=1000)
    batches = np.random.default_rng(0).binomial(5000, 0.05, 200_000)
    assert 250 < batches.max() < plan.contributions < 450


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(np.float64, 12, elements=st.floats(-50, 50)),
    hnp.arrays(np.float64, 12, elements=st.floats(-1, 1)),
    st.sampled_from([1.0, 2.0**7, 2.0**20]),
    st.integers(0, 2**31),
)
def test_one_record_moves_the_rounded_sum_by_the_sensitivity_at_most(others, record, scale, seed):
    """The same rounding coins with and without it, as in the proof."""
    plan = DistributedPlan.for_run(PrivacySettings(**WISHES), rounds=10, values=12)
    plan = dataclasses.replace(plan, scale=scale, sigma=10)
    norm = np.linalg.norm(record)
    record = record * min(1.0, plan.clip_norm / norm) if norm else record
    mechanism = DistributedMechanism(plan)
    one, two = (
        mechanism.rounded(total, SeededTestSource((seed,))) for total in (others, others + record)
    )
    # floor(x + u) and floor(x) + (u < frac x) round alike with u turned round: 1 - u.
    assert np.linalg.norm((two - one).astype(np.float64)) <= plan.sensitivity


def test_sums_of_clipped_gradients_are_not_clipped_again():
    plan = DistributedPlan.for_run(PrivacySettings(**WISHES), rounds=10, values=3)
    long = np.array([30.0, -40.0, 0.0])
    rounded = DistributedMechanism(plan).rounded(long, SeededTestSource((1,)))
    np.testing.assert_allclose(rounded / plan.scale, long, atol=1 / plan.scale)


def test_clients_clip_their_records_and_put_no_noise_of_their_own_on_them():
    plan = PrivacyPlan.for_client(PrivacySettings(**WISHES), num_records=100, steps=10)
    assert (plan.max_grad_norm, plan.noise_multiplier, plan.is_private) == (0.7, 0.0, False)
    assert plan.expected_batch_size == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"registered_records": 0}, ["privacy.registered-records", "above 0"]),
        ({"mode": "client-distributed", "max_update_norm": 1.0},
         ["privacy.registered-records", "'record-distributed'", "5000"]),
        ({"max_update_norm": 1.0}, ["privacy.max-update-norm", "'client'"]),
        ({"max_grad_norm_b": 0.5}, ["privacy.max-grad-norm-b", "must be 0"]),
        ({"sample_rate": 0.0, "expected_batch_size": 16}, ["privacy.expected-batch-size", "16"]),
        ({"target_delta": 1e-3}, ["privacy.target-delta", "registered-records"]),
        ({"least_clients": 0}, ["privacy.least-clients", "above 0"]),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(changes, words):
    with pytest.raises(ValidationError) as refused:
        PrivacySettings(**{**WISHES, **changes})
    assert [word for word in words if word not in str(refused.value)] == []
