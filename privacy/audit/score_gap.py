"""A lower bound on mu from the gap between the scores of included and excluded canaries."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import nct

from .trade_off import gaussian_epsilon

_LARGEST_MU = 1e4


def mu_from_score_gap(
    scores: npt.NDArray[np.float64],
    included: npt.NDArray[np.bool_],
    *,
    confidence: float = 0.95,
) -> float:
    """Lower bound on the gap of two normal score distributions, in their standard deviations.

    Parameters
    ----------
    scores : numpy.ndarray
        (m,) scores of one run.
    included : numpy.ndarray
        (m,) the coins; at least 2 canaries on either side.
    confidence : float (default: 0.95)
        That the bound is below the gap.

    Returns
    -------
    float
        mu >= 0.

    Notes
    -----
    With n1 and n0 scores, means a and b, and the pooled variance s^2, the statistic ``(a - b) / (s
    sqrt(1/n1 + 1/n0))`` has a noncentral t distribution with n1 + n0 - 2 degrees of freedom and
    noncentrality ``mu / sqrt(1/n1 + 1/n0)``; the bound is the smallest mu under which a statistic
    as large has probability above ``1 - confidence``.

    Formal guarantee: below the gap mu with probability ``confidence`` IF the scores are
    independent and normal with one variance.  A mechanism whose output shows N(0, 1) without and
    N(mu, 1) with a record has at least that mu as its Gaussian differential privacy parameter
    (post-processing), so the bound is one on the mechanism's, too.  For gradient canaries in
    nearly orthogonal directions under Gaussian noise this holds up to the canaries' interference
    (of order m / d) and, with Poisson sampling, to the included scores' larger variance, which
    makes s larger and so the bound smaller.  Not valid for other noise or for canaries that move
    each other's scores: there use :mod:`privacy.audit.one_run`, which assumes neither.
    """
    if scores.shape != included.shape or scores.ndim != 1:
        raise ValueError(f"needs a score per coin, got shapes {scores.shape}, {included.shape}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    ins, outs = scores[included], scores[~included]
    if min(len(ins), len(outs)) < 2:
        raise ValueError(f"needs 2 canaries on either side, got {len(ins)} in and {len(outs)} out")
    degrees = len(scores) - 2
    pooled = (np.square(ins - ins.mean()).sum() + np.square(outs - outs.mean()).sum()) / degrees
    spread = math.sqrt(1 / len(ins) + 1 / len(outs))
    gap = float(ins.mean() - outs.mean())
    if gap <= 0:
        return 0.0
    statistic = gap / (math.sqrt(pooled) * spread) if pooled > 0 else math.inf
    if not statistic * spread < _LARGEST_MU:
        return _LARGEST_MU

    def excess(mu: float) -> float:
        return float(nct.sf(statistic, degrees, mu / spread)) - (1 - confidence)

    if excess(0.0) >= 0:
        return 0.0
    return float(brentq(excess, 0.0, statistic * spread, xtol=1e-6))


def epsilon_from_score_gap(
    scores: npt.NDArray[np.float64],
    included: npt.NDArray[np.bool_],
    *,
    delta: float,
    confidence: float = 0.95,
) -> float:
    """:func:`mu_from_score_gap` as an epsilon at ``delta``; guarantee and limits are the same."""
    return gaussian_epsilon(mu_from_score_gap(scores, included, confidence=confidence), delta)
