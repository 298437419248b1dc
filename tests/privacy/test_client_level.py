"""Privacy of whole clients: what is clipped, noised, divided and counted."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError
from scipy import stats

from privacy import ClientLevelMechanism, ClientLevelPlan, PrivacySettings, clip_update

PLAN = ClientLevelPlan(
    max_update_norm=2.0,
    sample_rate=0.25,
    participation="secret",
    registered_clients=40,
    noise_multiplier=1.5,
    rounds=30,
    target_delta=1e-5,
)
WISHES = {
    "mode": "client", "max_update_norm": 1.0, "registered_clients": 100, "sample_rate": 0.2,
    "target_epsilon": 4.0,
}  # fmt: skip
VALUES = st.floats(-(2.0**100), 2.0**100, width=32)


def norm(update) -> float:
    largest = max((np.abs(v).max(initial=0.0) for v in update.values()), default=0.0) or 1.0
    return largest * math.sqrt(sum(float(np.square(v / largest).sum()) for v in update.values()))


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.float32, (3, 4), elements=VALUES),
    hnp.arrays(np.float32, (5,), elements=VALUES),
    st.floats(1e-6, 1e6),
)
def test_a_whole_update_is_never_longer_than_its_bound_and_keeps_its_direction(one, two, bound):
    update = {"a": one, "b": two}
    clipped = clip_update(update, bound)
    before = norm({n: v.astype(np.float64) for n, v in update.items()})
    assert norm(clipped) <= bound * (1 + 1e-9)
    factor = 1.0 if before <= bound else bound / before
    for name, value in update.items():
        np.testing.assert_allclose(clipped[name], factor * value.astype(np.float64), rtol=1e-9)


def test_an_update_within_the_bound_keeps_every_bit():
    update = {"a": np.float32([0.3, -0.4]), "b": np.zeros(3, np.float32)}
    for name, value in clip_update(update, 0.5001).items():
        assert np.array_equal(value, update[name])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="not finite"):
        clip_update({"a": np.float32([1.0, bad])}, 1.0)


def test_noise_has_the_plans_scale_and_the_divisor_is_the_plans_constant():
    """Chi-square on 40,000 values; false alarms: 1 in 1,000 (fixed seed)."""
    mechanism = ClientLevelMechanism(PLAN, insecure_test_seed=1)
    sums = {"a": np.full((100, 200), 5.0), "b": np.full(20_000, -3.0)}
    released = mechanism.release(1, sums)
    assert PLAN.denominator == 10.0
    noise = np.concatenate([(released[n] * 10.0 - sums[n]).ravel() / 3.0 for n in sums])
    low, high = stats.chi2.ppf([0.0005, 0.9995], noise.size)
    assert low < float(np.square(noise).sum()) < high
    assert abs(noise.mean()) < 3.3 / math.sqrt(noise.size)
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert mechanism.noise_std == pytest.approx(0.3)


def test_each_tensor_round_and_call_has_noise_of_its_own():
    sums = {"a": np.zeros(500), "b": np.zeros(500)}
    mechanism = ClientLevelMechanism(PLAN)
    draws = [value for r in (1, 1, 2) for value in mechanism.release(r, sums).values()]
    correlations = np.corrcoef(draws)[np.triu_indices(6, 1)]
    assert np.abs(correlations).max() < 4.5 / math.sqrt(500)  # false alarms: 1 in 10,000
    assert mechanism.rounds_released == 3  # each call is a release


def test_seeded_draws_are_repeated_and_guarantee_nothing():
    sums = {"a": np.zeros(5)}
    one, two = (ClientLevelMechanism(PLAN, insecure_test_seed=3) for _ in range(2))
    assert np.array_equal(one.release(2, sums)["a"], two.release(2, sums)["a"])
    assert np.array_equal(one.draw(2, 50), two.draw(2, 50))
    assert not np.array_equal(one.release(3, sums)["a"], two.release(4, sums)["a"])
    assert not one.secure and one.epsilon() == math.inf
    assert ClientLevelMechanism(PLAN).secure


def test_clients_are_drawn_independently_at_the_plans_rate():
    """Binomial counts by client and by round; false alarms: 1 in 1,000 each (fixed seed)."""
    mechanism = ClientLevelMechanism(PLAN, insecure_test_seed=5)
    drawn = np.array([mechanism.draw(r, 40) for r in range(2_000)])
    total = int(drawn.sum())
    assert stats.binomtest(total, drawn.size, 0.25).pvalue > 1e-3
    sizes = drawn.sum(axis=1)  # not of fixed size: binomial
    observed = np.bincount(np.clip(sizes, 4, 16), minlength=17)[4:]
    cdf = stats.binom.cdf(np.arange(4, 16), 40, 0.25)
    expected = 2_000 * np.diff(np.concatenate([[0.0], cdf, [1.0]]))
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    assert np.abs(np.corrcoef(drawn.T)[np.triu_indices(40, 1)]).max() < 5 / math.sqrt(2_000)


@pytest.mark.parametrize(
    ("participation", "rate", "accounted"),
    [("public", 0.1, 1.0), ("secret", 0.1, 0.1), ("public", 1.0, 1.0)],
)
def test_amplification_is_credited_only_where_nobody_sees_who_takes_part(
    participation, rate, accounted
):
    wishes = PrivacySettings(**WISHES, client_sample_rate=rate, participation=participation)
    plan = ClientLevelPlan.for_run(wishes, rounds=20)
    assert plan.accounted_rate == accounted
    assert plan.denominator == pytest.approx(100 * rate)
    # Google's accountant, asked in its own words.
    event = GaussianDpEvent(plan.noise_multiplier)
    if accounted < 1:
        event = PoissonSampledDpEvent(accounted, event)
    accountant = PLDAccountant()
    accountant.compose(SelfComposedDpEvent(event, 20))
    assert plan.epsilon() == pytest.approx(accountant.get_epsilon(1e-5), rel=0.01)
    assert 0.97 * 4.0 < plan.epsilon() <= 4.0
    assert 0.0 == plan.epsilon(0) < plan.epsilon(1) < plan.epsilon(19) < plan.epsilon()


def test_one_client_moves_the_released_mean_by_its_clip_norm_at_most():
    """Same noise, with and without a client: sensitivity S over the constant divisor."""
    generator = np.random.default_rng(0)
    others = [{"a": generator.standard_normal((6, 7))} for _ in range(5)]
    liar = {"a": 1e6 * generator.standard_normal((6, 7))}
    released = []
    for clients in (others, [*others, liar]):
        mechanism = ClientLevelMechanism(PLAN, insecure_test_seed=7)
        total = sum(mechanism.clip(one)["a"] for one in clients)
        released.append(mechanism.release(1, {"a": total})["a"])
    moved = np.linalg.norm(released[1] - released[0])
    assert moved == pytest.approx(PLAN.max_update_norm / PLAN.denominator, rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "record"}, ["privacy.max-update-norm", "'client'", "accepted"]),
        ({"max_update_norm": 0.0}, ["privacy.max-update-norm", "above 0"]),
        ({"registered_clients": 0}, ["privacy.registered-clients", "above 0"]),
        ({"max_grad_norm_a": 1.0}, ["privacy.max-grad-norm-a must be 0", "got 1"]),
        ({"target_delta": 0.02}, ["privacy.target-delta", "1.00e-02", "0.02"]),
        ({"client_sample_rate": 0.0}, ["client_sample_rate", "greater than 0"]),
        ({"participation": "hidden"}, ["participation", "'secret'"]),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, words):
    with pytest.raises(ValidationError) as refused:
        PrivacySettings(**{**WISHES, **changes})
    assert [word for word in words if word not in str(refused.value)] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"max_update_norm": 0.0}, {"max_update_norm": math.inf}, {"noise_multiplier": 0.0},
        {"noise_multiplier": math.nan}, {"sample_rate": 0.0}, {"sample_rate": 1.1},
        {"registered_clients": 0}, {"rounds": 0}, {"target_delta": 1.0},
        {"participation": "seen"},
    ],
)  # fmt: skip
def test_a_plan_that_no_mechanism_could_have_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        dataclasses.replace(PLAN, **changes)
