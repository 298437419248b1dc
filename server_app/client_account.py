"""The account of a run in which only noised sums over clients are used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flwr.app import Message

from federation.settings import Settings
from privacy import (
    ClientLevelMechanism,
    ClientLevelPlan,
    DistributedMechanism,
    DistributedPlan,
)
from privacy.client_settings import CLIENT_MODES, SECURE_MODES, SUM_MODES
from strategies import SecureAggregation

from .privacy_tracker import PrivacyTracker

# Numbers that tell who answered, which may depend on what is protected.
_HIDDEN = ("clients", "failures", "bytes_up", "bytes_down")


class ClientAccount:
    """Counts a run's noised sums; takes the place of :class:`PrivacyTracker`.

    Parameters
    ----------
    mechanism : ClientLevelMechanism or DistributedMechanism
        Counts what it releases.

    Attributes
    ----------
    level : ClientLevelMechanism or SecureAggregation
        What the strategy is given.

    Notes
    -----
    Client-level and record-level epsilons protect different things and are never mixed: lines have
    ``client_epsilon``, and ``epsilon``, which is of records, is none.  (A client's guarantee holds
    for each of its records, too, but not against the server.)
    """

    def __init__(self, mechanism: ClientLevelMechanism | DistributedMechanism) -> None:
        self.mechanism = mechanism
        self.level: ClientLevelMechanism | SecureAggregation
        if isinstance(mechanism, DistributedMechanism):
            self.level = SecureAggregation(mechanism)
        else:
            self.level = mechanism

    def observe(self, node: int, message: Message) -> None:
        """Clients state no noise here."""

    def largest_epsilon(self) -> float:
        """None is claimed before :meth:`in_its_unit` has said of what and against whom."""
        return math.inf

    def in_its_unit(self, row: dict[str, Any]) -> dict[str, Any]:
        """A round's line with the epsilon of its unit.

        Where clients are the unit, it is without what tells who answered.
        """
        spent = self.mechanism.epsilon()
        epsilon = spent if math.isfinite(spent) else None
        hears = self.mechanism.guards_against
        if isinstance(self.mechanism, DistributedMechanism) and self.mechanism.of_gradients:
            return {**row, "epsilon": epsilon, "guards_against": hears}  # records are the unit
        return {
            **{key: None if key in _HIDDEN else value for key, value in row.items()},
            "client_epsilon": epsilon,
            "guards_against": hears,
        }

    def state_dict(self) -> dict[str, Any]:
        """Sums released so far."""
        return {"rounds-released": self.mechanism.rounds_released}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, one round later: that in which the run was cut off.

        Its sum may have been released, and the repeated round draws other noise.
        """
        self.mechanism.rounds_released = int(state["rounds-released"]) + 1


def make_account(settings: Settings, values: int) -> PrivacyTracker | ClientAccount:
    """The account that belongs to the run's unit of protection.

    Parameters
    ----------
    settings : Settings
        The run's settings.
    values : int
        Values of the whole adapter.

    Raises
    ------
    AccountingError
        If no noise meets the budget.
    """
    if settings.privacy.mode not in SUM_MODES:
        return PrivacyTracker(
            settings.privacy.target_delta,
            settings.total_steps,
            target_epsilon=settings.privacy.target_epsilon,
            evaluation_noise_multiplier=settings.privacy.evaluation_noise_multiplier,
            local_steps=settings.strategy.local_steps,
        )
    rounds, seed = settings.strategy.num_rounds, settings.privacy.insecure_test_seed
    if settings.privacy.mode in SECURE_MODES:
        shares = DistributedPlan.for_run(settings.privacy, rounds=rounds, values=values)
        return ClientAccount(DistributedMechanism(shares, insecure_test_seed=seed))
    plan = ClientLevelPlan.for_run(settings.privacy, rounds=rounds)
    return ClientAccount(ClientLevelMechanism(plan, insecure_test_seed=seed))


def sum_guarantee(settings: Settings) -> str | None:
    """What the summary says of the run where only sums are used; ``None`` elsewhere."""
    privacy = settings.privacy
    if privacy.mode not in SUM_MODES or privacy.insecure_test_seed >= 0:
        return None
    if settings.resume:
        return "what the earlier run spent and this one adds: the epsilon of each round's line"
    level = "CLIENT" if privacy.mode in CLIENT_MODES else "RECORD"
    return (
        f"{level}-level epsilon {privacy.target_epsilon:g} at delta {privacy.target_delta:g} at "
        "most, over all rounds"
    )
