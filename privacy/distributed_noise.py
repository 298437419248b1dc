"""Noise in shares: each client adds some, and only a noised sum over clients is ever seen.

A client rounds its vector (its clipped update, or its sum of clipped record gradients) to whole
numbers, adds its share of discrete Gaussian noise and sends it masked; the server learns the sum
modulo 2^32 (Kairouz, Liu and Steinke, "The Distributed Discrete Gaussian Mechanism for Federated
Learning with Secure Aggregation", 2021, arXiv 2102.06387).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from .accounting import AccountingError
from .client_level import clip_update
from .client_settings import CLIENT_MODES
from .discrete_gaussian import LARGEST_SIGMA, sample_discrete_gaussian
from .randomness import RandomSource, SecureSource, SeededTestSource, coins
from .settings import PrivacySettings
from .zcdp import concentrated_epsilon, largest_ratio

Float64s = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint32]

MODULUS = 2**32
# ln(1 / probability) that any sum of a run leaves [-2^31, 2^31).
_LOG_WRAP = 40 * math.log(2)
# What rounding may add to the clip norm: to updates, which are clipped in float64, and to one
# record's part in a float32 sum (that of a hundred aligned records errs by less, at the worst).
_CLIP_ROUNDING = {"client": 1 + 1e-9, "record": 1 + 1e-3}
# Rounding may add this share of the clip norm at most; with more, units are too coarse.
_LARGEST_INFLATION = 0.25
_COINS, _NOISE, _ROUNDING = 2, 0, 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DistributedPlan:
    """All numbers of a run with distributed noise, fixed before its first round.

    Parameters
    ----------
    unit : {"client", "record"}
        What is protected: a client's whole update, or one record's gradient.
    clip_norm : float
        L2 clip norm of one unit's contribution to a round's sum.
    values : int
        Most values d that a sum has.
    sample_rate : float
        Poisson rate q at which clients draw records, in secret; 1 if the unit is a client.
    client_rate : float
        Probability with which the server asks each client; nothing is credited for it.
    registered_clients : int
        Most clients N of a sum.
    least_clients : int
        Fewest clients of a sum that is ever unmasked.
    colluding_clients : int
        How many of them may tell the server their noise.
    denominator : float
        Public constant by which sums are divided.
    contributions : float
        How many units' contributions a sum is to have room for; concerns overflow only.
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
    shares and ``tau = 10 sum_{k=1}^{n-1} exp(-2 pi^2 sigma^2 k / (k + 1))``, a sum is
    ``e^2 / 2``-zCDP per unit, ``e = D / (sqrt(n) sigma) + tau sqrt(d)`` (Kairouz et al. 2021,
    proposition 14), and ``rounds`` sums are (``epsilon()``, ``target_delta``)-DP per unit
    (zero-out: its contribution counts, or zero in its place).  At a rate q < 1 the Rényi
    divergences are those of :func:`~privacy.zcdp.sampled_rdp`.  It holds against whoever
    sees the sums, the server included, and ``colluding_clients`` other clients that tell all they
    know.  More honest shares than n only add noise; reduction modulo 2^32 is post-processing.

    Not covered: a server that sees single vectors (secure aggregation must hold); whether a client
    answers; dropout below ``least_clients``, at which the sum must not be unmasked; for records,
    float32's rounding where a client adds up its gradients.
    """

    unit: Literal["client", "record"]
    clip_norm: float
    values: int
    sample_rate: float
    client_rate: float
    registered_clients: int
    least_clients: int
    colluding_clients: int
    denominator: float
    contributions: float
    scale: float
    sigma: int
    rounds: int
    target_delta: float

    def __post_init__(self) -> None:
        """Refuse numbers that no mechanism could have."""
        for name in ("clip_norm", "denominator", "contributions"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {getattr(self, name)}")
        for name in ("sample_rate", "client_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if self.unit not in ("client", "record"):
            raise ValueError(f"unit must be 'client' or 'record', got {self.unit!r}")
        if self.unit == "client" and self.sample_rate != 1:
            raise ValueError(f"sample_rate must be 1 for clients, got {self.sample_rate}")
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
    def sensitivity(self) -> float:
        """Most that one unit moves a rounded vector, in whole numbers.

        With ``floor(x + u)`` for stochastic rounding, u shared by both data sets, a value moves by
        less than one more than x does.
        """
        return self.clip_norm * self.scale * _CLIP_ROUNDING[self.unit] + math.sqrt(self.values)

    @property
    def wrap_exponent(self) -> float:
        """``ln(1 / p)`` of a bound p on the probability that noise makes any sum wrap around.

        A share is sub-Gaussian with variance proxy sigma^2 (Canonne et al. 2020), so a value of N
        shares exceeds a with probability at most ``2 exp(-a^2 / (2 N sigma^2))``; a is what
        ``contributions`` units, rounded by N clients, leave of 2^31, and the union is over values
        and rounds.
        """
        room = MODULUS / 2 - 1 - self.registered_clients
        room -= self.contributions * self.clip_norm * self.scale * _CLIP_ROUNDING[self.unit]
        if room <= 0:
            return -math.inf
        exponent = room**2 / (2 * self.registered_clients * float(self.sigma) ** 2)
        return exponent - math.log(2.0 * self.values * self.rounds)

    @property
    def ratio(self) -> float:
        """The e of the guarantee: one sum without sampling is ``e^2 / 2``-zCDP."""
        n, s = self.honest_shares, float(self.sigma)
        # Terms of tau fall with k: the first one, n - 1 times.
        tau = 10 * (n - 1) * math.exp(-((math.pi * s) ** 2))
        return self.sensitivity / (math.sqrt(n) * s) + tau * math.sqrt(self.values)

    def epsilon(self, rounds: int | None = None) -> float:
        """Epsilon per unit at ``target_delta`` after ``rounds`` rounds (default: all)."""
        taken = self.rounds if rounds is None else rounds
        return concentrated_epsilon(self.ratio, self.sample_rate, taken, self.target_delta)

    def noise_std(self, clients: int) -> float:
        """Standard deviation of the noise on each value of a mean over so many clients."""
        return math.sqrt(clients) * self.sigma / self.scale / self.denominator


@functools.lru_cache(maxsize=64)
def _numbers(settings: PrivacySettings, rounds: int, values: int) -> dict[str, Any]:
    fixed = _of_clients(settings) if settings.mode in CLIENT_MODES else _of_records(settings)
    fixed |= {
        "values": values,
        "client_rate": settings.client_sample_rate,
        "registered_clients": settings.registered_clients,
        "least_clients": settings.least_clients,
        "colluding_clients": settings.colluding_clients,
        "rounds": rounds,
        "target_delta": settings.target_delta,
    }
    target = settings.target_epsilon
    ratio = largest_ratio(target, settings.target_delta, fixed["sample_rate"], rounds)
    shares = math.sqrt(settings.least_clients - settings.colluding_clients)
    rounding = _CLIP_ROUNDING[fixed["unit"]]
    for exponent in range(40, -41, -1):  # the finest units that fit
        scale = 2.0**exponent
        clip = fixed["clip_norm"] * scale
        if clip > MODULUS or math.sqrt(values) > _LARGEST_INFLATION * clip:
            continue
        least = (clip * rounding + math.sqrt(values)) / (shares * ratio)
        try:
            plan = DistributedPlan(**fixed, scale=scale, sigma=math.ceil(least * (1 + 1e-9)))
            while plan.epsilon() > target:
                plan = dataclasses.replace(plan, sigma=plan.sigma + 1 + plan.sigma // 1000)
        except ValueError:  # more than 32 bits
            continue
        return dataclasses.asdict(plan)
    raise AccountingError(
        f"epsilon {target:g} with privacy.registered-clients = {settings.registered_clients}, "
        f"{values} values and {rounds} rounds needs sums of more than 32 bits"
    )


def _of_clients(settings: PrivacySettings) -> dict[str, Any]:
    return {
        "unit": "client",
        "clip_norm": settings.max_update_norm,
        "sample_rate": 1.0,
        "denominator": settings.client_sample_rate * settings.registered_clients,
        "contributions": float(settings.registered_clients),
    }


def _of_records(settings: PrivacySettings) -> dict[str, Any]:
    expected = settings.sample_rate * settings.registered_records
    # Bernstein: more records than this are in a round's batches with probability 2^-40.
    linear = _LOG_WRAP / 3
    most = expected + linear + math.sqrt(linear**2 + 2 * _LOG_WRAP * expected)
    return {
        "unit": "record",
        "clip_norm": settings.max_grad_norm,
        "sample_rate": settings.sample_rate,
        "denominator": settings.client_sample_rate * expected,
        "contributions": most,
    }


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

    guards_against = "the server, too, as long as it keeps to the protocol and least-clients answer"

    def __init__(self, plan: DistributedPlan, *, insecure_test_seed: int = -1) -> None:
        self.plan = plan
        self.rounds_released = 0
        self.noise_std = plan.noise_std(plan.registered_clients)
        self._seed = insecure_test_seed

    @property
    def unit(self) -> str:
        """What is protected."""
        whole = self.plan.unit == "client"
        return "one client with all its records" if whole else "one record of one client"

    @property
    def of_gradients(self) -> bool:
        """Whether sums are of gradients, which the server steps by, and not of changes."""
        return self.plan.unit == "record"

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
        return coins(source, candidates, self.plan.client_rate)

    def charge(self) -> None:
        """Count a round, before clients are asked for their vectors."""
        self.rounds_released += 1

    def encode(self, vector: Float64s, server_round: int, client: int) -> Words:
        """Round and noise one client's vector: what it may send under secure aggregation.

        Parameters
        ----------
        vector : array of float
            (d,), d at most ``plan.values``: an update, which is clipped here, or the sum of record
            gradients that are clipped already.
        server_round, client : int
            Name the stream of a seeded test.

        Notes
        -----
        Formal guarantee: stochastic rounding gives v with probability of its fractional part the
        next whole number, so it is unbiased, and a value moves by less than one: one unit moves
        the rounded vector by ``plan.sensitivity`` at most, with certainty.
        """
        if vector.size > self.plan.values:
            raise ValueError(f"{vector.size} values, the plan is for {self.plan.values} at most")
        rounded = self.rounded(vector, self._source((server_round, client, _ROUNDING)))
        noise_source = self._source((server_round, client, _NOISE))
        share = sample_discrete_gaussian(noise_source, self.plan.sigma, vector.size)
        return ((rounded + share) % MODULUS).astype(np.uint32)

    def rounded(self, vector: Float64s, source: RandomSource) -> npt.NDArray[np.int64]:
        """The vector in whole units, rounded stochastically, without noise."""
        if self.plan.unit == "client":
            vector = clip_update({"": vector}, self.plan.clip_norm)[""]
        wide = vector * self.plan.scale
        below = np.floor(wide)
        uniform = (source.words(vector.size) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return (below + (uniform < wide - below)).astype(np.int64)

    def decode(self, total: Words, clients: int) -> Float64s:
        """The noised mean that a sum modulo 2^32 of ``clients`` vectors stands for."""
        self.noise_std = self.plan.noise_std(clients)
        signed = total.astype(np.uint32).view(np.int32).astype(np.float64)
        return signed / self.plan.scale / self.plan.denominator

    def epsilon(self) -> float:
        """Epsilon of the rounds charged so far; infinite with reproducible noise."""
        if self.rounds_released and not self.secure:
            return math.inf
        return self.plan.epsilon(self.rounds_released)

    def _source(self, stream: tuple[int, ...]) -> RandomSource:
        return SecureSource() if self.secure else SeededTestSource((self._seed, 2**31 + 1, *stream))
