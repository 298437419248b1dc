"""What the clients' privacy adds up to, from the public numbers that they state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

from flwr.app import ConfigRecord, Message

from privacy import pld_epsilon
from privacy.accounting import LARGEST_NOISE_MULTIPLIER, SMALLEST_NOISE_MULTIPLIER
from strategies import PRIVACY_KEY


@dataclasses.dataclass(frozen=True)
class Statement:
    """A client's public privacy numbers: rate, noise multiplier, steps charged so far."""

    sample_rate: float
    noise_multiplier: float
    stated: int
    before: int = 0

    @property
    def steps(self) -> int:
        """All steps charged, those before a restart included."""
        return self.before + self.stated

    @classmethod
    def from_message(cls, message: Message, *, target_delta: float, most_steps: int) -> Self | None:
        """Read a reply's statement; ``None`` if it makes none, or one that is void.

        Void is one without secure noise, for another delta than the run's, or with numbers that
        no plan of this run has; the accountant is never asked about such.
        """
        record = message.content.get(PRIVACY_KEY)
        if not isinstance(record, ConfigRecord) or record.get("secure-noise") is not True:
            return None
        rate, noise = record.get("sample-rate"), record.get("noise-multiplier")
        steps = record.get("steps")
        if not (isinstance(rate, float) and isinstance(noise, float) and type(steps) is int):
            return None
        known = (
            0 < rate <= 1
            and SMALLEST_NOISE_MULTIPLIER <= noise <= LARGEST_NOISE_MULTIPLIER
            and 1 <= steps <= most_steps
            and record.get("target-delta") == target_delta
        )
        return cls(rate, noise, steps) if known else None


def _after(old: Statement | None, new: Statement | None) -> Statement | None:
    """What a client has spent by its words so far; nothing released is ever taken back.

    A count that falls is one that started again (a SuperNode keeps it in memory only): both
    parts were spent.
    """
    if old is None or new is None:
        return None
    if (old.sample_rate, old.noise_multiplier) != (new.sample_rate, new.noise_multiplier):
        return None
    before = old.before if new.stated > old.stated else old.before + old.stated
    return dataclasses.replace(new, before=before)


class PrivacyTracker:
    """Adds up what each client states.

    Parameters
    ----------
    target_delta : float
        The run's delta.
    most_steps : int
        Rounds x local steps of the run.

    Notes
    -----
    Clients hold disjoint data, so the federation's guarantee per record is the largest of the
    clients' epsilons (parallel composition).  A client that trained and states nothing
    guarantees nothing: the federation's epsilon is infinite then.  The numbers are the
    clients' word; the noise is added and the budget kept on their side.
    """

    def __init__(self, target_delta: float, most_steps: int) -> None:
        self._target_delta = target_delta
        self._most_steps = most_steps
        self._statements: dict[int, Statement | None] = {}

    def observe(self, node: int, message: Message) -> None:
        """Take note of a reply, whether or not it enters the mean: it was released."""
        new = Statement.from_message(
            message, target_delta=self._target_delta, most_steps=self._most_steps
        )
        old = self._statements.get(node)
        self._statements[node] = new if node not in self._statements else _after(old, new)

    def begin_again(self, lost_steps: int) -> None:
        """Go on in a new run of Flower, in which clients count from zero.

        Parameters
        ----------
        lost_steps : int
            Steps of the round in which the earlier run was cut off.  It is asked for again, and
            clients may have released it already; counting it twice can only overstate.
        """
        for node, one in self._statements.items():
            if one is not None:
                spent = one.steps + lost_steps
                self._statements[node] = dataclasses.replace(one, before=spent, stated=0)

    def state_dict(self) -> dict[str, Any]:
        """Every client's statement so far; ``None`` for one that guarantees nothing."""
        return {
            str(node): dataclasses.asdict(one) if one else None
            for node, one in sorted(self._statements.items())
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._statements = {
            int(node): Statement(**numbers) if numbers else None for node, numbers in state.items()
        }

    def largest_epsilon(self) -> float:
        """Largest epsilon spent so far by any client; 0 before the first reply."""
        largest = 0.0
        for statement in set(self._statements.values()):
            if statement is None:
                return math.inf
            epsilon = pld_epsilon(
                sample_rate=statement.sample_rate,
                noise_multiplier=statement.noise_multiplier,
                steps=statement.steps,
                delta=self._target_delta,
            )
            largest = max(largest, epsilon)
        return largest
