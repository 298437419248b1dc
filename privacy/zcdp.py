"""What rounds of a concentrated mechanism cost, with and without Poisson sampling of records."""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import gammaln, logsumexp

from .accounting import AccountingError

Float64s = npt.NDArray[np.float64]
_ORDERS = 1 + np.geomspace(1e-3, 1e6, 4000)
_WHOLE_ORDERS = (*range(2, 129), *range(136, 513, 8), *range(576, 2049, 64))


def zcdp_epsilon(rho: float, delta: float) -> float:
    """Epsilon of a rho-zCDP mechanism at delta.

    Any order gives an upper bound, so a grid of orders does; see :func:`rdp_to_epsilon`.
    """
    return rdp_to_epsilon(_ORDERS, _ORDERS * rho, delta) if rho else 0.0


def rdp_to_epsilon(orders: Float64s, divergences: Float64s, delta: float) -> float:
    """Epsilon at delta of a mechanism with these Rényi divergences.

    ``min over a of R(a) + (ln(1 / delta) + a ln(1 - 1 / a) - ln(a - 1)) / (a - 1)`` (Canonne,
    Kamath and Steinke 2020, proposition 12).
    """
    a = orders
    terms = -math.log(delta) + a * np.log1p(-1 / a) - np.log(a - 1)
    return max(0.0, float(np.min(divergences + terms / (a - 1))))


def sampled_rdp(ratio: float, sample_rate: float, order: int) -> float:
    """Rényi divergence of one round in which each record takes part with probability q.

    ``ln(sum_{k=0}^a C(a, k) (1 - q)^(a-k) q^k exp((k - 1) k e^2 / 2)) / (a - 1)``.

    Parameters
    ----------
    ratio : float
        e: without sampling the mechanism is ``e^2 / 2``-zCDP.
    sample_rate : float
        Poisson rate q in (0, 1].
    order : int
        a >= 2.

    Notes
    -----
    Formal guarantee: an upper bound in both directions.  Let P be the output without the record
    and Q with it, for fixed other records and rounding.  ``E_P[((1 - q) + q Q / P)^a]`` expands to
    the sum of ``C(a, k) (1 - q)^(a-k) q^k E_P[(Q / P)^k]``, and ``E_P[(Q / P)^k]`` is 1 for k of 0
    and 1 and at most ``exp((k - 1) k e^2 / 2)`` beyond.  The other direction is not larger
    (Mironov, Talwar and Zhang 2019, theorem 5): noise on the whole numbers that is symmetric about
    zero has a reflection that swaps P and Q.  Joint quasi-convexity takes it to random rounding.
    """
    if sample_rate == 1:
        return order * ratio**2 / 2
    k = np.arange(order + 1, dtype=np.float64)
    terms = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    terms += (order - k) * math.log1p(-sample_rate) + k * math.log(sample_rate)
    terms += k * (k - 1) / 2 * ratio**2
    return max(0.0, float(logsumexp(terms))) / (order - 1)


@functools.lru_cache(maxsize=512)
def _sampled_curve(ratio: float, sample_rate: float) -> Float64s:
    return np.array([sampled_rdp(ratio, sample_rate, order) for order in _WHOLE_ORDERS])


def concentrated_epsilon(ratio: float, sample_rate: float, rounds: int, delta: float) -> float:
    """Epsilon of so many rounds, each ``ratio^2 / 2``-zCDP without sampling, at a Poisson rate."""
    if rounds == 0:
        return 0.0
    plain = zcdp_epsilon(rounds * ratio**2 / 2, delta)
    if sample_rate == 1:
        return plain
    orders = np.array(_WHOLE_ORDERS, dtype=np.float64)
    sampled = rdp_to_epsilon(orders, rounds * _sampled_curve(ratio, sample_rate), delta)
    return min(plain, sampled)  # sampling never costs more


def largest_ratio(epsilon: float, delta: float, sample_rate: float, rounds: int) -> float:
    """Largest ratio with which so many rounds stay within (epsilon, delta).

    Raises
    ------
    AccountingError
        If no ratio from e^-16 on does.
    """

    def excess(log_ratio: float) -> float:
        return concentrated_epsilon(math.exp(log_ratio), sample_rate, rounds, delta) - epsilon

    low, high = -16.0, 6.0
    if excess(low) > 0:
        raise AccountingError(
            f"epsilon {epsilon:g} at delta {delta:g} cannot be reached in {rounds} rounds"
        )
    best = float(brentq(excess, low, high, xtol=1e-9))
    while excess(best) > 0:
        best -= 1e-9
    return math.exp(best)
