"""What the clients' privacy adds up to, from the public numbers that they state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from logging import WARNING
from typing import Any, Self

from flwr.app import ConfigRecord, Message
from flwr.common import log

from privacy import pld_epsilon
from privacy.accounting import LARGEST_NOISE_MULTIPLIER, SMALLEST_NOISE_MULTIPLIER
from strategies import PRIVACY_KEY

_SMALLEST_RATE = 1e-9
# More than this many times the run's target is no plan of this run, however often it restarted.
_LARGEST_FACTOR = 10.0


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
            _SMALLEST_RATE <= rate <= 1
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
    target_epsilon : float (default: 100.0)
        The run's epsilon; a client that is at ten times as much is taken to guarantee nothing.

    Notes
    -----
    Clients hold disjoint data, so the federation's guarantee per record is the largest of the
    clients' epsilons (parallel composition).  A client that trained and states nothing
    guarantees nothing: the federation's epsilon is infinite then.  The numbers are the
    clients' word; the noise is added and the budget kept on their side.
    """

    def __init__(
        self, target_delta: float, most_steps: int, *, target_epsilon: float = 100.0
    ) -> None:
        self._target_delta = target_delta
        self._most_steps = most_steps
        self._most_epsilon = _LARGEST_FACTOR * target_epsilon
        self._statements: dict[int, Statement | None] = {}
        self._earlier: list[Statement | None] = []
        self._lost_steps = 0

    def observe(self, node: int, message: Message) -> None:
        """Take note of a reply, whether or not it enters the mean: it was released."""
        new = Statement.from_message(
            message, target_delta=self._target_delta, most_steps=self._most_steps
        )
        if node in self._statements:
            self._statements[node] = _after(self._statements[node], new)
        else:
            self._statements[node] = self._joining(new)

    def begin_again(self, lost_steps: int) -> None:
        """Go on in a new run of Flower, in which clients count from zero and may be renamed.

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
        self._lost_steps += lost_steps
        self._earlier = sorted(set(self._statements.values()), key=repr)

    def _joining(self, new: Statement | None) -> Statement | None:
        """A node not seen before; after a restart it may be any of the earlier ones, renamed."""
        if new is None or None in self._earlier:
            return None
        same = [
            one.before
            for one in self._earlier
            if one is not None
            and (one.sample_rate, one.noise_multiplier) == (new.sample_rate, new.noise_multiplier)
        ]
        return dataclasses.replace(new, before=max(same, default=self._lost_steps))

    def state_dict(self) -> dict[str, Any]:
        """Every client's statement so far; ``None`` for one that guarantees nothing."""
        return {
            "clients": {str(node): _packed(one) for node, one in sorted(self._statements.items())},
            "earlier": [_packed(one) for one in self._earlier],
            "lost-steps": self._lost_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._statements = {int(node): _unpacked(one) for node, one in state["clients"].items()}
        self._earlier = [_unpacked(one) for one in state["earlier"]]
        self._lost_steps = int(state["lost-steps"])

    def largest_epsilon(self) -> float:
        """Largest epsilon spent so far by any client; 0 before the first reply.

        Infinite also for numbers far beyond the run's target: no client that keeps to the run's
        plan states them, and the accountant would take minutes and gigabytes over them.
        """
        return max(map(self._epsilon, set(self._statements.values())), default=0.0)

    def statements(self) -> dict[int, tuple[Statement | None, float]]:
        """Every client's statement so far with its epsilon, by node id.

        ``None`` and infinity for a client that guarantees nothing.
        """
        epsilons = {one: self._epsilon(one) for one in set(self._statements.values())}
        return {node: (one, epsilons[one]) for node, one in sorted(self._statements.items())}

    def _epsilon(self, one: Statement | None) -> float:
        if one is None or _rough_epsilon(one, self._target_delta) > self._most_epsilon:
            return math.inf
        try:
            return pld_epsilon(
                sample_rate=one.sample_rate,
                noise_multiplier=one.noise_multiplier,
                steps=one.steps,
                delta=self._target_delta,
            )
        except (ArithmeticError, ValueError) as error:
            text = "The accountant cannot tell the epsilon of what a client states (%s)"
            log(WARNING, text, type(error).__name__)
            return math.inf


def _rough_epsilon(one: Statement, delta: float) -> float:
    """Size of epsilon by the central limit: ``mu^2 / 2 + mu sqrt(2 ln(1 / delta))``.

    ``mu = q sqrt(T (e^(1 / sigma^2) - 1))`` (Bu et al., 2020).  Not a bound; it only tells numbers
    worth an accountant from absurd ones.
    """
    growth = math.expm1(min(one.noise_multiplier**-2, 500.0))
    mu = one.sample_rate * math.sqrt(one.steps * growth)
    return mu**2 / 2 + mu * math.sqrt(2 * math.log(1 / delta))


def _packed(one: Statement | None) -> dict[str, Any] | None:
    return None if one is None else dataclasses.asdict(one)


def _unpacked(numbers: Mapping[str, Any] | None) -> Statement | None:
    return None if numbers is None else Statement(**numbers)
