"""Where the noise and the Poisson coins come from.

Whoever can reproduce the noise can subtract it, so the default source is the operating system's
generator, never torch's or numpy's seedable ones.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

_LOGGER = logging.getLogger(__name__)
_WORD_BYTES = 8


class RandomSource(Protocol):
    """Independent normals and coins for one client."""

    @property
    def secure(self) -> bool:
        """Whether nobody, the owner of every seed included, can reproduce the draws."""
        ...

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """Return ``count`` independent uniform 64-bit words."""
        ...


class SecureSource:
    """Words from ``os.urandom``: the default, and the only source with a guarantee."""

    secure = True

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """Return ``count`` independent uniform 64-bit words."""
        return np.frombuffer(os.urandom(count * _WORD_BYTES), dtype=np.uint64)


class SeededTestSource:
    """Reproducible words for tests.  Voids every privacy guarantee, and says so.

    Parameters
    ----------
    seed : sequence of int
        For example (seed, client, round): a stream must never meet two different inputs, or
        their difference would come out without noise.
    """

    secure = False

    def __init__(self, seed: Sequence[int]) -> None:
        _LOGGER.warning(
            "privacy.insecure-test-seed is set: noise and batches are reproducible, so this "
            "run is NOT PRIVATE; for tests only"
        )
        self._generator = np.random.Generator(np.random.PCG64(list(seed)))

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """Return ``count`` uniform 64-bit words of the seeded stream."""
        return self._generator.integers(0, 2**64, size=count, dtype=np.uint64)


def standard_normal(source: RandomSource, shape: Sequence[int]) -> torch.Tensor:
    """Draw independent N(0, 1) values, float64 on the CPU.

    One word makes one value by inversion: 63 bits choose a probability in (0, 1/2], whose
    normal quantile is at most 0, and one bit the sign.  Using the lower tail only keeps full
    relative precision out to 9.1 standard deviations, where 64 bits end.
    """
    words = source.words(int(np.prod(shape, dtype=np.int64)))
    magnitude = (words >> np.uint64(1)).astype(np.float64) + 0.5
    quantile: torch.Tensor = torch.special.ndtri(torch.from_numpy(np.ldexp(magnitude, -64)))
    sign = torch.from_numpy(1.0 - 2.0 * (words & np.uint64(1)).astype(np.float64))
    return torch.mul(quantile, sign).reshape(tuple(shape))


def coins(source: RandomSource, count: int, rate: float) -> npt.NDArray[np.bool_]:
    """Toss ``count`` independent coins that show ``True`` with probability ``rate``.

    Exact to 2^-64, rounded down: never more often than the rate that is accounted.
    """
    if rate >= 1:
        return np.ones(count, dtype=np.bool_)
    return source.words(count) < np.uint64(int(np.ldexp(rate, 64)))
