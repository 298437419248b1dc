"""What the clients' privacy adds up to, from the public numbers that they state."""

from __future__ import annotations

import dataclasses
import math
from logging import WARNING
from typing import Self

from flwr.app import ConfigRecord, Message
from flwr.common import log

from federation.messages import PRIVACY_KEY
from privacy import AccountingError, pld_epsilon

# Below this, the accountant would work for minutes to print a number that protects nobody.
_SMALLEST_NOISE = 0.1


@dataclasses.dataclass(frozen=True)
class Statement:
    """A client's public privacy numbers: rate, noise multiplier, delta, steps charged so far."""

    sample_rate: float
    noise_multiplier: float
    target_delta: float
    steps: int

    @classmethod
    def from_message(cls, message: Message) -> Self | None:
        """Read a reply's statement; ``None`` if it makes none, or one that is void."""
        record = message.content.get(PRIVACY_KEY)
        if not isinstance(record, ConfigRecord) or record.get("secure-noise") is not True:
            return None
        rate, noise = record.get("sample-rate"), record.get("noise-multiplier")
        delta, steps = record.get("target-delta"), record.get("steps")
        if not (isinstance(rate, float) and isinstance(noise, float)):
            return None
        if not (isinstance(delta, float) and isinstance(steps, int)) or noise < _SMALLEST_NOISE:
            return None
        return cls(rate, noise, delta, steps)

    def epsilon(self) -> float:
        """Epsilon of the steps stated, by PLD."""
        return pld_epsilon(
            sample_rate=self.sample_rate,
            noise_multiplier=self.noise_multiplier,
            steps=self.steps,
            delta=self.target_delta,
        )


class PrivacyTracker:
    """Keeps the latest statement of each client.

    Notes
    -----
    Clients hold disjoint data, so the federation's guarantee per record is the largest of the
    clients' epsilons (parallel composition).  A client that trained and states nothing
    guarantees nothing: the federation's epsilon is infinite then.  The numbers are the
    clients' word; the noise is added and the budget kept on their side.
    """

    def __init__(self) -> None:
        self._statements: dict[int, Statement | None] = {}

    def observe(self, node: int, message: Message) -> None:
        """Take note of a reply that entered the mean."""
        self._statements[node] = Statement.from_message(message)

    def largest_epsilon(self) -> float:
        """Largest epsilon spent so far by any client; 0 before the first reply."""
        largest = 0.0
        for statement in set(self._statements.values()):
            if statement is None:
                return math.inf
            try:
                largest = max(largest, statement.epsilon())
            except AccountingError as error:
                log(WARNING, "A client states privacy numbers that cannot be: %s", error)
                return math.inf
        return largest
