"""Differential privacy for whole clients, with noise that a trusted server adds.

The unit is a client with all its records: its update of a round is clipped as one vector, the
server adds up, adds noise, divides by a public constant, and uses nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from .accounting import calibrate_noise_multiplier, pld_epsilon
from .randomness import RandomSource, SecureSource, SeededTestSource, coins, standard_normal
from .settings import PrivacySettings

Float64s = npt.NDArray[np.float64]
# Streams of a seeded test's round.
_COINS, _NOISE = 0, 1
_LARGEST_ROUND = 2**31


def clip_update(
    update: Mapping[str, npt.NDArray[np.floating]], max_norm: float
) -> dict[str, Float64s]:
    """Scale a client's whole update down to ``max_norm``, if it is longer.

    Parameters
    ----------
    update : mapping of str to array
        All tensors that travel, of any shape.
    max_norm : float
        Clip norm S, L2, over all of them jointly.

    Returns
    -------
    dict of str to array
        The same values in float64, times ``min(1, S / norm)``.

    Raises
    ------
    ValueError
        If a value is not finite: no scale makes that short.

    Notes
    -----
    Formal guarantee: the joint norm of what is returned is at most S, up to float64's rounding
    (relative 1e-15 times the square root of the number of values, at most 1e-9).
    """
    wide = {name: value.astype(np.float64) for name, value in update.items()}
    if not all(np.isfinite(value).all() for value in wide.values()):
        raise ValueError("an update with values that are not finite cannot be clipped")
    # Scaled by the largest value first, so that no square leaves float64's range.
    largest = max((float(np.abs(value).max(initial=0.0)) for value in wide.values()), default=0.0)
    if largest == 0.0:
        return wide
    squares = sum(float(np.vdot(v / largest, v / largest)) for v in wide.values())
    norm = largest * math.sqrt(squares)
    if norm <= max_norm:
        return wide
    return {name: value * (max_norm / norm) for name, value in wide.items()}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClientLevelPlan:
    """All numbers of a run with client-level privacy, fixed before its first round.

    Parameters
    ----------
    max_update_norm : float
        Clip norm S of one client's whole update of a round.
    sample_rate : float
        Probability q in (0, 1] with which the server asks each client, independently.
    participation : {"public", "secret"}
        Whether others than the server may know who took part.
    registered_clients : int
        Public number N of clients that may take part.
    noise_multiplier : float
        Standard deviation of the noise on the sum, in units of S.
    rounds : int
        Most rounds the plan allows.
    target_delta : float
        Delta at which epsilon is stated.

    Notes
    -----
    Formal guarantee: ``rounds`` releases of ``(sum_k clip(D_k, S) + sigma S N(0, I)) / (q N)`` are
    (``epsilon()``, ``target_delta``)-DP per client (zero-out: a client's updates of all rounds
    count, or are zero), for whoever sees every release.  With secret participation, clients are
    Poisson-sampled and the accountant's rate is q; with public participation it is 1.

    Not covered: the server, which sees every single update and every draw; participation itself
    where it is public; in secret mode, whoever else learns who was asked (the network, the client
    itself); floating-point attacks on the noise.
    """

    max_update_norm: float
    sample_rate: float
    participation: Literal["public", "secret"]
    registered_clients: int
    noise_multiplier: float
    rounds: int
    target_delta: float

    def __post_init__(self) -> None:
        """Refuse numbers that no mechanism could have."""
        for name in ("max_update_norm", "noise_multiplier"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {getattr(self, name)}")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {self.sample_rate}")
        for name in ("registered_clients", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 < self.target_delta < 1:
            raise ValueError(f"target_delta must be in (0, 1), got {self.target_delta}")
        if self.participation not in ("public", "secret"):
            raise ValueError(
                f"participation must be 'public' or 'secret', got {self.participation!r}"
            )

    @classmethod
    def for_run(cls, settings: PrivacySettings, *, rounds: int) -> Self:
        """Make the plan of a run of at most ``rounds`` rounds, with the noise that it needs.

        Raises
        ------
        AccountingError
            If the noise cannot be calibrated.
        """
        accounted = settings.client_sample_rate if settings.participation == "secret" else 1.0
        return cls(
            max_update_norm=settings.max_update_norm,
            sample_rate=settings.client_sample_rate,
            participation=settings.participation,
            registered_clients=settings.registered_clients,
            noise_multiplier=calibrate_noise_multiplier(
                target_epsilon=settings.target_epsilon,
                target_delta=settings.target_delta,
                sample_rate=accounted,
                steps=rounds,
            ),
            rounds=rounds,
            target_delta=settings.target_delta,
        )

    @property
    def accounted_rate(self) -> float:
        """The rate that the accountant is told: q if nobody sees participation, else 1."""
        return self.sample_rate if self.participation == "secret" else 1.0

    @property
    def denominator(self) -> float:
        """Expected number of clients in a round, q N: what sums are divided by, always."""
        return self.sample_rate * self.registered_clients

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each value of the mean."""
        return self.noise_multiplier * self.max_update_norm / self.denominator

    def epsilon(self, rounds: int | None = None) -> float:
        """Client-level epsilon at ``target_delta`` after ``rounds`` rounds (default: all)."""
        return pld_epsilon(
            sample_rate=self.accounted_rate,
            noise_multiplier=self.noise_multiplier,
            steps=self.rounds if rounds is None else rounds,
            delta=self.target_delta,
        )


