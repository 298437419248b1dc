"""Exact samples from the discrete Gaussian.

``P(x) ~ exp(-x^2 / (2 sigma^2))`` on the integers.  Canonne, Kamath and Steinke ("The Discrete
Gaussian for Differential Privacy", 2020, arXiv 2004.00010, algorithms 1 to 3) draw it without any
rounding of probabilities, so nothing can be read off the low bits of floating-point numbers.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .randomness import RandomSource

Int64s = npt.NDArray[np.int64]
# x^2 and 2 sigma^2 of the exact path stay whole numbers; |x| stays far below 2^63.
LARGEST_SIGMA = 2**40
# An argument computed in float64 is off by less than this times (1 + argument): see _decide.
_MARGIN = 2.0**-44
_WORD = 2.0**-64


def sample_discrete_gaussian(source: RandomSource, sigma: int, count: int) -> Int64s:
    """Draw independent values with ``P(x)`` proportional to ``exp(-x^2 / (2 sigma^2))``.

    Parameters
    ----------
    source : RandomSource
        Uniform words; nothing else is random.
    sigma : int
        Scale, from 1 to 2^40.  A whole number keeps all probabilities exact.
    count : int
        Values to draw.

    Returns
    -------
    array of int64
        Shape (count,); within a fraction of the standard deviation of N(0, sigma^2) each.

    Raises
    ------
    ValueError
        If sigma or count is out of range.

    Notes
    -----
    Formal guarantee: the distribution is exactly the discrete Gaussian if the words are uniform.
    Proposals come from the discrete Laplace of scale ``t = sigma + 1`` (algorithm 2) and are kept
    with probability ``exp(-(|x| - sigma^2 / t)^2 / (2 sigma^2))`` (algorithm 3).  Each coin is
    decided by as many bits of it as are needed.  Not covered: the time taken, which depends on
    what is drawn and rejected.
    """
    if not 1 <= sigma <= LARGEST_SIGMA or sigma != int(sigma):
        raise ValueError(f"sigma must be a whole number from 1 to 2^40, got {sigma}")
    if count < 0:
        raise ValueError(f"count must be >= 0, got {count}")
    t = int(sigma) + 1
    variance = int(sigma) ** 2
    drawn: list[Int64s] = []
    missing = count
    while missing:
        # About 1.4 proposals make one value.
        proposed = _discrete_laplace(source, t, missing + missing // 2 + 8)
        # (|x| - sigma^2 / t)^2 / (2 sigma^2) = (|x| t - sigma^2)^2 / (2 sigma^2 t^2)
        centred = np.abs(proposed).astype(np.float64) - variance / t
        rough = np.square(centred) / (2.0 * variance)

        def exact(place: int, proposed: Int64s = proposed) -> tuple[int, int]:
            distance = abs(int(proposed[place])) * t - variance
            return distance**2, 2 * variance * t**2

        kept = proposed[_bernoulli_exp(source, rough, exact)][:missing]
        drawn.append(kept)
        missing -= len(kept)
    return np.concatenate([np.empty(0, np.int64), *drawn])


def _discrete_laplace(source: RandomSource, t: int, count: int) -> Int64s:
    """Values with ``P(x)`` proportional to ``exp(-|x| / t)`` (algorithm 2 with s = 1)."""
    drawn: list[Int64s] = []
    missing = count
    while missing:
        low = _uniform(source, t, 2 * missing + 8)

        def of_low(place: int, low: Int64s = low) -> tuple[int, int]:
            return int(low[place]), t

        low = low[_bernoulli_exp(source, low / t, of_low)]
        magnitude = low + t * _geometric(source, len(low))
        negative = (source.words(len(low)) & np.uint64(1)).astype(bool)
        kept = ~(negative & (magnitude == 0))  # or zero would come twice as often
        drawn.append(np.where(negative, -magnitude, magnitude)[kept][:missing])
        missing -= len(drawn[-1])
    return np.concatenate([np.empty(0, np.int64), *drawn])


def _geometric(source: RandomSource, count: int) -> Int64s:
    """How often a coin of probability 1/e shows heads before its first tails."""
    heads = np.zeros(count, np.int64)
    running = np.arange(count)
    while len(running):
        running = running[_bernoulli_exp(source, np.ones(len(running)), lambda _: (1, 1))]
        heads[running] += 1
    return heads


def _uniform(source: RandomSource, below: int, count: int) -> Int64s:
    """Uniform whole numbers in [0, below), exactly."""
    limit = 2**64 - 2**64 % below  # a multiple of ``below``: the rest is drawn again
    drawn: list[npt.NDArray[np.uint64]] = []
    missing = count
    while missing:
        words = source.words(missing)
        words = words[words <= np.uint64(limit - 1)]
        drawn.append(words)
        missing -= len(words)
    words = np.concatenate([np.empty(0, np.uint64), *drawn])
    return (words % np.uint64(below)).astype(np.int64)


def _bernoulli_exp(
    source: RandomSource,
    rough: npt.NDArray[np.float64],
    exact: Callable[[int], tuple[int, int]],
) -> npt.NDArray[np.bool_]:
    """Coins that show True with probability exp(-x), exactly.

    Parameters
    ----------
    source : RandomSource
        Uniform words.
    rough : array of float64
        x >= 0 up to rounding.
    exact : callable
        ``exact(place)``: x as numerator and denominator.

    Notes
    -----
    A uniform number U below exp(-x) is heads.  64 bits of U and a float64 decide almost always;
    where they are too close to tell, more bits of U are drawn and exp(-x) is computed to more
    digits, until it is certain.
    """
    words = source.words(len(rough))
    uniform = words.astype(np.float64) * _WORD  # off by 2^-54 and up to one word at most
    probability = np.exp(-rough)
    margin = _MARGIN * (1.0 + rough)
    heads = uniform < probability
    for place in np.flatnonzero(np.abs(uniform - probability) <= margin):
        heads[place] = _decide(source, int(words[place]), *exact(int(place)))
    return heads


def _decide(source: RandomSource, bits: int, numerator: int, denominator: int) -> bool:
    """Whether U < exp(-numerator / denominator), U being 0.bits and as many bits as it takes."""
    length = 64
    while True:
        # Decimal's exp is correctly rounded; 20 digits more than U has leave room for the rest.
        digits = math.ceil(length * math.log10(2)) + 20
        with decimal.localcontext() as context:
            context.prec, context.Emin, context.Emax = digits, -(10**9), 10**9
            x = decimal.Decimal(numerator) / decimal.Decimal(denominator)
            value = (-x).exp()
            # x is off by 10^(1 - digits) of itself, its exponential by (x + 1) as much of 1.
            error = (x + 2) * decimal.Decimal(10) ** (2 - digits)
            scale = decimal.Decimal(2) ** length
            context.prec = digits + length
            low, high = (value - error) * scale, (value + error) * scale
        if bits + 1 <= low:
            return True
        if bits >= high:
            return False
        bits = (bits << 64) | int(source.words(1)[0])
        length += 64
