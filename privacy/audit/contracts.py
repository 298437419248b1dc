"""Tests of a client's contract that canaries are too weak to make: exact, or with a known risk.

Each returns a :class:`Finding`.  The statistical ones state at which probability they fail code
that is right.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, chi2
from torch import Tensor

RISK = 1e-4
"""Probability with which each statistical test below fails code that is right."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a detector found.

    Parameters
    ----------
    detector : str
        Its name.
    passed : bool
        Whether the code keeps the contract, as far as this detector sees.
    value, limit : float
        The number that decided, and what it must not exceed.
    detail : str
        What the number is, for a reader.
    """

    detector: str
    passed: bool
    value: float
    limit: float
    detail: str

    @classmethod
    def at_most(cls, detector: str, value: float, limit: float, detail: str) -> Finding:
        """Passed if ``value <= limit``; a NaN fails."""
        return cls(detector, bool(value <= limit), float(value), float(limit), detail)


def lower_bounds(
    bounds: Mapping[str, float], claimed: float, detector: str = "canaries"
) -> Finding:
    """No lower bound on epsilon, by name of its estimator, may lie above the claim.

    Fails right code with the estimators' own risks, added up.
    """
    each = ", ".join(f"{name} {value:.2f}" for name, value in bounds.items())
    detail = f"largest lower bound on epsilon, and the claim ({each})"
    return Finding.at_most(detector, max(bounds.values()), claimed, detail)


def sensitivity(
    pairs: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]], clip_norm: float
) -> Finding:
    """One record may move the clipped sum by at most C.

    Parameters
    ----------
    pairs : sequence of pairs of dicts of str to Tensor
        Clipped sums with and without one record, all tensors together.
    clip_norm : float
        C.

    Notes
    -----
    The limit is C (1 + 1e-4): float32 sums of a few hundred records differ in their last digits.
    """
    worst = 0.0
    for with_record, without in pairs:
        squares = [
            float((with_record[name].double() - without[name].double()).square().sum())
            for name in with_record
        ]
        worst = max(worst, math.sqrt(sum(squares)))
    return Finding.at_most(
        "sensitivity", worst / clip_norm, 1 + 1e-4, "most that one record moves the sum, over C"
    )


def noise_scale(
    residuals: Sequence[npt.NDArray[np.floating]], std: float, detector: str = "noise"
) -> Finding:
    """What should be pure noise must have the standard deviation that is stated, group by group.

    Groups are tensors (one that is not noised) or steps (a normaliser that follows the drawn
    batch, a step without noise), which the whole would hide.

    Parameters
    ----------
    residuals : sequence of numpy.ndarray
        Groups of values, of any shape, that are independent and N(0, std^2) if the code is right.
    std : float
        What it must be.
    detector : str (default: "noise")
        Name in the finding.

    Notes
    -----
    Two-sided chi-square test of ``sum(r^2) / std^2`` in each group; the groups share
    :data:`RISK` (Bonferroni), with which right code fails.
    """
    risk = RISK / len(residuals)
    groups = [np.asarray(group, dtype=np.float64).ravel() / std for group in residuals]
    totals = [float(np.square(group).sum()) for group in groups]
    tails = [
        2 * min(chi2.cdf(total, group.size), chi2.sf(total, group.size))
        for total, group in zip(totals, groups, strict=True)
    ]
    at = int(np.argmin(tails))
    size, ratio = groups[at].size, math.sqrt(totals[at] / groups[at].size)
    low, high = (math.sqrt(x / size) for x in chi2.ppf([risk / 2, 1 - risk / 2], size))
    detail = "measured noise over the stated one in the least likely group, and the nearer limit"
    limit = high if ratio > 1 else low
    return Finding(detector, bool(min(tails) >= risk), ratio, limit, detail)


def sampling(
    batches: Sequence[npt.NDArray[np.int64]], num_records: int, sample_rate: float
) -> Finding:
    """Records must enter steps as independent coins at the stated rate would have them.

    Parameters
    ----------
    batches : sequence of numpy.ndarray
        Records that entered each step; steps without any included.
    num_records : int
        N.
    sample_rate : float
        The rate that is accounted.

    Notes
    -----
    Three tests share :data:`RISK`: a binomial one of all inclusions (a rate that is not the stated
    one), a chi-square one of the batch sizes' dispersion (batches of one size, shuffled epochs),
    and a record twice in a batch, which no coin can do.
    """
    sizes = np.array([len(batch) for batch in batches])
    trials = num_records * len(batches)
    rate = float(binomtest(int(sizes.sum()), trials, sample_rate).pvalue)
    expected, variance = num_records * sample_rate, num_records * sample_rate * (1 - sample_rate)
    if variance > 0:
        dispersion = float(np.square(sizes - expected).sum() / variance)
        spread = 2 * min(chi2.cdf(dispersion, len(sizes)), chi2.sf(dispersion, len(sizes)))
    else:
        spread = 1.0 if bool((sizes == num_records).all()) else 0.0
    once = all(len(np.unique(batch)) == len(batch) for batch in batches)
    passed = bool(min(rate, spread) > RISK / 2) and once
    measured = float(sizes.sum()) / trials
    return Finding(
        "sampling",
        passed,
        measured / sample_rate,
        1.0,
        f"inclusions over the stated rate; p = {rate:.2g} of the rate, {spread:.2g} of the sizes",
    )


def unrelated(first: npt.NDArray[np.floating], second: npt.NDArray[np.floating]) -> Finding:
    """Two releases on the same input must not share their noise.

    Notes
    -----
    The correlation of n pairs of independent values is within ``4.06 / sqrt(n)`` but for a
    probability of 5e-5 or so (normal approximation, n in the thousands).
    """
    a, b = (x.astype(np.float64).ravel() - x.mean() for x in (first, second))
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    correlation = abs(float(a @ b)) / scale if scale > 0 else math.inf
    return Finding.at_most(
        "fresh noise", correlation, 4.06 / math.sqrt(a.size), "correlation of two releases' noise"
    )
