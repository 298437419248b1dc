"""What a sequence of Poisson-subsampled Gaussian steps costs, and how much noise a budget needs.

The accountant of record is the privacy loss distribution (PLD) of Google's dp-accounting, with
pessimistic connect-the-dots discretisation (Doroshenko et al., 2022): its epsilon is an upper
bound.  Every calibration is checked against a second, independent implementation, Opacus's PRV
accountant (Gopi et al., 2021); two numbers that disagree stop the run before any data is read.
Opacus's GDP accountant is not offered: its central-limit approximation reports too little.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import warnings
from typing import Any

import numpy as np
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy.optimize import brentq

from . import calibration_cache

# Grid of the privacy loss.  The coarse one is for searching; both round pessimistically.
_SEARCH_INTERVAL = 1e-3
_FINAL_INTERVAL = 1e-4
# What calibration can give.  With less noise an accountant works for minutes to print a number
# that protects nobody.
SMALLEST_NOISE_MULTIPLIER = 0.15
LARGEST_NOISE_MULTIPLIER = 1e5
# Two accountants may differ by this much, relative, plus PRV's own stated error.
_AGREEMENT = 0.02
# To be raised with any change that calibration's answer depends on: kept answers are then void.
_ALGORITHM = 1

_LOGGER = logging.getLogger(__name__)


Parts = tuple[tuple[float, float, int], ...]
"""Sample rate, noise multiplier and steps of each of several subsampled Gaussians."""


class AccountingError(ValueError):
    """The requested guarantee cannot be computed or cannot be reached."""


def _check(sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> None:
    if not 0 < sample_rate <= 1:
        raise AccountingError(f"sample_rate must be in (0, 1], got {sample_rate}")
    if not noise_multiplier > 0 or not math.isfinite(noise_multiplier):
        raise AccountingError(f"noise_multiplier must be finite and > 0, got {noise_multiplier}")
    if steps < 0:
        raise AccountingError(f"steps must be >= 0, got {steps}")
    if not 0 < delta < 1:
        raise AccountingError(f"delta must be in (0, 1), got {delta}")


@functools.lru_cache(maxsize=4)
def _one_step(
    sample_rate: float, noise_multiplier: float, interval: float
) -> pld.PrivacyLossDistribution:
    return pld.from_gaussian_mechanism(
        standard_deviation=noise_multiplier,
        sensitivity=1.0,
        sampling_prob=sample_rate,
        pessimistic_estimate=True,
        value_discretization_interval=interval,
        use_connect_dots=True,
        neighboring_relation=pld.NeighborRel.REPLACE_SPECIAL,  # one record zeroed out
    )


@functools.lru_cache(maxsize=4096)
def pld_epsilon(
    *,
    sample_rate: float,
    noise_multiplier: float,
    steps: int,
    delta: float,
    interval: float = _FINAL_INTERVAL,
) -> float:
    """Epsilon of ``steps`` Poisson-subsampled Gaussian steps, by PLD.

    Parameters
    ----------
    sample_rate : float
        Probability q, in (0, 1], with which each record enters a step, independently.
    noise_multiplier : float
        Standard deviation of the noise on the clipped sum, in units of the clip norm.
    steps : int
        Number of steps composed; 0 costs nothing.
    delta : float
        Delta at which epsilon is read off.
    interval : float (default: 1e-4)
        Discretisation of the privacy loss; the result is an upper bound for any interval.

    Returns
    -------
    float
        Epsilon >= 0.

    Notes
    -----
    Formal guarantee: the composed mechanism is (epsilon, delta)-DP for two data sets that
    differ in one record being present or contributing zero (add/remove, equal to zero-out when
    the normaliser is a constant).  Covers: all steps of one client on one data set.  Does not
    cover: batches that are not Poisson, replace-one adjacency (about twice the epsilon),
    floating-point rounding.

    Raises
    ------
    AccountingError
        For numbers outside the ranges above.
    """
    _check(sample_rate, noise_multiplier, steps, delta)
    if steps == 0:
        return 0.0
    composed = _one_step(sample_rate, noise_multiplier, interval).self_compose(steps)
    return float(composed.get_epsilon_for_delta(delta))


def composed_epsilon(parts: Parts, *, delta: float, interval: float = _FINAL_INTERVAL) -> float:
    """Epsilon of several subsampled Gaussians composed, all fixed beforehand, by PLD.

    Parameters
    ----------
    parts : tuple of (float, float, int)
        Sample rate, noise multiplier and steps of each.
    delta, interval : float
        As for :func:`pld_epsilon`, whose guarantee and exclusions are these.

    Raises
    ------
    AccountingError
        For numbers that no mechanism has.
    """
    if len(parts) == 1:
        rate, noise, steps = parts[0]
        return pld_epsilon(
            sample_rate=rate, noise_multiplier=noise, steps=steps, delta=delta, interval=interval
        )
    return _composed_epsilon(parts, delta, interval)


@functools.lru_cache(maxsize=4096)
def _composed_epsilon(parts: Parts, delta: float, interval: float) -> float:
    composed = None
    for rate, noise, steps in parts:
        _check(rate, noise, steps, delta)
        if steps:
            part = _one_step(rate, noise, interval).self_compose(steps)
            composed = part if composed is None else composed.compose(part)
    return 0.0 if composed is None else float(composed.get_epsilon_for_delta(delta))


def prv_epsilon(
    *,
    sample_rate: float,
    noise_multiplier: float,
    steps: int,
    delta: float,
    error: float = 0.01,
    beside: Parts = (),
) -> float:
    """Upper bound on the same epsilon by Opacus's PRV accountant (Gopi et al., 2021).

    ``error`` is the accountant's own additive error, included in the bound; ``beside`` is composed
    with the steps.  Guarantee, adjacency and exclusions are those of :func:`pld_epsilon`.
    """
    _check(sample_rate, noise_multiplier, steps, delta)
    if steps == 0:
        return 0.0
    # Here, because a process that finds its calibration on disk never needs it.
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [
        (noise_multiplier, sample_rate, steps),
        *((noise, rate, count) for rate, noise, count in beside),
    ]
    # It sizes its domain by RDP at few orders, whose warnings do not concern the bound, and at
    # q = 1 it takes log(0) on purpose.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta, eps_error=error))


def rdp_epsilon(*, sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """Looser bound on the same epsilon by Rényi composition (Mironov et al., 2019).

    Guarantee, adjacency and exclusions are those of :func:`pld_epsilon`; usually 8-18 % above.
    """
    _check(sample_rate, noise_multiplier, steps, delta)
    if steps == 0:
        return 0.0
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    return float(accountant.get_epsilon(delta))


def cross_check(
    *,
    sample_rate: float,
    noise_multiplier: float,
    steps: int,
    delta: float,
    beside: Parts = (),
) -> float:
    """Epsilon by PLD, refused unless Opacus's PRV accountant agrees.

    ``beside`` is composed with the steps.

    Returns
    -------
    float
        The PLD epsilon, an upper bound.

    Raises
    ------
    AccountingError
        When the two bounds differ by more than 2 % plus twice PRV's own stated error.
    """
    first = composed_epsilon(((sample_rate, noise_multiplier, steps), *beside), delta=delta)
    error = min(0.05, max(0.001, first / 200))
    second = prv_epsilon(
        sample_rate=sample_rate,
        noise_multiplier=noise_multiplier,
        steps=steps,
        delta=delta,
        error=error,
        beside=beside,
    )
    if not abs(first - second) <= _AGREEMENT * first + 2 * error:
        raise AccountingError(
            f"two accountants disagree at sample_rate={sample_rate}, "
            f"noise_multiplier={noise_multiplier}, steps={steps}, delta={delta}: "
            f"PLD {first:.4f}, PRV {second:.4f}; no run on a number that is in doubt"
        )
    return first


@functools.lru_cache(maxsize=256)
def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int,
    beside: Parts = (),
) -> float:
    """Smallest noise multiplier with which ``steps`` steps stay within (epsilon, delta).

    Parameters
    ----------
    target_epsilon, target_delta : float
        Budget of all steps together.
    sample_rate : float
        Poisson rate q of the client, in (0, 1].
    steps : int
        Most private steps ever taken on the data: rounds x local steps, at least 1.
    beside : tuple of (float, float, int)
        Sample rate, noise multiplier and steps of what else the budget pays for.

    Returns
    -------
    float
        Noise multiplier (noise standard deviation over clip norm), to about 4 digits, rounded
        up, with ``cross_check(...) <= target_epsilon``.

    Raises
    ------
    AccountingError
        If the budget cannot be met by any noise multiplier up to 1e5, or accountants disagree.

    Notes
    -----
    The search takes seconds, so its answer is kept on disk for later processes
    (:mod:`privacy.calibration_cache`).  What is kept was cross-checked when it was found; when it
    is read, the PLD epsilon must be within the budget again, else the search runs anew.
    """
    if steps < 1:
        raise AccountingError(f"steps must be >= 1, got {steps}")
    inputs: dict[str, str | int] = {
        "algorithm": _ALGORITHM,
        "target-epsilon": float(target_epsilon).hex(),
        "target-delta": float(target_delta).hex(),
        "sample-rate": float(sample_rate).hex(),
        "steps": int(steps),
    }
    for number, (rate, noise, count) in enumerate(beside):
        inputs[f"beside-{number}"] = f"{float(rate).hex()} {float(noise).hex()} {int(count)}"
    wishes: dict[str, Any] = {
        "target_epsilon": target_epsilon,
        "target_delta": target_delta,
        "sample_rate": sample_rate,
        "steps": steps,
        **({"beside": beside} if beside else {}),
    }
    kept = calibration_cache.load(
        inputs, smallest=SMALLEST_NOISE_MULTIPLIER, largest=LARGEST_NOISE_MULTIPLIER
    )
    if kept is not None:
        if _meets_budget(kept, **wishes):
            return kept
        _LOGGER.warning("a kept noise multiplier does not meet its budget and is computed anew")
    noise_multiplier = _search_noise_multiplier(**wishes)
    calibration_cache.store(inputs, noise_multiplier)
    return noise_multiplier


def _search_interval(target_epsilon: float) -> float:
    # A coarse grid costs a small epsilon more than it does a large one.
    return min(_SEARCH_INTERVAL, max(_FINAL_INTERVAL, target_epsilon / 4000))


@dataclasses.dataclass(frozen=True)
class _Budget:
    target_epsilon: float
    target_delta: float
    sample_rate: float
    steps: int
    beside: Parts = ()

    def spent(self, noise_multiplier: float, interval: float) -> float:
        """Epsilon of everything that the budget pays for, with this noise on the steps."""
        parts = ((self.sample_rate, noise_multiplier, self.steps), *self.beside)
        return composed_epsilon(parts, delta=self.target_delta, interval=interval)


def _meets_budget(noise_multiplier: float, **wishes: Any) -> bool:
    """Whether a noise multiplier keeps the budget, mostly by one evaluation on the coarse grid."""
    budget = _Budget(**wishes)
    # Either grid gives an upper bound, so either may say yes.  The search ends within 1e-5 of the
    # budget on the coarse one: what is far off there was never its answer.
    for interval in (_search_interval(budget.target_epsilon), _FINAL_INTERVAL):
        try:
            epsilon = budget.spent(noise_multiplier, interval)
        except (ArithmeticError, ValueError, MemoryError):
            return False
        if epsilon <= budget.target_epsilon:
            return True
        if not epsilon <= 1.01 * budget.target_epsilon:
            return False
    return False


def _search_noise_multiplier(**wishes: Any) -> float:
    budget = _Budget(**wishes)
    target_epsilon, target_delta = budget.target_epsilon, budget.target_delta
    search_interval = _search_interval(target_epsilon)

    def spent(noise_multiplier: float, interval: float = search_interval) -> float:
        return budget.spent(noise_multiplier, interval)

    if budget.beside and composed_epsilon(budget.beside, delta=target_delta) >= target_epsilon:
        raise AccountingError(
            f"epsilon {target_epsilon} at delta {target_delta} does not even pay for "
            f"{budget.beside} (sample rate, noise multiplier, times)"
        )
    low = high = 1.0
    while spent(high) > target_epsilon:
        low, high = high, high * 2
        if high > LARGEST_NOISE_MULTIPLIER:
            raise AccountingError(
                f"epsilon {target_epsilon} at delta {target_delta} cannot be reached in "
                f"{budget.steps} steps at rate {budget.sample_rate}: even a noise multiplier of "
                f"{LARGEST_NOISE_MULTIPLIER:g} spends more"
            )
    while spent(low) <= target_epsilon and low > SMALLEST_NOISE_MULTIPLIER:
        high, low = low, max(low / 1.5, SMALLEST_NOISE_MULTIPLIER)
    if spent(low) <= target_epsilon:  # a budget this wide is not worth less noise
        high = low
    else:
        # Nearly a straight line in logarithms, so few of these costly evaluations are needed.
        high = math.exp(
            brentq(
                lambda x: math.log(max(spent(math.exp(x)), 1e-12) / target_epsilon),
                math.log(low),
                math.log(high),
                xtol=1e-5,
            )
        )
    # Round up to 4 decimals so that the number printed is the number used.
    noise_multiplier = math.ceil(high * 1e4) / 1e4
    while spent(noise_multiplier, _FINAL_INTERVAL) > target_epsilon:
        noise_multiplier = math.ceil(noise_multiplier * 1.0001 * 1e4) / 1e4
    cross_check(
        sample_rate=budget.sample_rate,
        noise_multiplier=noise_multiplier,
        steps=budget.steps,
        delta=target_delta,
        beside=budget.beside,
    )
    return noise_multiplier
