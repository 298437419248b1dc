"""What a site could have instead: noise and epsilon of the trainings beside its plan.

Computed on a coarser grid of the privacy loss than a run's, which is quicker and still an upper
bound: noise multipliers are a little larger here than a run would need, epsilons a little larger
than a run would state.
"""

from __future__ import annotations

import dataclasses
import math

from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr
from scipy.stats import binom

from ..accounting import (
    LARGEST_NOISE_MULTIPLIER,
    SMALLEST_NOISE_MULTIPLIER,
    AccountingError,
    pld_epsilon,
)
from .planning import Signal, Training

Named = tuple[str, Training]

GRID_EPSILONS = (1.0, 3.0, 8.0)
# Beyond this an epsilon is a number that protects nobody, and costs gigabytes to compute.
LARGEST_EPSILON = 200.0
_FINEST_INTERVAL, _COARSEST_INTERVAL = 1e-4, 5e-3
_MOST_POINTS = 20
# Of the search for noise, in its logarithm.
_STEP = 0.05


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """A training that one could have instead.

    ``noise_multiplier`` keeps it within ``epsilon``; ``epsilon_if_kept`` is an upper bound on what
    it spends with the plan's own noise (``None`` if not asked for, infinite beyond any use).
    """

    name: str
    training: Training
    epsilon: float
    noise_multiplier: float
    signal: Signal
    epsilon_if_kept: float | None = None