class ClientLevelMechanism:
    """Draws a round's clients, clips their updates and releases noised means.

    Parameters
    ----------
    plan : ClientLevelPlan
        All numbers.
    insecure_test_seed : int (default: -1)
        0 or more draws coins and noise from this seed and voids the guarantee; for tests.

    Attributes
    ----------
    rounds_released : int
        Rounds charged so far, those of an interrupted run included if its state was loaded.
    """

    unit = "one client with all its records"
    guards_against = "whoever sees the released models; not against the server"

    def __init__(self, plan: ClientLevelPlan, *, insecure_test_seed: int = -1) -> None:
        self.plan = plan
        self.rounds_released = 0
        self._seed = insecure_test_seed

    @property
    def secure(self) -> bool:
        """Whether nobody can reproduce coins and noise."""
        return self._seed < 0

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each value of the released mean."""
        return self.plan.noise_std

    def draw(self, server_round: int, candidates: int) -> npt.NDArray[np.bool_]:
        """Toss for each of the connected clients whether it is asked, with probability q."""
        return coins(self._source(server_round, _COINS), candidates, self.plan.sample_rate)

    def clip(self, update: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, Float64s]:
        """One client's contribution: its whole update, no longer than S."""
        return clip_update(update, self.plan.max_update_norm)

    def release(self, server_round: int, sums: Mapping[str, Float64s]) -> dict[str, Float64s]:
        """Noise a round's sum and divide it by the public constant; charged before it is drawn.

        Parameters
        ----------
        server_round : int
            The round; its noise is fresh each time that this is called.
        sums : mapping of str to array
            ``sum_k clip(D_k, S)`` of all tensors that the round trains; zeros if nobody answered.

        Notes
        -----
        Formal guarantee: one round of ``plan``'s statement.  Nothing but what this returns may be
        used of a round's updates.
        """
        self.rounds_released += 1
        source = self._source(server_round, _NOISE)
        std = self.plan.noise_multiplier * self.plan.max_update_norm
        released = {}
        for name in sorted(sums):
            noise = standard_normal(source, sums[name].shape).numpy()
            released[name] = (sums[name] + std * noise) / self.plan.denominator
        return released

    def epsilon(self) -> float:
        """Client-level epsilon of the rounds charged so far; infinite with reproducible noise."""
        if self.rounds_released and not self.secure:
            return math.inf
        return self.plan.epsilon(self.rounds_released)

    def _source(self, server_round: int, stream: int) -> RandomSource:
        if self.secure:
            return SecureSource()
        # A test that goes on from a checkpoint must meet the same noise in the same round.
        return SeededTestSource((self._seed, _LARGEST_ROUND, server_round, stream))
