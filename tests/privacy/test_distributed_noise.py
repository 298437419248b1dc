"""Distributed noise: rounding, shares, sums modulo 2^32, and what they cost."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import rdp_privacy_accountant as rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError
from scipy import stats

from privacy import (
    AccountingError,
    DistributedMechanism,
    DistributedPlan,
    PrivacySettings,
    SeededTestSource,
    zcdp_epsilon,
)

PLAN = DistributedPlan(
    unit="client",
    clip_norm=0.5,
    values=1000,
    sample_rate=1.0,
    client_rate=0.5,
    denominator=10.0,
    contributions=20.0,
    registered_clients=20,
    least_clients=8,
    colluding_clients=3,
    scale=2.0**16,
    sigma=40_000,
    rounds=10,
    target_delta=1e-5,
)
WISHES = {
    "mode": "client-distributed", "max_update_norm": 1.0, "registered_clients": 60,
    "least_clients": 40, "colluding_clients": 5, "sample_rate": 0.2, "target_epsilon": 4.0,
}  # fmt: skip


# Rounding.


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(np.float64, st.integers(1, 50), elements=st.floats(-1e6, 1e6)),
    st.sampled_from([2.0**-2, 1.0, 2.0**5, 2.0**20]),
    st.integers(0, 2**31),
)
def test_a_rounded_update_is_never_longer_than_the_sensitivity(update, scale, seed):
    plan = dataclasses.replace(PLAN, scale=scale, values=update.size)
    rounded = DistributedMechanism(plan).rounded(update, SeededTestSource((seed,)))
    length = math.sqrt(sum(int(v) ** 2 for v in rounded))
    assert length <= plan.sensitivity
    norm = np.linalg.norm(update)
    exact = update * scale * min(1.0, plan.clip_norm / norm if norm else 1.0)
    assert np.abs(rounded - exact).max() < 1 + 1e-6


def test_rounding_is_unbiased():
    """40,000 roundings of each value; within 4.5 standard errors (fixed seed)."""
    update = np.array([0.1, -0.1, 1 / 3, 0.25, -0.49, 0.0])
    plan = dataclasses.replace(PLAN, scale=1.0, clip_norm=2.0, values=6)
    mechanism, source = DistributedMechanism(plan), SeededTestSource((1,))
    draws = np.array([mechanism.rounded(update, source) for _ in range(40_000)])
    error = np.abs(draws.mean(axis=0) - update)
    assert (error <= 4.5 * draws.std(axis=0) / 200).all()
    assert set(np.unique(draws)) == {-1, 0, 1} and not draws[:, 5].any()


# Sums.


def test_the_sum_of_shares_has_the_noise_of_as_many_shares():
    """Chi-square on 20,000 values; false alarms: 1 in 1,000 (fixed seed)."""
    plan = dataclasses.replace(PLAN, values=20_000)
    mechanism = DistributedMechanism(plan, insecure_test_seed=3)
    total = np.zeros(20_000, np.uint32)
    for client in range(9):
        total += mechanism.encode(np.zeros(20_000), 1, client)
    mean = mechanism.decode(total, 9)
    assert mechanism.noise_std == pytest.approx(3 * 40_000 / 2**16 / 10)
    low, high = stats.chi2.ppf([5e-4, 1 - 5e-4], 20_000)
    assert low < np.square(mean / mechanism.noise_std).sum() < high


def test_a_sum_decodes_to_the_sum_of_clipped_updates_plus_noise():
    """The decoded value times the constant, against float arithmetic, with the same noise."""
    generator = np.random.default_rng(0)
    updates = [generator.standard_normal(100) * size for size in (0.001, 1.0, 100.0)]
    mechanism = DistributedMechanism(PLAN, insecure_test_seed=4)
    total, silent = np.zeros(100, np.uint32), np.zeros(100, np.uint32)
    for client, update in enumerate(updates):
        total += mechanism.encode(update, 2, client)
        silent += mechanism.encode(np.zeros(100), 2, client)
    got = mechanism.decode(total, 3) - mechanism.decode(silent, 3)
    clipped = [u * min(1.0, 0.5 / np.linalg.norm(u)) for u in updates]
    np.testing.assert_allclose(got, sum(clipped) / 10, atol=3 / 2**16 / 10)


@settings(max_examples=50, deadline=None)
@given(st.lists(hnp.arrays(np.int64, 7, elements=st.integers(-(2**27), 2**27)), max_size=15))
def test_sums_modulo_two_to_the_32_are_exact(vectors):
    words = [(v % 2**32).astype(np.uint32) for v in vectors]
    total = np.zeros(7, np.uint32)
    for one in words:
        total = total + one
    plan = dataclasses.replace(PLAN, scale=1.0, denominator=20.0)
    mean = DistributedMechanism(plan).decode(total, len(vectors))
    assert np.array_equal(np.rint(mean * 20).astype(np.int64), sum(vectors, np.zeros(7, np.int64)))


def test_the_bound_on_wrapping_holds_and_refuses_what_does_not_fit():
    assert PLAN.wrap_exponent > 40 * math.log(2)
    for changes in ({"scale": 2.0**28}, {"sigma": 2**29}, {"contributions": 2.0**20}):
        with pytest.raises(ValueError, match="do not fit into 32 bits"):
            dataclasses.replace(PLAN, **changes)
    # The tail that is used, against the real one, four deviations out.
    tail = 2 * math.exp(-(4.0**2) / 2)
    assert 2 * stats.norm.sf(4.0) < tail


# What it costs.


@pytest.mark.parametrize("rho", [1e-4, 0.01, 0.5, 5.0])
def test_zcdp_becomes_epsilon_as_googles_accountant_has_it(rho):
    orders = list(1 + np.geomspace(1e-3, 1e5, 3000))
    theirs, _ = rdp.compute_epsilon(orders, [a * rho for a in orders], 1e-5)
    assert zcdp_epsilon(rho, 1e-5) == pytest.approx(theirs, rel=1e-3)
    assert zcdp_epsilon(0.0, 1e-5) == 0.0


@pytest.mark.parametrize(("sigma", "rounds"), [(5.0, 1), (20.0, 10), (8.0, 30)])
def test_the_bound_is_above_the_exact_loss_of_one_discrete_gaussian_and_near_it(sigma, rounds):
    """One value, one share: Google's PLD of the discrete Gaussian is nearly exact."""
    exact = pld.from_discrete_gaussian_mechanism(sigma=sigma, sensitivity=3)
    epsilon = exact.self_compose(rounds).get_epsilon_for_delta(1e-5)
    bound = zcdp_epsilon(rounds * 9 / (2 * sigma**2), 1e-5)
    assert epsilon <= bound <= 1.2 * epsilon


