"""Differential privacy for whole clients with noise of their own, under secure aggregation.

Each client clips its update, rounds it to whole numbers, adds its share of discrete Gaussian noise
and sends it masked; the server learns the sum modulo 2^32 (Kairouz, Liu and Steinke, "The
Distributed Discrete Gaussian Mechanism for Federated Learning with Secure Aggregation", 2021,
arXiv 2102.06387).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq

from .accounting import AccountingError
from .client_level import clip_update
from .discrete_gaussian import LARGEST_SIGMA, sample_discrete_gaussian
from .randomness import RandomSource, SecureSource, SeededTestSource, coins
from .settings import PrivacySettings

Float64s = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint32]

MODULUS = 2**32
# ln(1 / probability) that any sum of a run leaves [-2^31, 2^31).
_LOG_WRAP = 40 * math.log(2)
# Float64's rounding in clipping: see clip_update.
_CLIP_ROUNDING = 1 + 1e-9
# Rounding may add this share of the clip norm at most; with more, units are too coarse.
_LARGEST_INFLATION = 0.25
_ORDERS = 1 + np.geomspace(1e-3, 1e6, 4000)
_COINS, _NOISE, _ROUNDING = 2, 0, 1


def zcdp_epsilon(rho: float, delta: float) -> float:
    """Epsilon of a rho-zCDP mechanism at delta (Canonne, Kamath, Steinke 2020, corollary 13).

    ``min over a > 1 of a rho + (ln(1 / delta) + a ln(1 - 1 / a) - ln(a - 1)) / (a - 1)``; any order
    gives an upper bound, so a grid of orders does.
    """
    if rho == 0:
        return 0.0
    a = _ORDERS
    terms = -math.log(delta) + a * np.log1p(-1 / a) - np.log(a - 1)
    return max(0.0, float(np.min(a * rho + terms / (a - 1))))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DistributedPlan:
    """All numbers of a run with distributed noise, fixed before its first round.

    Parameters
    ----------
    max_update_norm : float
        Clip norm S of one client's whole update of a round.
    values : int
        Most values d that a round's update has.
    sample_rate : float
        Probability with which the server asks each client; nothing is credited for it.
    registered_clients : int
        Most clients N of a sum.
    least_clients : int
        Fewest clients of a sum that is ever unmasked.
    colluding_clients : int
        How many of them may tell the server their noise.
    scale : float
        Whole-number units in 1.0, a power of two.
    sigma : int
        Scale of each client's noise share, in units.
    rounds : int
        Most rounds.
    target_delta : float
        Delta at which epsilon is stated.

    Notes
    -----
    Formal guarantee: with D = :attr:`sensitivity`, n = ``least_clients - colluding_clients`` honest
    shares and ``tau = 10 sum_{k=1}^{n-1} exp(-2 pi^2 sigma^2 k / (k + 1))``, each sum is
    ``e^2 / 2``-zCDP with ``e = D / (sqrt(n) sigma) + tau sqrt(d)`` (Kairouz et al. 2021,
    proposition 14), and ``rounds`` sums are (``epsilon()``, ``target_delta``)-DP per client
    (zero-out: its rounded update counts, or zero in its place).  It holds against whoever sees the
    sums, the server included, and against ``colluding_clients`` clients that tell all they know.
    More honest shares than n only add noise; reduction modulo 2^32 is post-processing.

    Not covered: a server that sees single vectors (secure aggregation must hold); whether a client
    answers; dropout below ``least_clients``, at which the sum must not be unmasked.
    """

    max_update_norm: float
    values: int
    sample_rate: float
    registered_clients: int
    least_clients: int
    colluding_clients: int
    scale: float
    sigma: int
    rounds: int
    target_delta: float

    def __post_init__(self) -> None:
        """Refuse numbers that no mechanism could have."""
        if not 0 < self.max_update_norm < math.inf:
            raise ValueError(f"max_update_norm must be > 0, got {self.max_update_norm}")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {self.sample_rate}")
        if not 0 <= self.colluding_clients < self.least_clients <= self.registered_clients:
            raise ValueError(
                "0 <= colluding_clients < least_clients <= registered_clients must hold, got "
                f"{self.colluding_clients}, {self.least_clients}, {self.registered_clients}"
            )
        if self.values < 1 or self.rounds < 1:
            raise ValueError(f"values and rounds must be >= 1, got {self.values}, {self.rounds}")
        if not 0 < self.target_delta < 1:
            raise ValueError(f"target_delta must be in (0, 1), got {self.target_delta}")
        if not 1 <= self.sigma <= LARGEST_SIGMA:
            raise ValueError(f"sigma must be from 1 to {LARGEST_SIGMA}, got {self.sigma}")
        if math.frexp(self.scale)[0] != 0.5:
            raise ValueError(f"scale must be a power of two, got {self.scale}")
        if self.wrap_exponent < _LOG_WRAP:
            raise ValueError(
                f"sums of {self.registered_clients} clients at scale {self.scale:g} and sigma "
                f"{self.sigma} do not fit into 32 bits"
            )

    @classmethod
    def for_run(cls, settings: PrivacySettings, *, rounds: int, values: int) -> Self:
        """Make the plan of a run: the noise that its budget needs, and the finest units that fit.

        Raises
        ------
        AccountingError
            If no noise meets the budget within 32 bits.
        """
        return cls(**_numbers(settings, rounds, values))

    @property
    def honest_shares(self) -> int:
        """Noise shares that are in every sum and known to no adversary."""
        return self.least_clients - self.colluding_clients

    @property
    def denominator(self) -> float:
        """Expected number of clients in a round, q N: what sums are divided by, always."""
        return self.sample_rate * self.registered_clients

    @property
    def sensitivity(self) -> float:
        """Largest norm of a rounded update, in units: each value moves by less than one."""
        return self.max_update_norm * self.scale * _CLIP_ROUNDING + math.sqrt(self.values)

    @property
    def wrap_exponent(self) -> float:
        """``ln(1 / p)`` of a bound p on the probability that any sum of the run wraps around.

        A share is sub-Gaussian with variance proxy sigma^2 (Canonne et al. 2020, fact 18), so a
        value of N shares exceeds a with probability at most ``2 exp(-a^2 / (2 N sigma^2))``; a is
        what N rounded updates leave of 2^31, and the union is over values and rounds.
        """
        room = MODULUS / 2 - 1
        room -= self.registered_clients * (self.max_update_norm * self.scale * _CLIP_ROUNDING + 1)
        if room <= 0:
            return -math.inf
        exponent = room**2 / (2 * self.registered_clients * float(self.sigma) ** 2)
        return exponent - math.log(2.0 * self.values * self.rounds)

    def rho(self, rounds: int | None = None) -> float:
        """ZCDP of so many rounds (default: all)."""
        n, s = self.honest_shares, float(self.sigma)
        # Terms fall with k to exp(-2 pi^2 s^2) from exp(-pi^2 s^2): the largest, n - 1 times.
        tau = 10 * (n - 1) * math.exp(-((math.pi * s) ** 2))
        one = self.sensitivity / (math.sqrt(n) * s) + tau * math.sqrt(self.values)
        return (self.rounds if rounds is None else rounds) * one**2 / 2

    def epsilon(self, rounds: int | None = None) -> float:
        """Client-level epsilon at ``target_delta`` after ``rounds`` rounds (default: all)."""
        return zcdp_epsilon(self.rho(rounds), self.target_delta)

    def noise_std(self, clients: int) -> float:
        """Standard deviation of the noise on each value of a mean over so many clients."""
        return math.sqrt(clients) * self.sigma / self.scale / self.denominator


@functools.lru_cache(maxsize=64)
def _numbers(settings: PrivacySettings, rounds: int, values: int) -> dict[str, Any]:
    fixed: dict[str, Any] = {
        "max_update_norm": settings.max_update_norm,
        "values": values,
        "sample_rate": settings.client_sample_rate,
        "registered_clients": settings.registered_clients,
        "least_clients": settings.least_clients,
        "colluding_clients": settings.colluding_clients,
        "rounds": rounds,
        "target_delta": settings.target_delta,
    }
    target, delta = settings.target_epsilon, settings.target_delta
    # The noise over the sensitivity that a budget needs, as if there were no tau.
    most = brentq(lambda x: zcdp_epsilon(math.exp(x), delta) - target, -60.0, 12.0, xtol=1e-12)
    ratio = math.sqrt(rounds / (2 * math.exp(most)))
    shares = math.sqrt(settings.least_clients - settings.colluding_clients)
    for exponent in range(40, -41, -1):
        scale = 2.0**exponent
        clip = settings.max_update_norm * scale
        if clip > MODULUS or math.sqrt(values) > _LARGEST_INFLATION * clip:
            continue
        least = ratio * (clip * _CLIP_ROUNDING + math.sqrt(values)) / shares
        try:
            plan = DistributedPlan(**fixed, scale=scale, sigma=math.ceil(least * (1 + 1e-9)))
        except ValueError:
            continue
        while plan.epsilon() > target:
            plan = dataclasses.replace(plan, sigma=plan.sigma + 1 + plan.sigma // 1000)
        return dataclasses.asdict(plan)
    raise AccountingError(
        f"epsilon {target:g} with privacy.registered-clients = {settings.registered_clients}, "
        f"{values} values and {rounds} rounds needs sums of more than 32 bits"
    )


class DistributedMechanism:
    """What clients send and how the server reads the sum.

    Parameters
    ----------
    plan : DistributedPlan
        All numbers.
    insecure_test_seed : int (default: -1)
        0 or more draws coins and noise from this seed and voids the guarantee; for tests.

    Attributes
    ----------
    rounds_released : int
        Rounds charged so far.
    """

    unit = "one client with all its records"
    guards_against = "the server, too, as long as it keeps to the protocol and least-clients answer"

    def __init__(self, plan: DistributedPlan, *, insecure_test_seed: int = -1) -> None:
        self.plan = plan
        self.rounds_released = 0
        self.noise_std = plan.noise_std(plan.registered_clients)
        self._seed = insecure_test_seed

    @property
    def secure(self) -> bool:
        """Whether nobody can reproduce coins and noise."""
        return self._seed < 0

    @property
    def scale(self) -> float:
        """Units in 1.0."""
        return self.plan.scale

    @property
    def least(self) -> int:
        """Fewest clients of a sum."""
        return self.plan.least_clients

    @property
    def most(self) -> int:
        """Most clients of a sum."""
        return self.plan.registered_clients

    def draw(self, server_round: int, candidates: int) -> npt.NDArray[np.bool_]:
        """Toss for each of the connected clients whether it is asked; not part of the guarantee."""
        source = self._source((server_round, _COINS))
        return coins(source, candidates, self.plan.sample_rate)

    def charge(self) -> None:
        """Count a round, before clients are asked for their vectors."""
        self.rounds_released += 1

    def encode(self, update: Float64s, server_round: int, client: int) -> Words:
        """Clip, round and noise one client's update: what it may send under secure aggregation.

        Parameters
        ----------
        update : array of float
            All values that travel, (d,), d at most ``plan.values``.
        server_round, client : int
            Name the stream of a seeded test.

        Notes
        -----
        Formal guarantee: stochastic rounding gives v with probability of its fractional part the
        next whole number, so it is unbiased, and a value moves by less than one: the rounded
        update is no longer than ``plan.sensitivity``, with certainty.
        """
        if update.size > self.plan.values:
            raise ValueError(f"{update.size} values, the plan is for {self.plan.values} at most")
        rounded = self.rounded(update, self._source((server_round, client, _ROUNDING)))
        noise_source = self._source((server_round, client, _NOISE))
        share = sample_discrete_gaussian(noise_source, self.plan.sigma, update.size)
        return ((rounded + share) % MODULUS).astype(np.uint32)

    def rounded(self, update: Float64s, source: RandomSource) -> npt.NDArray[np.int64]:
        """The clipped update in whole units, rounded stochastically, without noise."""
        clipped = clip_update({"": update}, self.plan.max_update_norm)[""] * self.plan.scale
        below = np.floor(clipped)
        uniform = (source.words(update.size) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return (below + (uniform < clipped - below)).astype(np.int64)

    def decode(self, total: Words, clients: int) -> Float64s:
        """The noised mean that a sum modulo 2^32 of ``clients`` vectors stands for."""
        self.noise_std = self.plan.noise_std(clients)
        signed = total.astype(np.uint32).view(np.int32).astype(np.float64)
        return signed / self.plan.scale / self.plan.denominator

    def epsilon(self) -> float:
        """Client-level epsilon of the rounds charged so far; infinite with reproducible noise."""
        if self.rounds_released and not self.secure:
            return math.inf
        return self.plan.epsilon(self.rounds_released)

    def _source(self, stream: tuple[int, ...]) -> RandomSource:
        return SecureSource() if self.secure else SeededTestSource((self._seed, 2**31 + 1, *stream))
