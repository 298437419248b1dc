"""Trainings beside a plan, and the quick bounds that they are compared by."""

from __future__ import annotations

import math

import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import AccountingError, pld_epsilon
from privacy.commands.planning import Signal, Training
from privacy.commands.trading import (
    enough_noise,
    grid,
    neighbours,
    rough_epsilon,
    spending,
    upper_epsilon,
)

BASE = Training(records=1200, rate=32 / 1200, rounds=100, local_steps=10, delta=1e-5)


def fine(training: Training, noise: float) -> float:
    return pld_epsilon(
        sample_rate=training.rate,
        noise_multiplier=noise,
        steps=training.steps,
        delta=training.delta,
        interval=5e-4,
    )


def lower_bound(training: Training, noise: float) -> float:
    """By the same library, with every mass rounded down."""
    one = pld.from_gaussian_mechanism(
        noise,
        sampling_prob=training.rate,
        pessimistic_estimate=False,
        use_connect_dots=False,
        value_discretization_interval=5e-4,
        neighboring_relation=pld.NeighborRel.REPLACE_SPECIAL,
    )
    return float(one.self_compose(training.steps).get_epsilon_for_delta(training.delta))


def test_what_stays_when_records_change():
    batch_stays = BASE.variant(records=600)
    assert (batch_stays.batch, batch_stays.rate) == (pytest.approx(32), 32 / 600)
    rate_stays = BASE.variant(records=600, keep_rate=True)
    assert (rate_stays.batch, rate_stays.rate) == (pytest.approx(16), BASE.rate)
    assert BASE.variant(rounds=7).rate == BASE.rate  # to the last bit: a calibration's key


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 0},
        {"records": 0},
        {"records": 31},  # fewer than the batch
        {"batch": 1201},
        {"records": 100_000},  # delta is 1 / records
    ],
)
def test_trainings_that_cannot_be_are_none(changes):
    assert BASE.variant(**changes) is None


def test_only_possible_neighbours_are_listed():
    one = Training(records=10, rate=1.0, rounds=1, local_steps=1, delta=0.06)
    assert [name for name, _ in neighbours(one, keep_rate=False)] == ["rounds 2", "batch 5"]
    assert [name for name, _ in neighbours(one, keep_rate=True)] == [
        "rounds 2", "batch 5", "records 5",
    ]  # fmt: skip
    assert [name for name, _ in grid(one)] == [
        "rounds 1, batch 5", "rounds 1, batch 10", "rounds 2, batch 5", "rounds 2, batch 10",
    ]  # fmt: skip


def test_a_whole_batch_is_possible():
    assert BASE.variant(batch=1200).rate == 1.0


trainings = st.builds(
    Training,
    records=st.just(1000),
    rate=st.floats(0.005, 1.0),
    rounds=st.integers(1, 60),
    local_steps=st.integers(1, 5),
    delta=st.sampled_from([1e-4, 1e-5, 1e-6]),
)


@settings(max_examples=5, deadline=None)
@given(trainings, st.floats(0.5, 8.0))
def test_enough_noise_is_enough_and_not_much_more(training, epsilon):
    noise = enough_noise(training, epsilon)
    assert fine(training, noise) <= epsilon * (1 + 1e-3)  # of which the grid's own rounding is most
    assert noise == 0.15 or fine(training, 0.97 * noise - 2e-3) > epsilon


@settings(max_examples=10, deadline=None)
@given(trainings, st.floats(0.7, 5.0))
def test_the_quick_bound_is_a_bound_and_near(training, noise):
    exact = fine(training, noise)
    quick = upper_epsilon(training, noise, near=max(exact, 0.1))
    assert lower_bound(training, noise) <= quick <= 1.03 * exact + 0.01


@settings(max_examples=10, deadline=None)
@given(trainings, st.floats(0.6, 10.0))
def test_the_rough_size_is_within_a_factor(training, noise):
    """It decides what is refused at 200 and cut off at 1000: no usable plan may be among them."""
    exact = fine(training, noise)
    assert exact / 3 - 0.5 < rough_epsilon(training, noise) < 1.5 * exact + 0.5


def test_little_noise_at_a_small_rate_is_not_taken_for_absurd():
    """The central limit alone says 1e10 here."""
    rare = Training(records=10**5, rate=1e-4, rounds=10, local_steps=1, delta=1e-6)
    assert rough_epsilon(rare, 0.15) < 200
    assert math.isfinite(upper_epsilon(rare, 0.15, near=30))
    absurd = Training(records=100, rate=1.0, rounds=1000, local_steps=1, delta=1e-6)
    assert upper_epsilon(absurd, 0.15, near=8) == math.inf


def test_an_epsilon_out_of_reach_says_so():
    whole = Training(records=10, rate=1.0, rounds=10_000, local_steps=10, delta=1e-5)
    with pytest.raises(AccountingError, match="cannot be reached"):
        enough_noise(whole, 1e-7)


def test_a_long_run_is_shown_in_few_points():
    curve = spending(BASE, 1.4, 3.0)
    assert [number for number, _ in curve] == list(range(5, 101, 5))
    epsilons = [epsilon for _, epsilon in curve]
    assert epsilons == sorted(epsilons)


@given(st.floats(0.2, 50), st.integers(1, 10**9))
def test_signal_in_closed_form(noise, values):
    signal = Signal.of(BASE, noise, values)
    assert signal.step == pytest.approx(noise * math.sqrt(values) / 32)
    assert signal.run == pytest.approx(signal.step / math.sqrt(1000))
    # Per value: noise sigma C / b against C / sqrt(d), which is the same ratio.
    assert signal.per_value / (1 / math.sqrt(values)) == pytest.approx(signal.step)