def test_the_cost_is_that_of_the_continuous_gaussian_at_fine_units():
    plan = dataclasses.replace(PLAN, values=1)
    ratio = plan.sensitivity / (math.sqrt(5) * 40_000)
    assert plan.ratio == pytest.approx(ratio, rel=1e-9)


def test_coarse_shares_pay_for_not_adding_up_to_a_discrete_gaussian():
    coarse = dataclasses.replace(PLAN, sigma=1, scale=1.0, values=100, target_delta=1e-5)
    tau = 10 * sum(math.exp(-2 * math.pi**2 * k / (k + 1)) for k in range(1, 5))
    exact = coarse.sensitivity / math.sqrt(5) + tau * 10
    assert exact < coarse.ratio < 1.05 * exact


@pytest.mark.parametrize("values", [100, 60_000, 3_000_000])
@pytest.mark.parametrize("changes", [{}, {"target_epsilon": 0.5}, {"colluding_clients": 39}])
def test_a_runs_plan_meets_its_budget_within_32_bits(values, changes):
    plan = DistributedPlan.for_run(
        PrivacySettings(**{**WISHES, **changes}), rounds=50, values=values
    )
    target = changes.get("target_epsilon", 4.0)
    assert 0.99 * target < plan.epsilon() <= target
    assert 0 == plan.epsilon(0) < plan.epsilon(1) < plan.epsilon(49) < plan.epsilon()
    assert plan.wrap_exponent >= 40 * math.log(2)
    inflation = plan.sensitivity / (plan.clip_norm * plan.scale)
    assert 1 < inflation < 1.25
    # By hand, none of our code: all rounds' zCDP from the honest shares of the smallest sum.
    honest = 40 - changes.get("colluding_clients", 5)
    one = (plan.scale + math.sqrt(values)) / (math.sqrt(honest) * plan.sigma)
    orders = list(1 + np.geomspace(1e-3, 1e5, 3000))
    theirs, _ = rdp.compute_epsilon(orders, [50 * a * one**2 / 2 for a in orders], 1e-5)
    assert plan.epsilon() == pytest.approx(theirs, rel=2e-3)


