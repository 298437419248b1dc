"""The largest update that an honest client could send, from the public plan alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from .round_plan import RoundPlan
from .scores import filtered_numel
from .tensor_names import Kind, kind_of

# ln(1 / failure probability) of each single inequality.
_LOG = math.log(1e12)
# Parameters are float32, so each step adds up to 2^-24 of a parameter's size.  One percent covers
# parameters up to 1.6e5 times as large as the step they take.
_ROUNDING = 1.01
_BETA1, _BETA2 = 0.9, 0.999  # torch's defaults, which clients use


class Bound(Protocol):
    """Anything that says how long an honest update can be; see :class:`UpdateBound`."""

    def limits(
        self, plan: RoundPlan, shapes: Mapping[str, tuple[int, ...]], count: float | None
    ) -> Mapping[Kind, float]:
        """Largest L2 norm by kind of tensor; may refuse a count with InvalidReply."""
        ...


@dataclass(frozen=True, kw_only=True)
class UpdateBound:
    """Bound on the L2 norm of an honest client's update, by kind of tensor.

    Exactly one of ``expected_batch_size`` and ``sample_rate`` is given: two could disagree.

    Parameters
    ----------
    max_grad_norm : float
        Clip norm C of steps that train A and B together, or the head alone.
    noise_multiplier : float
        Sigma, the largest that any honest client uses; 0 if gradients are only clipped.
    max_grad_norm_a, max_grad_norm_b : float or None
        Clip norms of A-only and B-only steps; None means ``max_grad_norm``.
    expected_batch_size : float or None
        Normaliser b of every client.  A client with fewer records than that takes them all in
        every step and divides by their number; this is known only if its count is given.
    sample_rate : float or None
        Poisson rate q of every client; then b = q x count.

    Notes
    -----
    Formal statement, SGD.  Let step e release ``(sum_j clip(g_j, C_e) + sigma C_e N(0, I)) / b``
    with a Poisson batch of n_e records.  The steps change the tensors of one kind by lr times a
    sum of two parts; the filter shrinks both, its operator norm being 1.

    - Records: at most ``sum_e C_e n_e / b``, a sum of independent terms in [0, C_e / b] with mean
      ``sum_e C_e``.  With probability 1 - e^-L it exceeds its mean by at most
      ``t = M L / 3 + sqrt((M L / 3)^2 + 2 V L)``, where ``V = (1 - q) sum_e C_e^2 / b`` is its
      variance and ``M = (1 - q) max_e C_e / b`` (Bernstein; q = 0 if unknown).  It never exceeds
      ``sum_e C_e / q``.  This holds however gradients depend on earlier steps.
    - Noise: Z ~ N(0, S), a Gaussian of fixed covariance because each step's noise is independent
      of the past.  ``||Z|| <= sqrt(tr S) + sqrt(2 x ||S||_op)`` with probability 1 - e^-x, as
      ``||Z||`` is a ``sqrt(||S||_op)``-Lipschitz function of a standard normal vector and
      ``E||Z|| <= sqrt(tr S)``.  A tensor trained in the steps T adds
      ``sum_{e in T} (sigma C_e / b)^2`` times ``numel`` (or ``filtered_numel``) to the trace; the
      operator norm is at most the largest such sum over the tensors.

    Formal statement, AdamW without weight decay.  In the t-th step of a coordinate, let
    ``m = sum_i w_i g_i`` and ``v = sum_i u_i g_i^2`` be its corrected moments.  By Cauchy-Schwarz
    ``|m| <= rho_t sqrt(v)`` with ``rho_t^2 = sum_i w_i^2 / u_i``, whatever the gradients are.  So
    a tensor moves at most ``lr sqrt(numel) sum_t rho_t``, with certainty and for any b.

    L = x = ln(1e12): with at most three kinds and two inequalities each, an honest reply exceeds
    any of its limits with probability at most 6e-12, for any number of steps.  One percent is
    added for float32 rounding.

    A client's own declared count is safe if the mean is weighted by it: fewer records mean a
    larger limit for noise but a smaller weight.  Under ``sample_rate``, weight times sigma C / b
    is sigma C / q for every count.  With uniform weights, the server must trust the count.

    Not stopped: a malicious client may send anything within the limits, noise and poison alike,
    in every round, and under weighting by counts it chooses its weight.
    """

    max_grad_norm: float
    noise_multiplier: float
    max_grad_norm_a: float | None = None
    max_grad_norm_b: float | None = None
    expected_batch_size: float | None = None
    sample_rate: float | None = None

    def __post_init__(self) -> None:
        """Refuse numbers from which no bound follows."""
        for name, value in vars(self).items():
            if value is None or 0 < value < math.inf or (name, value) == ("noise_multiplier", 0):
                continue
            least = ">= 0" if name == "noise_multiplier" else "> 0"
            raise ValueError(f"{name} must be {least} and finite, got {value}")
        if self.sample_rate is not None and self.sample_rate > 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {self.sample_rate}")
        if (self.expected_batch_size is None) == (self.sample_rate is None):
            raise ValueError("give exactly one of expected_batch_size and sample_rate")

    def limits(
        self, plan: RoundPlan, shapes: Mapping[str, tuple[int, ...]], count: float | None = None
    ) -> dict[Kind, float]:
        """Largest honest norm of the update, over all tensors of a kind jointly.

        Parameters
        ----------
        plan : RoundPlan
            What the client was told to do.
        shapes : mapping of str to tuple of int
            Shapes of the adapter's tensors, at least of all that the round uploads.
        count : float or None
            The client's public number of records.  SGD under ``sample_rate`` needs it.

        Returns
        -------
        dict of str to float
            By kind ("A", "B", "head"), for those that the round uploads.

        Raises
        ------
        ValueError
            If the count is missing where it is needed, or not positive.
        """
        names = plan.uploaded(shapes)
        sizes = {name: float(math.prod(shapes[name])) for name in names}
        trained: dict[str, list[float]] = {name: [] for name in names}  # C of a tensor's steps
        clips: dict[Kind, list[float]] = defaultdict(list)  # C of a kind's steps
        for step in range(1, plan.local_steps + 1):
            active = plan.active(step, names)
            kinds = {kind_of(name) for name in active}
            clip = self._clip_norm(kinds)
            for kind in kinds:
                clips[kind].append(clip)
            for name in active:
                trained[name].append(clip)
        if plan.optimizer == "sgd":
            b, rate = self._batch(count)
        limits: dict[Kind, float] = {}
        for kind, norms in clips.items():
            own = [name for name in names if kind_of(name) == kind]
            if plan.optimizer == "adamw":
                bound = math.sqrt(sum(sizes[n] * _adam_path(len(trained[n])) ** 2 for n in own))
            else:
                # Variance of the noise on each value, summed over the tensor's steps.
                scale = (self.noise_multiplier / b) ** 2
                noise = {n: scale * sum(clip**2 for clip in trained[n]) for n in own}
                smooth = plan.low_pass and kind != "head"
                numel = {n: filtered_numel(shapes[n], n) if smooth else sizes[n] for n in own}
                trace = sum(noise[n] * numel[n] for n in own)
                bound = _records(norms, b, rate)
                bound += math.sqrt(trace) + math.sqrt(2 * _LOG * max(noise.values()))
            limits[kind] = _ROUNDING * plan.learning_rate(own[0]) * bound
        return limits

    def _clip_norm(self, kinds: Iterable[Kind]) -> float:
        """Clip norm of a step, as the client chooses it."""
        factors = "".join(sorted(set(kinds) - {"head"}))
        norm = {"A": self.max_grad_norm_a, "B": self.max_grad_norm_b}.get(factors)
        return self.max_grad_norm if norm is None else norm

    def _batch(self, count: float | None) -> tuple[float, float]:
        """Normaliser b, and the sampling rate q (0 if unknown)."""
        if count is not None and not 0 < count < math.inf:
            raise ValueError(f"count must be > 0 and finite, got {count}")
        if self.sample_rate is not None:
            if count is None:
                raise ValueError("count is missing: under sample_rate the batch size needs it")
            return self.sample_rate * count, self.sample_rate
        assert self.expected_batch_size is not None
        b = min(self.expected_batch_size, math.inf if count is None else count)
        return b, 0.0 if count is None else b / count


def _records(clips: list[float], b: float, rate: float) -> float:
    """Bound on ``sum_e C_e n_e / b`` over Poisson batches n_e of mean b."""
    linear = (1 - rate) * max(clips) / b * _LOG / 3
    variance = (1 - rate) * sum(clip**2 for clip in clips) / b
    excess = linear + math.sqrt(linear**2 + 2 * _LOG * variance)
    # No batch holds more than all b / q records.
    return min(sum(clips) + excess, sum(clips) / rate if rate else math.inf)


def _adam_path(steps: int) -> float:
    """``sum_t rho_t``: how far AdamW moves a coordinate at most, in learning rates."""
    path = 0.0
    ratio = _BETA1**2 / _BETA2
    for t in range(1, steps + 1):
        # w_i^2 / u_i with i counted back from t is a geometric series.
        first = ((1 - _BETA1) / (1 - _BETA1**t)) ** 2 * (1 - _BETA2**t) / (1 - _BETA2)
        path += math.sqrt(first * (1 - ratio**t) / (1 - ratio))
    return path
