"""Doubt about a number stops the run, on either side and wherever calibration uses it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from privacy import accounting
from privacy.accounting import AccountingError, calibrate_noise_multiplier, cross_check, pld_epsilon

NUMBERS = {"sample_rate": 0.1, "noise_multiplier": 2.0, "steps": 50, "delta": 1e-5}


@pytest.mark.parametrize("factor", [0.5, 0.94, 1.06, 2.0, math.inf, math.nan])
def test_accountants_that_differ_either_way_stop_the_run(monkeypatch, factor):
    first = pld_epsilon(**NUMBERS)
    monkeypatch.setattr(accounting, "prv_epsilon", lambda **_: factor * first)
    with pytest.raises(AccountingError, match="two accountants disagree"):
        cross_check(**NUMBERS)


def test_the_epsilon_kept_is_the_accountant_of_records(monkeypatch):
    """Mistake: the smaller of the two."""
    first = pld_epsilon(**NUMBERS)
    for factor in (0.99, 1.01):
        monkeypatch.setattr(accounting, "prv_epsilon", lambda f=factor, **_: f * first)
        assert cross_check(**NUMBERS) == first


def test_no_calibration_without_the_second_accountant(monkeypatch):
    calibrate_noise_multiplier.cache_clear()
    wishes = {"target_epsilon": 4.0, "target_delta": 1e-5, "sample_rate": 0.11, "steps": 7}
    with monkeypatch.context() as patch:
        patch.setattr(accounting, "prv_epsilon", lambda **_: 1.0)
        with pytest.raises(AccountingError, match="disagree"):
            calibrate_noise_multiplier(**wishes)
    # A refusal is not remembered as a result, nor is a result of other wishes taken for these.
    noise = calibrate_noise_multiplier(**wishes)
    assert noise < calibrate_noise_multiplier(**{**wishes, "steps": 8})
    assert noise < calibrate_noise_multiplier(**{**wishes, "sample_rate": 0.13})


@pytest.mark.parametrize("rate", [0.104, 0.096])
def test_the_cache_keeps_close_rates_apart(rate):
    near = pld_epsilon(**{**NUMBERS, "sample_rate": rate})
    assert (near > pld_epsilon(**NUMBERS)) == (rate > 0.1)
    assert near != pld_epsilon(**NUMBERS)


@pytest.fixture
def _epsilon_is_one_over_sigma(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(
        accounting, "pld_epsilon", lambda *, noise_multiplier, **_: 1 / noise_multiplier
    )
    monkeypatch.setattr(accounting, "cross_check", lambda **_: None)
    calibrate_noise_multiplier.cache_clear()
    yield
    calibrate_noise_multiplier.cache_clear()


@pytest.mark.usefixtures("_epsilon_is_one_over_sigma")
@pytest.mark.parametrize("exact", [0.151, 0.98765, 1.0, 1.23451, 37.00001, 4000.12345])
def test_the_noise_is_rounded_up_never_down(exact):
    noise = calibrate_noise_multiplier(
        target_epsilon=1 / exact, target_delta=1e-5, sample_rate=0.5, steps=1
    )
    assert exact * (1 - 1e-12) <= noise <= exact * 1.0002 + 1e-4
    assert noise * 1e4 == pytest.approx(round(noise * 1e4), abs=1e-6)


@pytest.mark.usefixtures("_epsilon_is_one_over_sigma")
def test_a_wide_budget_still_gets_the_least_noise():
    """Below it an epsilon is a number that protects nobody."""
    wishes = {"target_delta": 1e-5, "sample_rate": 0.5, "steps": 1}
    assert calibrate_noise_multiplier(target_epsilon=100.0, **wishes) == 0.15
    with pytest.raises(AccountingError, match="cannot be reached"):
        calibrate_noise_multiplier(target_epsilon=1e-6, **wishes)


def test_the_noise_meets_the_budget_on_the_fine_grid_too(monkeypatch):
    """The search runs on a coarse grid; where the fine one says more, noise is added until it fits.

    Mistake: the search's answer taken as it is.
    """

    def finer_is_larger(*, noise_multiplier, interval, **_):
        return (1.01 if interval <= 1e-4 else 1.0) / noise_multiplier

    monkeypatch.setattr(accounting, "pld_epsilon", finer_is_larger)
    monkeypatch.setattr(accounting, "cross_check", lambda **_: None)
    calibrate_noise_multiplier.cache_clear()
    noise = calibrate_noise_multiplier(
        target_epsilon=8.0, target_delta=1e-5, sample_rate=0.5, steps=1
    )
    calibrate_noise_multiplier.cache_clear()
    assert finer_is_larger(noise_multiplier=noise, interval=1e-4) <= 8.0
