"""A lower bound on epsilon from many runs with a record and many without it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.stats import beta

Scores = npt.NDArray[np.float64]


def clopper_pearson(hits: int, trials: int, risk: float) -> tuple[float, float]:
    """Lower and upper bound on a probability, each wrong with at most ``risk`` (not both at once).

    Parameters
    ----------
    hits, trials : int
        Independent trials, and how many of them hit.
    risk : float
        In (0, 1), of each of the two one-sided bounds.

    Notes
    -----
    Clopper and Pearson (1934), exact for every probability and number of trials.
    """
    if not 0 <= hits <= trials or trials < 1:
        raise ValueError(f"hits must be from 0 to trials >= 1, got {hits} of {trials}")
    _check_risk(risk)
    low = 0.0 if hits == 0 else float(beta.ppf(risk, hits, trials - hits + 1))
    high = 1.0 if hits == trials else float(beta.ppf(1 - risk, hits + 1, trials - hits))
    return low, high


def epsilon_from_rates(least_hits: float, most_alarms: float, delta: float) -> float:
    """Epsilon that a test's rates rule out: ``TPR <= e^eps FPR + delta``, and its complement.

    Parameters
    ----------
    least_hits : float
        Lower bound on the rate at which the test says "present" when the record is.
    most_alarms : float
        Upper bound on the rate at which it says so when the record is not.
    delta : float
        In [0, 1).

    Notes
    -----
    Kairouz, Oh and Viswanath (2015), Theorem 2.1.  The second inequality is the first for the
    test that says the opposite, with "present" and "absent" exchanged.
    """
    ratios = [
        _ratio(least_hits - delta, most_alarms),
        _ratio(1 - most_alarms - delta, 1 - least_hits),
    ]
    return max(0.0, *(math.log(ratio) if ratio > 0 else 0.0 for ratio in ratios))


def threshold_bound(
    present: Scores, absent: Scores, *, delta: float, confidence: float = 0.95
) -> float:
    """Lower bound on epsilon from the scores of independent runs in two worlds.

    Parameters
    ----------
    present, absent : numpy.ndarray
        (n,) scores each, of runs with and without the record; higher speaks for presence.  At
        least 4 of each.
    delta : float
        Delta at which epsilon is bounded.
    confidence : float (default: 0.95)
        That the bound is below the truth.

    Returns
    -------
    float
        Epsilon >= 0.

    Notes
    -----
    Formal guarantee: if the runs are independent and the mechanism is (epsilon, delta)-DP for the
    two data sets, the result is above epsilon with probability at most ``1 - confidence``,
    whatever the mechanism and the score are.  The first half of the runs chooses the threshold,
    the second half is counted, so the choice costs nothing.  Two one-sided bounds at half the
    risk each (:func:`clopper_pearson`); the same two serve both inequalities of
    :func:`epsilon_from_rates`.  Not covered: leaks that the score does not see.
    """
    if min(len(present), len(absent)) < 4:
        raise ValueError(
            f"needs at least 4 scores in each world, got {len(present)} and {len(absent)}"
        )
    risk = (1 - confidence) / 2
    _check_risk(risk)
    half_present, half_absent = len(present) // 2, len(absent) // 2
    seen = np.concatenate([present[:half_present], absent[:half_absent]])
    candidates = np.unique(np.quantile(seen, np.linspace(0, 1, 201)))

    def bound(threshold: float, ins: Scores, outs: Scores) -> float:
        hits, alarms = int((ins >= threshold).sum()), int((outs >= threshold).sum())
        least, _ = clopper_pearson(hits, len(ins), risk)
        _, most = clopper_pearson(alarms, len(outs), risk)
        return epsilon_from_rates(least, most, delta)

    first = (present[:half_present], absent[:half_absent])
    best = max(candidates, key=lambda threshold: bound(float(threshold), *first))
    return bound(float(best), present[half_present:], absent[half_absent:])


def _ratio(above: float, below: float) -> float:
    if above <= 0:
        return 0.0
    return above / below if below > 0 else math.inf


def _check_risk(risk: float) -> None:
    if not 0 < risk < 1:
        raise ValueError(f"a risk must be in (0, 1), got {risk}")
