"""Lower bounds on epsilon from one run with many canaries, each included by a fair coin.

The auditor tosses a fair coin for each of m canaries, trains once on the included ones, and
guesses coins from what the mechanism released.  Too many right guesses refute the guarantee.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

from ..accounting import pld_epsilon
from .trade_off import GaussianTradeOff, PrivacyProfile, TradeOff, gaussian_epsilon

# Shares of the canaries that are guessed, fixed before anything is seen.  Few sure guesses serve
# large epsilons, many unsure ones serve small ones and Gaussian mechanisms.
SHARES = (1.0, 0.5, 0.2, 0.08)
_LARGEST_MU = 40.0
_LARGEST_EPSILON = 60.0


@dataclasses.dataclass(frozen=True)
class Guesses:
    """What an auditor guessed of the coins.

    Parameters
    ----------
    canaries : int
        m, with a fair and independent coin each.
    made : int
        r <= m guesses; the other canaries are abstained from.
    correct : int
        v <= r.
    """

    canaries: int
    made: int
    correct: int

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if not 0 <= self.correct <= self.made <= self.canaries or self.canaries < 1:
            raise ValueError(
                "needs 0 <= correct <= made <= canaries >= 1, got "
                f"{self.correct}, {self.made}, {self.canaries}"
            )


def guess(scores: npt.NDArray[np.float64], included: npt.NDArray[np.bool_], made: int) -> Guesses:
    """Guess "in" for the highest scores and "out" for the lowest, half of ``made`` each.

    Parameters
    ----------
    scores : numpy.ndarray
        (m,), a function of what was released and of public numbers; no coin may be in it.
    included : numpy.ndarray
        (m,), the coins; used for counting only.
    made : int
        How many guesses, chosen without looking at the scores.
    """
    if scores.shape != included.shape or scores.ndim != 1:
        raise ValueError(f"needs a score per coin, got shapes {scores.shape}, {included.shape}")
    order = np.argsort(scores, kind="stable")
    low, high = made // 2, made - made // 2
    right = int((~included[order[:low]]).sum())
    right += int(included[order[len(order) - high :]].sum())
    return Guesses(len(scores), made, right)


def p_value_approximate_dp(guesses: Guesses, epsilon: float, delta: float) -> float:
    """Bound on the probability of as many right guesses under (epsilon, delta)-DP.

    Notes
    -----
    The theorem for (epsilon, delta)-DP of Steinke, Nasr and Jagielski (2023, arXiv 2305.08846).
    With W binomial of r trials at ``e^eps / (1 + e^eps)`` and ``beta(v) = P[W >= v]``::

        P[right >= v]  <=  beta(v) + 2 m delta max_{1 <= i <= m} (beta(v - i) - beta(v)) / i

    Formal guarantee: holds for every (epsilon, delta)-DP mechanism and every guesser that makes
    at most r guesses, whatever the canaries are and however they interfere.
    """
    _check(epsilon, delta)
    made, correct = guesses.made, guesses.correct
    # 1 / (1 + e^-eps), and the exact 1 - p at large epsilons.
    least = binom.sf(np.arange(correct, -1, -1) - 1, made, 1 / (1 + math.exp(-epsilon)))
    # From v guesses on less, beta stays 1: the largest slope is among the first v.
    slopes = (least[1:] - least[0]) / np.arange(1, correct + 1)
    steepest = float(slopes.max()) if correct else 0.0
    return min(1.0, float(least[0]) + 2 * guesses.canaries * delta * steepest)


def epsilon_bound(guesses: Guesses, *, delta: float, risk: float) -> float:
    """Largest epsilon that is refuted at ``risk``: the plain form, for any mechanism.

    Formal guarantee: that of :func:`p_value_approximate_dp`: above the true epsilon with
    probability at most ``risk``.
    """
    return _largest_refuted(
        lambda epsilon: p_value_approximate_dp(guesses, epsilon, delta) <= risk, _LARGEST_EPSILON
    )


def is_refuted(guesses: Guesses, trade_off: TradeOff, risk: float) -> bool:
    """Whether as many right guesses have probability below ``risk`` under f-DP.

    Parameters
    ----------
    guesses : Guesses
        r guesses of m coins, v of them right.
    trade_off : TradeOff
        f, symmetric and convex.
    risk : float
        In (0, 1).

    Notes
    -----
    Formal guarantee: if the mechanism is f-DP for each single canary, whatever the others are,
    this is true with probability at most ``risk``.  No independence of scores and no shape of the
    noise is assumed beyond f.  The inequality is that of Mahloujifar, Melis and Chaudhuri (2024,
    arXiv 2410.22235) for a bounded number of guesses.  The argument in short, with p_c
    the probability of exactly c right guesses:

    Fix all coins but the i-th.  The event "i is guessed 'in', and with it at least u guesses are
    right" has probability P with coin 'in' and Q with coin 'out'; there one guess fewer is right.
    f-DP gives ``P <= 1 - f(Q)``, and the same for 'out'.  ``1 - f`` is concave, so the inequality
    survives the mean over both sides, over all coins and over i.  With ``A_u = sum_{c >= u} c p_c
    / m`` (guessed right, at least u right) and ``B_u = sum_{c >= u - 1} (r - c) p_c / m`` (guessed
    wrong, at least u - 1 right) this is ``A_u <= 1 - f(B_u)``, or, f being symmetric,
    ``B_u >= f(1 - A_u)``, for u = 1, ..., r.

    Is there a distribution p with ``sum_{c >= v} p_c = risk`` that meets all of these?  Moving mass
    from above v down to v, and from any u < v to u - 1 where the constraint at u + 1 is slack,
    breaks no constraint and adds no mass.  So if there is one, then also the one that puts
    ``risk`` on v and then, from u = v - 1 down to 0, just as much as the constraint at u + 1
    asks for.  If that takes more than a total of 1, there is none, and "at least v" is less
    probable than ``risk``.
    """
    if not 0 < risk < 1:
        raise ValueError(f"risk must be in (0, 1), got {risk}")
    made, correct, share = guesses.made, guesses.correct, guesses.made / guesses.canaries
    right = risk * correct / guesses.canaries
    wrong = risk * (made - correct) / guesses.canaries
    for fewer in range(correct - 1, -1, -1):
        asked = max(0.0, trade_off(1 - right) - wrong)
        wrong += asked
        right += asked * fewer / (made - fewer)
        if right + wrong > share * (1 + 1e-12):
            return True
    return False


def mu_bound(guesses: Guesses, *, risk: float) -> float:
    """Largest mu of Gaussian differential privacy that is refuted at ``risk``.

    Formal guarantee: if the mechanism is mu-GDP (an unsampled Gaussian mechanism is), the result
    is above mu with probability at most ``risk``; see :func:`is_refuted`.
    """
    return _largest_refuted(lambda mu: is_refuted(guesses, GaussianTradeOff(mu), risk), _LARGEST_MU)


def gaussian_epsilon_bound(guesses: Guesses, *, delta: float, risk: float) -> float:
    """Lower bound on epsilon at ``delta``: the Gaussian form, :func:`mu_bound` converted.

    Formal guarantee: below the true epsilon with probability at least ``1 - risk`` if the
    mechanism's trade-off function is a Gaussian one, or lies above the Gaussian one of the same
    epsilon at ``delta``.  A subsampled mechanism's is Gaussian only in the limit, and whether it
    lies above is a matter of its numbers (tested for those of the audit); where that is not
    known, use :func:`accounted_epsilon_bound`, which compares like with like.
    """
    return gaussian_epsilon(mu_bound(guesses, risk=risk), delta)


def accounted_epsilon_bound(
    guesses: Guesses,
    *,
    sample_rate: float,
    noise_multiplier: float,
    steps: int,
    delta: float,
    risk: float,
) -> float:
    """Lower bound on epsilon among Poisson-subsampled Gaussian mechanisms of one rate and length.

    Noise multipliers on a grid of factors ``2^(k/8)`` around the claimed one, from 8 times as large
    to a 16th, are tried by their own trade-off functions (by PLD); the result is the epsilon of
    the smallest that is refuted.

    Parameters
    ----------
    guesses : Guesses
        Of one run.
    sample_rate, noise_multiplier, steps
        The claim.
    delta : float
        Where epsilon is read off.
    risk : float
        Of a bound above the truth.

    Returns
    -------
    float
        Epsilon >= 0, by the same accountant as the claim's; 0 if none is refuted.  Where even the
        smallest is refuted, its epsilon: the truth is larger.

    Notes
    -----
    Formal guarantee: if the mechanism is as private as ``steps`` Poisson-subsampled Gaussian steps
    at rate q with some noise multiplier, the result is above that mechanism's epsilon with
    probability at most ``risk`` (:func:`is_refuted`; of a refuted noise multiplier all larger ones
    are refuted, too).  In particular it exceeds a true claim with probability at most ``risk``.
    """

    def noise(index: int) -> float:
        return noise_multiplier * math.pow(2.0, -index / 8)

    def refuted(index: int) -> bool:
        return is_refuted(guesses, _curve(sample_rate, noise(index), steps), risk)

    low, high = -25, 33  # beyond either end: refuted by decree, and not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    if low == -25:
        return 0.0
    epsilon: float = pld_epsilon(
        sample_rate=sample_rate,
        noise_multiplier=noise(low),
        steps=steps,
        delta=delta,
        interval=1e-3,
    )
    return epsilon


@functools.lru_cache(maxsize=256)
def _curve(sample_rate: float, noise_multiplier: float, steps: int) -> PrivacyProfile:
    return PrivacyProfile.of_steps(
        sample_rate=sample_rate, noise_multiplier=noise_multiplier, steps=steps, interval=2e-3
    )


def best_bound(
    scores: npt.NDArray[np.float64],
    included: npt.NDArray[np.bool_],
    bound: Callable[[Guesses, float], float],
    *,
    confidence: float = 0.95,
    shares: Sequence[float] = SHARES,
) -> float:
    """Largest bound over several numbers of guesses, which share the risk.

    Parameters
    ----------
    scores, included
        As in :func:`guess`.
    bound : callable
        ``bound(guesses, risk)``, one of those above.
    confidence : float (default: 0.95)
        Of the result: each share has ``(1 - confidence) / len(shares)`` of risk.
    shares : sequence of float
        Shares of the canaries to guess, chosen without looking at the scores.
    """
    risk = (1 - confidence) / len(shares)
    counts = [max(2, round(share * len(scores))) for share in shares]
    return max(bound(guess(scores, included, made), risk) for made in counts)


def _largest_refuted(refuted: Callable[[float], bool], limit: float) -> float:
    """Largest refuted number, to 1e-4, of a family that is refuted from 0 up to some point."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while high < limit and refuted(high):
        low, high = high, 2 * high
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _check(epsilon: float, delta: float) -> None:
    if not epsilon >= 0:
        raise ValueError(f"epsilon must be >= 0, got {epsilon}")
    if not 0 <= delta <= 1:
        raise ValueError(f"delta must be in [0, 1], got {delta}")
