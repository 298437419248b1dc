"""Trade-off functions: how well one record's presence can be told under a privacy guarantee.

For events E of a mechanism's output, P(E) with the record and Q(E) without it, a guarantee says
``P(E) <= 1 - f(Q(E))`` and the same with P and Q exchanged (Dong, Roth and Su, Gaussian
differential privacy, 2022, Definitions 2.1 and 2.3).  ``f`` is convex and falls.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr, ndtri

# No epsilon of an audit comes near it; above it the search below has no number to find.
_LARGEST_EPSILON = 500.0


class TradeOff(Protocol):
    """A symmetric trade-off function."""

    def __call__(self, alpha: float) -> float:
        """Least type II error of a test with type I error ``alpha``, both in [0, 1]."""
        ...


@dataclasses.dataclass(frozen=True)
class GaussianTradeOff:
    """That of N(0, 1) against N(mu, 1): ``f(alpha) = Phi(Phi^-1(1 - alpha) - mu)``.

    Dong et al. (2022), Section 2.2.  A Gaussian mechanism without subsampling has exactly this
    one, at ``mu = sqrt(steps) / noise multiplier``.

    Parameters
    ----------
    mu : float
        At least 0; 0 is perfect privacy.
    """

    mu: float

    def __call__(self, alpha: float) -> float:
        """Least type II error at level ``alpha``."""
        return float(ndtr(-ndtri(alpha) - self.mu))


@dataclasses.dataclass(frozen=True)
class PrivacyProfile:
    """That of a mechanism which is (epsilon_i, delta_i)-DP for every i.

    The largest of the pieces ``1 - delta - e^epsilon alpha`` and
    ``e^-epsilon (1 - delta - alpha)`` (Dong et al., 2022, Proposition 2.5).

    Parameters
    ----------
    epsilons, deltas : numpy.ndarray
        (k,) each; one pair is plain (epsilon, delta)-DP.
    """

    epsilons: npt.NDArray[np.float64]
    deltas: npt.NDArray[np.float64]

    def __call__(self, alpha: float) -> float:
        """Least type II error at level ``alpha``."""
        steep = 1 - self.deltas - np.exp(self.epsilons) * alpha
        flat = np.exp(-self.epsilons) * (1 - self.deltas - alpha)
        return max(0.0, float(steep.max()), float(flat.max()))

    @classmethod
    def of_steps(
        cls,
        *,
        sample_rate: float,
        noise_multiplier: float,
        steps: int,
        epsilons: Sequence[float] | None = None,
        interval: float = 1e-3,
    ) -> Self:
        """Profile of Poisson-subsampled Gaussian steps, zero-out adjacency, by PLD.

        Parameters
        ----------
        sample_rate, noise_multiplier, steps
            As in :func:`~privacy.accounting.pld_epsilon`.
        epsilons : sequence of float (default: 81 numbers from 0 to 20, closer near 0)
            Where to read the profile off.  Fewer give a smaller f, which still holds.
        interval : float (default: 1e-3)
            Discretisation of the privacy loss, rounded to the pessimistic side.
        """
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {sample_rate}")
        if not noise_multiplier > 0 or steps < 1:
            raise ValueError(
                f"noise_multiplier must be > 0 and steps >= 1, got {noise_multiplier} and {steps}"
            )
        points = np.linspace(0, 1, 81) ** 2 * 20 if epsilons is None else np.asarray(epsilons)
        one = pld.from_gaussian_mechanism(
            standard_deviation=noise_multiplier,
            sensitivity=1.0,
            sampling_prob=sample_rate,
            pessimistic_estimate=True,
            value_discretization_interval=interval,
            use_connect_dots=True,
            neighboring_relation=pld.NeighborRel.REPLACE_SPECIAL,  # one record zeroed out
        )
        deltas = one.self_compose(steps).get_delta_for_epsilon(points)
        return cls(points.astype(np.float64), np.asarray(deltas, dtype=np.float64))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Smallest epsilon for which a mu-GDP mechanism is (epsilon, delta)-DP.

    Solves ``delta = Phi(-eps/mu + mu/2) - e^eps Phi(-eps/mu - mu/2)`` (Balle and Wang, 2018,
    Theorem 8; Dong et al., 2022, Corollary 2.13).

    Parameters
    ----------
    mu : float
        At least 0.
    delta : float
        In (0, 1).

    Returns
    -------
    float
        At least 0; ``inf`` above 500.
    """
    _check_delta(delta)
    if not mu >= 0:
        raise ValueError(f"mu must be >= 0, got {mu}")

    def excess(epsilon: float) -> float:
        return gaussian_delta(mu, epsilon) - delta

    if mu == 0 or excess(0.0) <= 0:
        return 0.0
    if not excess(_LARGEST_EPSILON) < 0:
        return math.inf
    return float(brentq(excess, 0.0, _LARGEST_EPSILON, xtol=1e-9))


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Delta of a mu-GDP mechanism at ``epsilon``; see :func:`gaussian_epsilon`."""
    if mu == 0:
        return 0.0
    # e^eps Phi(-b) in logarithms: its factors leave a float's range one by one.
    tail = epsilon + float(log_ndtr(-epsilon / mu - mu / 2))
    return float(ndtr(-epsilon / mu + mu / 2) - math.exp(min(tail, 0.0)))


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Mu of the Gaussian mechanism that is exactly (epsilon, delta)-DP, epsilon > 0."""
    _check_delta(delta)
    if not 0 < epsilon < _LARGEST_EPSILON:
        raise ValueError(f"epsilon must be in (0, {_LARGEST_EPSILON:g}), got {epsilon}")
    return float(brentq(lambda mu: gaussian_delta(mu, epsilon) - delta, 1e-6, 100.0, xtol=1e-10))


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
