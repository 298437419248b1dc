"""Noise and epsilon of one site's training, as in a run, and how loud that noise is."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any, Self

from ..accounting import prv_epsilon, rdp_epsilon
from ..plan import PrivacyPlan
from ..settings import PrivacySettings


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One site's training: records, Poisson rate q, rounds x local steps, delta."""

    records: int
    rate: float
    rounds: int
    local_steps: int
    delta: float

    @property
    def batch(self) -> float:
        """Expected batch size b = q x records, the normaliser of a step."""
        return self.rate * self.records

    @property
    def steps(self) -> int:
        """All private steps: rounds x local steps."""
        return self.rounds * self.local_steps

    def variant(
        self,
        *,
        rounds: int | None = None,
        batch: float | None = None,
        records: int | None = None,
        keep_rate: bool = False,
    ) -> Self | None:
        """The same training with other rounds, batch or records.

        Parameters
        ----------
        rounds, batch, records : number, optional
            What is different.
        keep_rate : bool (default: False)
            With other records the rate stays and the batch follows; else the batch stays.

        Returns
        -------
        Training or None
            ``None`` if there is no such training: a batch above the records, no round, no record,
            or a delta that is not below 1 / records.
        """
        rounds = self.rounds if rounds is None else rounds
        rate = self.rate
        if batch is not None or (records is not None and not keep_rate):
            rate = (self.batch if batch is None else batch) / (records or self.records)
        records = self.records if records is None else records
        if rounds < 1 or records < 1 or rate > 1 + 1e-9 or self.delta * records >= 1:
            return None
        return dataclasses.replace(self, rounds=rounds, rate=min(1.0, rate), records=records)


@dataclasses.dataclass(frozen=True, slots=True)
class Epsilons:
    """Epsilon of one plan by three accountants; ``pld`` is of record."""

    pld: float
    prv: float
    rdp: float


@dataclasses.dataclass(frozen=True, slots=True)
class Signal:
    """How loud the noise is, for a mean gradient that is as long as clipping lets it be.

    Parameters
    ----------
    step : float
        Norm of one step's noise on the mean, ``sigma C sqrt(d) / b``, over C.
    run : float
        The same for the sum of all steps, if all their gradients point the same way:
        ``step / sqrt(steps)``.
    per_value : float
        Standard deviation of the noise on each value of the mean, ``sigma / b``, in units of C.
    """

    step: float
    run: float
    per_value: float

    @classmethod
    def of(cls, training: Training, noise_multiplier: float, values: int) -> Self:
        """Of a training with so much noise, in steps that train ``values`` values."""
        per_value = noise_multiplier / training.batch
        step = per_value * math.sqrt(values)
        return cls(step=step, run=step / math.sqrt(training.steps), per_value=per_value)


def make_plan(
    training: Training, *, epsilon: float | None = None, noise_multiplier: float | None = None
) -> PrivacyPlan:
    """The plan that a run would have for an epsilon, or the one with a given noise multiplier."""
    if noise_multiplier is None:
        settings = PrivacySettings(
            target_epsilon=epsilon or 0.0,
            target_delta=training.delta,
            sample_rate=training.rate,
        )
        return PrivacyPlan.for_client(settings, num_records=training.records, steps=training.steps)
    return PrivacyPlan(
        sample_rate=training.rate,
        expected_batch_size=training.batch,
        max_grad_norm=1.0,
        noise_multiplier=noise_multiplier,
        steps=training.steps,
        target_delta=training.delta,
    )


def all_epsilons(plan: PrivacyPlan) -> Epsilons:
    """Epsilon of all steps by every accountant.

    Raises
    ------
    AccountingError
        If PLD and PRV disagree, as in a run.
    """
    pld = plan.checked_epsilon()
    numbers: dict[str, Any] = {
        "sample_rate": plan.sample_rate,
        "noise_multiplier": plan.noise_multiplier,
        "delta": plan.target_delta,
    }
    error = min(0.05, max(0.001, pld / 200))
    prv = prv_epsilon(steps=plan.steps, error=error, **numbers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that more orders would be tighter: it is the looser one
        rdp = rdp_epsilon(steps=plan.steps, **numbers)
    return Epsilons(pld=pld, prv=prv, rdp=rdp)
