"""The privacy plan: the one object that holds a client's privacy numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, Self

from .accounting import (
    AccountingError,
    Parts,
    calibrate_noise_multiplier,
    composed_epsilon,
    cross_check,
)
from .settings import PrivacySettings

StepKind = Literal["A", "B", "mixed"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyPlan:
    """All numbers of one client's private training, fixed before its first step.

    The same object configures the sampler (``sample_rate``), the clipping
    (:meth:`clip_norm`), the noise (:meth:`noise_std`), the normaliser
    (``expected_batch_size``) and the accountant (:meth:`epsilon`), so they cannot disagree.

    Parameters
    ----------
    sample_rate : float
        Poisson rate q in (0, 1].
    expected_batch_size : float
        Public normaliser b = q x records; never the drawn batch's size.
    max_grad_norm : float
        Clip norm C of steps that train A and B tensors together (and of all steps for which
        no own norm is given); ``inf`` only without privacy.
    max_grad_norm_a, max_grad_norm_b : float or None
        Clip norms of A-only and B-only steps.
    noise_multiplier : float
        Sigma: noise standard deviation on the sum, in units of the step's clip norm; 0 only
        without privacy.
    steps : int
        Most private steps the plan allows, over all rounds.
    target_delta : float
        Delta at which epsilon is stated.
    evaluations : int (default: 0)
        Most noised evaluations the plan allows, one a round.
    evaluation_noise_multiplier : float (default: 0.0)
        Noise standard deviation on each evaluation's count of records, whose sensitivity is 1.
    adjacency : str
        ``"zero-out"``: neighbouring data sets differ in one record that contributes or does
        not; the number of records is public.

    Notes
    -----
    Formal guarantee: up to ``steps`` releases of ``sum_j clip(g_j, C) + sigma C N(0, I)`` on
    Poisson batches at rate q are (``epsilon()``, ``target_delta``)-DP per record of this
    client, against anybody who sees every release (the server included).  Not covered:
    floating-point attacks on the noise, timing, and anything else that leaves the client.
    """

    sample_rate: float
    expected_batch_size: float
    max_grad_norm: float
    noise_multiplier: float
    steps: int
    target_delta: float
    max_grad_norm_a: float | None = None
    max_grad_norm_b: float | None = None
    evaluations: int = 0
    evaluation_noise_multiplier: float = 0.0
    adjacency: Literal["zero-out"] = "zero-out"

    def __post_init__(self) -> None:
        """Refuse numbers that no mechanism could have."""
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {self.sample_rate}")
        if not (self.expected_batch_size > 0 and math.isfinite(self.expected_batch_size)):
            raise ValueError(f"expected_batch_size must be > 0, got {self.expected_batch_size}")
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")
        if not 0 < self.target_delta < 1:
            raise ValueError(f"target_delta must be in (0, 1), got {self.target_delta}")
        norms = (self.max_grad_norm, self.max_grad_norm_a, self.max_grad_norm_b)
        if not all(norm is None or norm > 0 for norm in norms):
            raise ValueError(f"clip norms must be > 0, got {norms}")
        if self.noise_multiplier < 0 or not math.isfinite(self.noise_multiplier):
            raise ValueError(f"noise_multiplier must be >= 0, got {self.noise_multiplier}")
        if self.evaluations < 0 or (self.evaluations > 0) != (self.evaluation_noise_multiplier > 0):
            raise ValueError(
                "evaluations need noise, and noise evaluations; got "
                f"{self.evaluations} and {self.evaluation_noise_multiplier}"
            )
        unbounded = any(norm is not None and math.isinf(norm) for norm in norms)
        if self.noise_multiplier > 0 and unbounded:
            raise ValueError("noise on an unbounded gradient protects nothing: finite clip norm")

    @property
    def is_private(self) -> bool:
        """Whether the plan gives any guarantee (noise on a clipped sum)."""
        return self.noise_multiplier > 0

    def clip_norm(self, kind: StepKind) -> float:
        """Clip norm C of a step that trains ``kind`` factors (heads are inside the norm)."""
        own = {"A": self.max_grad_norm_a, "B": self.max_grad_norm_b, "mixed": None}[kind]
        return self.max_grad_norm if own is None else own

    def noise_std(self, kind: StepKind) -> float:
        """Standard deviation sigma x C of the noise on each value of the clipped sum."""
        return self.noise_multiplier * self.clip_norm(kind) if self.is_private else 0.0

    def epsilon(self, steps: int | None = None, evaluations: int | None = None) -> float:
        """Epsilon at ``target_delta`` after so many steps and evaluations (default: all), by PLD.

        A-steps, B-steps and evaluations compose: they see the same records.  Infinite without
        privacy.
        """
        taken = self.steps if steps is None else steps
        if not self.is_private:
            return math.inf if taken else 0.0
        parts = ((self.sample_rate, self.noise_multiplier, taken), *self._beside(evaluations))
        return composed_epsilon(parts, delta=self.target_delta)

    def _beside(self, evaluations: int | None = None) -> Parts:
        times = self.evaluations if evaluations is None else evaluations
        return ((1.0, self.evaluation_noise_multiplier, times),) if times else ()

    def checked_epsilon(self) -> float:
        """:meth:`epsilon` of all steps, refused unless a second accountant agrees."""
        if not self.is_private:
            return math.inf
        return cross_check(
            sample_rate=self.sample_rate,
            noise_multiplier=self.noise_multiplier,
            steps=self.steps,
            delta=self.target_delta,
            beside=self._beside(),
        )

    @classmethod
    def for_client(
        cls, settings: PrivacySettings, *, num_records: int, steps: int, rounds: int = 0
    ) -> Self:
        """Make the plan of a client with ``num_records`` records and at most ``steps`` steps.

        Parameters
        ----------
        settings : PrivacySettings
            The run's wishes.
        num_records : int
            Public number of records of the client.
        steps : int
            Rounds x local steps, the most the client may be asked for.
        rounds : int (default: 0)
            The most evaluations it may be asked for, if the settings have any.

        Raises
        ------
        AccountingError
            If delta is not below 1 / records (such a delta would allow publishing a record),
            or the noise cannot be calibrated.
        """
        if num_records < 1:
            raise AccountingError(f"a plan needs at least one record, got {num_records}")
        rate = settings.sample_rate or min(1.0, settings.expected_batch_size / num_records)
        if settings.mode != "record":  # the noise, if any, is put on a sum over clients
            summed = settings.mode == "record-distributed"
            return cls(
                sample_rate=rate,
                expected_batch_size=rate * num_records,
                max_grad_norm=settings.max_grad_norm if summed else math.inf,
                noise_multiplier=0.0,
                steps=steps,
                target_delta=settings.target_delta,
            )
        if settings.target_delta >= 1 / num_records:
            raise AccountingError(
                f"privacy.target-delta must be below 1 / records = {1 / num_records:.2e}, "
                f"got {settings.target_delta:g}"
            )
        noise = settings.evaluation_noise_multiplier
        evaluations = rounds if noise else 0
        return cls(
            sample_rate=rate,
            expected_batch_size=rate * num_records,
            max_grad_norm=settings.max_grad_norm,
            max_grad_norm_a=settings.max_grad_norm_a or None,
            max_grad_norm_b=settings.max_grad_norm_b or None,
            noise_multiplier=calibrate_noise_multiplier(
                target_epsilon=settings.target_epsilon,
                target_delta=settings.target_delta,
                sample_rate=rate,
                steps=steps,
                beside=((1.0, noise, evaluations),) if evaluations else (),
            ),
            steps=steps,
            target_delta=settings.target_delta,
            evaluations=evaluations,
            evaluation_noise_multiplier=noise if evaluations else 0.0,
        )