def test_fewer_survivors_or_more_colluders_need_more_noise():
    def sigma(**changes) -> float:
        plan = DistributedPlan.for_run(
            PrivacySettings(**{**WISHES, **changes}), rounds=10, values=1000
        )
        return plan.sigma / plan.scale

    assert sigma(least_clients=20) > sigma() and sigma(colluding_clients=30) > sigma()
    assert sigma(least_clients=35, colluding_clients=0) == pytest.approx(sigma(), rel=1e-3)


def test_a_budget_that_does_not_fit_is_refused():
    wishes = {**WISHES, "target_epsilon": 1e-4, "registered_clients": 2000}
    with pytest.raises(AccountingError, match="more than 32 bits"):
        DistributedPlan.for_run(PrivacySettings(**wishes), rounds=1000, values=10_000_000)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "client", "colluding_clients": 0},
         ["privacy.least-clients", "'client-distributed'", "40"]),
        ({"mode": "none", "max_update_norm": 0.0, "registered_clients": 0},
         ["privacy.least-clients", "'client-distributed'"]),
        ({"least_clients": 1, "colluding_clients": 0}, ["privacy.least-clients", "from 2 to"]),
        ({"least_clients": 61}, ["privacy.least-clients", "60", "61"]),
        ({"colluding_clients": 40}, ["privacy.colluding-clients", "below"]),
        ({"participation": "secret"}, ["privacy.participation", "'public'"]),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(changes, words):
    with pytest.raises(ValidationError) as refused:
        PrivacySettings(**{**WISHES, **changes})
    assert [word for word in words if word not in str(refused.value)] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale": 3.0}, "power of two"), ({"sigma": 0}, "sigma"), ({"values": 0}, "values"),
        ({"colluding_clients": 8}, "colluding_clients"), ({"least_clients": 21}, "least_clients"),
        ({"clip_norm": math.inf}, "clip_norm"), ({"target_delta": 0.0}, "delta"),
        ({"sample_rate": 0.5}, "sample_rate"),
        ({"client_rate": 0.0}, "client_rate"), ({"unit": "site"}, "unit"),
    ],
)  # fmt: skip
def test_a_plan_that_no_mechanism_could_have_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(PLAN, **changes)


def test_more_values_than_the_plan_has_are_refused():
    with pytest.raises(ValueError, match="1001 values"):
        DistributedMechanism(PLAN).encode(np.zeros(1001), 1, 1)


def test_reproducible_noise_guarantees_nothing():
    mechanism = DistributedMechanism(PLAN, insecure_test_seed=1)
    assert mechanism.epsilon() == 0.0
    mechanism.charge()
    assert mechanism.epsilon() == math.inf and not mechanism.secure
    fresh = DistributedMechanism(PLAN)
    one, two = (fresh.encode(np.zeros(50), 1, 1) for _ in range(2))
    assert fresh.secure and not np.array_equal(one, two)