def rough_epsilon(training: Training, noise_multiplier: float) -> float:
    """Size of epsilon, in no time: where to begin a search, and what is worth an accountant.

    The smaller of two numbers. The central limit's is that of one Gaussian with
    ``mu = q sqrt(T (e^(1 / sigma^2) - 1))`` (Bu et al., 2020); it is no bound, and far too large
    for little noise at small rates. There the other is right: but for a chance of delta / 2 a
    record is in at most k steps, and k full batches are one Gaussian with ``mu = sqrt(k) / sigma``.
    """
    growth = math.expm1(min(noise_multiplier**-2, 500.0))
    limit = training.rate * math.sqrt(training.steps * growth)
    most = float(binom.isf(training.delta / 2, training.steps, training.rate))
    few = math.sqrt(most) / noise_multiplier
    return min(_gaussian_epsilon(limit, training.delta), _gaussian_epsilon(few, training.delta / 2))


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of a Gaussian whose means are mu deviations apart (Balle & Wang, 2018, Theorem 8)."""
    most = mu**2 / 2 + mu * math.sqrt(2 * math.log(1 / delta))  # of which this is a bound
    if most > 5 * LARGEST_EPSILON:
        return most

    def excess(epsilon: float) -> float:
        tail = math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu))
        return float(ndtr(mu / 2 - epsilon / mu)) - tail - delta

    return float(brentq(excess, 0.0, most)) if mu > 0 and excess(0.0) > 0 else 0.0


def upper_epsilon(training: Training, noise_multiplier: float, *, near: float) -> float:
    """Upper bound on epsilon by PLD, on a grid that suits epsilons ``near`` a value.

    Pessimistic on any grid (see :func:`~privacy.accounting.pld_epsilon`, whose guarantee this is).
    Infinite for noise that is too little to be worth computing.
    """
    if rough_epsilon(training, noise_multiplier) > 5 * LARGEST_EPSILON:
        return math.inf
    return pld_epsilon(
        sample_rate=training.rate,
        noise_multiplier=noise_multiplier,
        steps=training.steps,
        delta=training.delta,
        interval=min(_COARSEST_INTERVAL, max(_FINEST_INTERVAL, near / 1500)),
    )


def enough_noise(training: Training, epsilon: float) -> float:
    """A noise multiplier that keeps a training within epsilon, to 3 digits and never too small.

    Raises
    ------
    AccountingError
        If no noise multiplier up to 1e5 does.
    """
    least, most = math.log(SMALLEST_NOISE_MULTIPLIER), math.log(LARGEST_NOISE_MULTIPLIER)

    def excess(x: float) -> float:
        spent = upper_epsilon(training, math.exp(x), near=epsilon)
        return math.log(min(max(spent, 1e-12), 1e12) / epsilon)

    low = high = _rough_noise(training, epsilon, least, most)
    while excess(high) > 0:
        if high > most:
            raise AccountingError(
                f"epsilon {epsilon:g} cannot be reached in {training.steps} steps"
            )
        low, high = high, high + _STEP
    while excess(low) <= 0 and low > least:
        high, low = low, max(low - _STEP, least)
    best = low if excess(low) <= 0 else float(brentq(excess, low, high, xtol=5e-4))
    noise_multiplier = math.ceil(math.exp(best) * 1e3) / 1e3
    while upper_epsilon(training, noise_multiplier, near=epsilon) > epsilon:
        noise_multiplier = math.ceil(noise_multiplier * 1.001 * 1e3) / 1e3
    return noise_multiplier


def _rough_noise(training: Training, epsilon: float, least: float, most: float) -> float:
    def excess(x: float) -> float:
        return rough_epsilon(training, math.exp(x)) - epsilon

    if excess(least) <= 0:
        return least
    if excess(most) >= 0:
        return most
    return float(brentq(excess, least, most, xtol=1e-3))


def neighbours(training: Training, *, keep_rate: bool) -> list[Named]:
    """Half and twice the rounds, the batch, the records, each with its name, where possible.

    ``keep_rate``: with other records the rate stays, and the batch follows; else the batch stays.
    """
    found: list[tuple[str, Training | None]] = []
    for rounds in (training.rounds // 2, training.rounds * 2):
        found.append((f"rounds {rounds}", training.variant(rounds=rounds)))
    for batch in (training.batch / 2, training.batch * 2):
        found.append((f"batch {batch:g}", training.variant(batch=batch)))
    for records in (training.records // 2, training.records * 2):
        other = training.variant(records=records, keep_rate=keep_rate)
        found.append((f"records {records}", other))
    return [(name, one) for name, one in found if one is not None]


def grid(training: Training) -> list[Named]:
    """Half, same and twice the rounds by half, same and twice the batch, where possible."""
    found: list[Named] = []
    for rounds in (training.rounds // 2, training.rounds, training.rounds * 2):
        for batch in (training.batch / 2, None, training.batch * 2):
            one = training.variant(rounds=rounds, batch=batch)
            if one is not None:
                found.append((f"rounds {rounds}, batch {one.batch:g}", one))
    return found


def choose(
    name: str,
    training: Training,
    *,
    epsilon: float,
    values: int,
    kept_noise: float | None = None,
) -> Choice:
    """Noise and signal of a training at an epsilon; takes a part of a second.

    Parameters
    ----------
    name : str
        What it is called.
    training : Training
        What to look at.
    epsilon : float
        Its budget.
    values : int
        Values that a step trains.
    kept_noise : float, optional
        If given, also what it spends with this noise multiplier.
    """
    noise_multiplier = enough_noise(training, epsilon)
    spent = None
    if kept_noise is not None:
        spent = upper_epsilon(training, kept_noise, near=epsilon)
    return Choice(
        name=name,
        training=training,
        epsilon=epsilon,
        noise_multiplier=noise_multiplier,
        signal=Signal.of(training, noise_multiplier, values),
        epsilon_if_kept=spent,
    )


def spending(
    training: Training, noise_multiplier: float, epsilon: float
) -> list[tuple[int, float]]:
    """Round and upper bound on the epsilon spent until its end, for at most 20 rounds."""
    count = min(training.rounds, _MOST_POINTS)
    rounds = [round(training.rounds * (i + 1) / count) for i in range(count)]
    curve = []
    for number in rounds:
        part = dataclasses.replace(training, rounds=number)
        curve.append((number, upper_epsilon(part, noise_multiplier, near=epsilon)))
    return curve
