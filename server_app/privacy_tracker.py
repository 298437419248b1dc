"""What the clients' privacy adds up to, from the public numbers that they state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from logging import WARNING
from typing import Any, Self

from flwr.app import ConfigRecord, Message
from flwr.common import log
from scipy.stats import binom

from privacy import composed_epsilon
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

    Sites count a training's steps in their ledgers, over restarts and resumed runs.  A count that
    falls all the same is one that started again (a simulated client whose ledger was lost): both
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
    evaluation_noise_multiplier : float (default: 0.0)
        Noise of the evaluation that every round also has; 0: it has none.
    local_steps : int (default: 1)
        Steps of a round, by which evaluations are counted.

    Notes
    -----
    Clients hold disjoint data, so the federation's guarantee per record is the largest of the
    clients' epsilons (parallel composition).  A client that trained and states nothing
    guarantees nothing: the federation's epsilon is infinite then.  The numbers are the
    clients' word; the noise is added and the budget kept on their side.
    """

    def __init__(
        self,
        target_delta: float,
        most_steps: int,
        *,
        target_epsilon: float = 100.0,
        evaluation_noise_multiplier: float = 0.0,
        local_steps: int = 1,
    ) -> None:
        self._target_delta = target_delta
        self._most_steps = most_steps
        self._most_epsilon = _LARGEST_FACTOR * target_epsilon
        self._evaluation_noise = evaluation_noise_multiplier
        self._local_steps = local_steps
        self._statements: dict[int, Statement | None] = {}

    def observe(self, node: int, message: Message) -> None:
        """Take note of a reply, whether or not it enters the mean: it was released."""
        new = Statement.from_message(
            message, target_delta=self._target_delta, most_steps=self._most_steps
        )
        if node in self._statements:
            new = _after(self._statements[node], new)
        self._statements[node] = new

    def state_dict(self) -> dict[str, Any]:
        """Every client's statement so far; ``None`` for one that guarantees nothing."""
        return {
            "clients": {str(node): _packed(one) for node, one in sorted(self._statements.items())},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._statements = {int(node): _unpacked(one) for node, one in state["clients"].items()}

    def largest_epsilon(self) -> float:
        """Largest epsilon spent so far by any client; 0 before the first reply.

        Infinite also for numbers far beyond the run's target: no client that keeps to the run's
        plan states them, and the accountant would take minutes and gigabytes over them.
        """
        return max(map(self._epsilon, set(self._statements.values())), default=0.0)

    def _evaluations(self, one: Statement) -> tuple[tuple[float, float, int], ...]:
        rounds = -(-one.steps // self._local_steps)
        return ((1.0, self._evaluation_noise, rounds),) if self._evaluation_noise else ()

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
            steps = ((one.sample_rate, one.noise_multiplier, one.steps),)
            return composed_epsilon(steps + self._evaluations(one), delta=self._target_delta)
        except (ArithmeticError, ValueError) as error:
            text = "The accountant cannot tell the epsilon of what a client states (%s)"
            log(WARNING, text, type(error).__name__)
            return math.inf


def _rough_epsilon(one: Statement, delta: float) -> float:
    """Size of epsilon, ``mu^2 / 2 + mu sqrt(2 ln(1 / delta))`` with the smaller of two mu.

    The central limit's is ``q sqrt(T (e^(1 / sigma^2) - 1))`` (Bu et al., 2020), far too large for
    little noise at small rates.  There the other is right: but for a chance of delta / 2 a record
    is in at most k steps, which are at most one Gaussian with ``sqrt(k) / sigma``.  No bound; it
    only tells numbers worth an accountant from absurd ones.
    """
    growth = math.expm1(min(one.noise_multiplier**-2, 500.0))
    limit = one.sample_rate * math.sqrt(one.steps * growth)
    most = float(binom.isf(delta / 2, one.steps, one.sample_rate))
    mu = min(limit, math.sqrt(most) / one.noise_multiplier)
    return mu**2 / 2 + mu * math.sqrt(2 * math.log(2 / delta))


def _packed(one: Statement | None) -> dict[str, Any] | None:
    return None if one is None else dataclasses.asdict(one)


def _unpacked(numbers: Mapping[str, Any] | None) -> Statement | None:
    return None if numbers is None else Statement(**numbers)
