"""What differential privacy lets any test do, and what a test was seen to do.

A membership attack is a test between two worlds, one with the record and one without.  Its ROC
curve lies below the trade-off curve of the mechanism (Kairouz et al., 2015; Dong et al., 2022).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy.stats import beta

Floats = npt.NDArray[np.float64]

# The accountant's own grid (privacy.accounting); pessimistic at any width.
_INTERVAL = 1e-4
_EPSILONS = np.arange(0.0, 30.0, 0.01)


@dataclass(frozen=True, eq=False)
class TradeOff:
    """The largest true positive rate at each false positive rate.

    Parameters
    ----------
    epsilons, deltas : numpy.ndarray
        (k,) pairs, epsilon >= 0 and ascending, for each of which the mechanism is
        (epsilon, delta)-DP.

    Notes
    -----
    Formal guarantee: for every pair and every test with false positive rate a and power p both
    ``p <= e^epsilon a + delta`` and ``1 - a <= e^epsilon (1 - p) + delta`` (Wasserman and Zhou,
    2010; Kairouz et al., 2015, Theorem 2.1).  With delta as a function of epsilon by PLD, an
    upper bound, the least of all these is the trade-off curve of the subsampled Gaussian
    (Dong et al., 2022, Proposition 6), from above; both directions of adjacency share the larger
    delta.  Not covered: whatever the pairs do not cover.
    """

    epsilons: Floats
    deltas: Floats

    def power(self, fpr: float) -> float:
        """Upper bound on the true positive rate of any test with this false positive rate."""
        if not 0 <= fpr <= 1:
            raise ValueError(f"fpr must be from 0 to 1, got {fpr}")
        growth = np.exp(self.epsilons)
        first = growth * fpr + self.deltas
        second = 1 - (1 - self.deltas - fpr) / growth
        return float(min(1.0, first.min(), second.min()))

    def auc(self) -> float:
        """Upper bound on the area under any test's ROC curve."""
        # Dense where the curve is steep.  Trapezoids on a concave curve lie below it by less
        # than 1e-4 here.
        grid = np.concatenate([[0.0], np.geomspace(1e-8, 1.0, 4000)])
        return float(np.trapezoid([self.power(value) for value in grid], grid))


@functools.lru_cache(maxsize=32)
def trade_off(*, sample_rate: float, noise_multiplier: float, steps: int) -> TradeOff:
    """The trade-off curve of ``steps`` Poisson-subsampled Gaussian steps, by PLD.

    Parameters
    ----------
    sample_rate, noise_multiplier : float
        As in :func:`privacy.pld_epsilon`, whose PLD this is.
    steps : int
        Steps that the attacker sees, at least 1.
    """
    one: Any = pld.from_gaussian_mechanism(
        standard_deviation=noise_multiplier,
        sensitivity=1.0,
        sampling_prob=sample_rate,
        pessimistic_estimate=True,
        value_discretization_interval=_INTERVAL,
        use_connect_dots=True,
        neighboring_relation=pld.NeighborRel.REPLACE_SPECIAL,
    )
    composed = one.self_compose(steps)
    return TradeOff(_EPSILONS, np.asarray(composed.get_delta_for_epsilon(_EPSILONS)))


def clopper_pearson(hits: int, trials: int, error: float) -> tuple[float, float]:
    """Interval of a binomial probability; each side misses it with probability <= ``error``."""
    if not 0 <= hits <= trials or trials < 1:
        raise ValueError(f"hits must be from 0 to trials >= 1, got {hits} of {trials}")
    low = beta.ppf(error, hits, trials - hits + 1) if hits else 0.0
    high = beta.ppf(1 - error, hits + 1, trials - hits) if hits < trials else 1.0
    return float(low), float(high)


def area_under_curve(inside: Floats, outside: Floats) -> tuple[float, float]:
    """Area under the ROC curve and its standard error (DeLong et al., 1988).

    Parameters
    ----------
    inside, outside : numpy.ndarray
        Scores of worlds with and without the record; high means "with".  Ties count half.
    """
    larger = (inside[:, None] > outside[None, :]).astype(np.float64)
    larger += 0.5 * (inside[:, None] == outside[None, :])
    spread = larger.mean(axis=1).var(ddof=1) / len(inside)
    spread += larger.mean(axis=0).var(ddof=1) / len(outside)
    return float(larger.mean()), math.sqrt(spread)


@dataclass(frozen=True)
class Operating:
    """A test at one threshold.

    Parameters
    ----------
    fpr : float
        The false positive rate that was asked for.
    resolved : float
        What the threshold's is expected to be: not below one over the number of outside worlds.
    fpr_high : float
        What it is at most, but for probability ``error``.
    tpr, tpr_low, tpr_high : float
        Measured true positive rate, and its interval with ``error`` at either side.
    """

    fpr: float
    resolved: float
    fpr_high: float
    tpr: float
    tpr_low: float
    tpr_high: float


def operate(inside: Floats, outside: Floats, fpr: float, error: float) -> Operating:
    """Measure a test at (about) a false positive rate.

    The threshold is the k-th largest outside score, k = fpr x (n + 1) rounded down but at least
    1.  Its true false positive rate then is Beta(k, n - k + 1) distributed or, with ties,
    smaller, whatever the scores' distribution is; and given the threshold the hits among the
    inside scores are binomial.  So both intervals are exact, though one sample chose and measured.
    Scores of several targets are independent but not alike; then the rates are means over the
    targets and the intervals only become safer (Hoeffding, 1956, Theorem 4).
    """
    count = len(outside)
    rank = max(1, int(fpr * (count + 1)))
    threshold = np.sort(outside)[count - rank]
    hits = int((inside > threshold).sum())
    low, high = clopper_pearson(hits, len(inside), error)
    return Operating(
        fpr=fpr,
        resolved=rank / (count + 1),
        fpr_high=float(beta.ppf(1 - error, rank, count - rank + 1)),
        tpr=hits / len(inside),
        tpr_low=low,
        tpr_high=high,
    )
