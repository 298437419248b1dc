"""A mean over clients that a few of them cannot move far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from logging import WARNING

import numpy as np
import numpy.typing as npt
from flwr.common import log

from .replies import Float64s, WeightedMean

Pairs = npt.NDArray[np.complex128]


class TrimmedMean:
    """Coordinate-wise weighted trimmed mean of updates (Yin et al. 2018, arXiv 1803.01498).

    Of n replies, ``k = floor(trim n)`` with the smallest and k with the largest values are
    dropped in each coordinate, and the rest averaged with their weights.  Of equal values, the
    one with the larger weight counts as the larger, so that the order of arrival does not matter.

    Parameters
    ----------
    trim : float
        Share of the replies dropped at each end, in [0, 0.5).
    asked : int
        Clients asked in this round; no more updates than that can be added.

    Attributes
    ----------
    plain : WeightedMean
        The ordinary mean of the same updates.  Scores hold for it only, so they are not robust
        beyond the bound on each update's norm.

    Notes
    -----
    Formal statement: with at most k malicious replies of n, every value of the mean lies between
    the smallest and the largest that honest clients sent.  Privacy is unchanged: this is
    post-processing of updates that are already noised.

    The price: the mean is biased towards the majority when clients differ, and noise averages out
    a little less.  With equal weights, many clients and Gaussian noise, its variance is 1.06 times
    the plain mean's at ``trim = 0.1``, and rises to pi / 2 times (the median's) towards 0.5.

    Not covered: k counts replies, not weight.  A client that declares a huge weight dominates the
    coordinates in which it is not dropped.

    Memory per coordinate is ``2 floor(trim asked)`` pairs of 16 bytes, and three sums.  Extremes
    are kept apart and never subtracted from a sum: 1e30 would leave nothing of the others.
    """

    def __init__(self, trim: float, asked: int) -> None:
        if not 0 <= trim < 0.5:
            raise ValueError(f"trim must be in [0, 0.5), got {trim}")
        if asked < 1:
            raise ValueError(f"asked must be >= 1, got {asked}")
        self.plain = WeightedMean()
        self._trim = trim
        self._asked = asked
        self._size = _trimmed(trim, asked)
        self._tensors: dict[str, _Ranks] = {}

    @property
    def count(self) -> int:
        """Updates added so far."""
        return self.plain.count

    def add(self, update: Mapping[str, npt.NDArray[np.float32]], weight: float) -> None:
        """Fold one update in; all have the same tensors, and at most ``asked`` come."""
        if self.count >= self._asked:
            raise ValueError(f"only {self._asked} clients were asked, and one more update came")
        for name, value in update.items():
            if name not in self._tensors:
                self._tensors[name] = _Ranks(self._size, value.shape)
            self._tensors[name].add(value, weight)
        self.plain.add(update, weight)

    def mean(self) -> dict[str, Float64s]:
        """Trimmed mean of what was added; empty if nothing was."""
        k = _trimmed(self._trim, self.count)
        if k == 0 < self._trim and self.count:
            text = "trim = %g of %d replies drops none: this is the ordinary mean"
            log(WARNING, text, self._trim, self.count)
        return {name: ranks.mean(k) for name, ranks in self._tensors.items()}


def _trimmed(trim: float, count: int) -> int:
    """Values dropped at either end; 0.29 of 100 are 29, though their product is below."""
    return min(math.floor(trim * count + 1e-9), max(count - 1, 0) // 2)


class _Ranks:
    """One tensor's ``size`` smallest and largest values so far, and sums of those between.

    Value and weight are the parts of a complex number: numpy orders those by real, then by
    imaginary part.  They are only compared.
    """

    def __init__(self, size: int, shape: tuple[int, ...]) -> None:
        self._size = size
        self._low: list[Pairs] = []  # ascending
        self._high: list[Pairs] = []  # descending
        self._sum: Float64s = np.zeros(shape)
        self._weight: Float64s = np.zeros(shape)

    def add(self, value: npt.NDArray[np.float32], weight: float) -> None:
        """Sort one reply's values in; what they push out of both buffers is summed."""
        pair = np.empty(value.shape, np.complex128)
        pair.real, pair.imag = value, weight
        rest = self._push(self._high, pair, np.maximum, np.minimum)
        if rest is not None:
            rest = self._push(self._low, rest, np.minimum, np.maximum)
        if rest is not None:
            self._sum += rest.imag * rest.real
            self._weight += rest.imag

    def _push(self, slots: list[Pairs], rest: Pairs, keep: np.ufunc, go: np.ufunc) -> Pairs | None:
        for slot in slots:
            going = np.empty_like(rest)
            go(slot, rest, out=going)
            keep(slot, rest, out=slot)
            rest = going
        if len(slots) < self._size:
            slots.append(rest)
            return None
        return rest

    def mean(self, k: int) -> Float64s:
        """Weighted mean without the ``k`` smallest and largest; k is less than half of all."""
        # By rank.  The sums belong in the middle; they are empty unless both buffers are full.
        ranks = self._low + self._high[::-1]
        total, weight = self._sum.copy(), self._weight.copy()
        for value in ranks[k : len(ranks) - k]:
            total += value.imag * value.real
            weight += value.imag
        return total / weight
