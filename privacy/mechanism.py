"""One private step: Poisson batch, clipped sum, noise, public normaliser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .ledger.errors import BudgetExhausted
from .plan import PrivacyPlan, StepKind
from .randomness import RandomSource, standard_normal
from .sampling import PoissonSampler
from .virtual_batches import ClippingEngine, Losses, clipped_sum_in_parts


def privatize(
    clipped_sums: Mapping[str, Tensor], plan: PrivacyPlan, kind: StepKind, source: RandomSource
) -> dict[str, Tensor]:
    """Add the plan's noise to a clipped sum and divide by the plan's public batch size.

    Parameters
    ----------
    clipped_sums : mapping of str to Tensor
        ``sum_j clip(g_j)`` of all tensors that the step trains, clipped jointly to
        ``plan.clip_norm(kind)``.
    plan : PrivacyPlan
        Gives sigma, C and b.
    kind : {"A", "B", "mixed"}
        Which factors the step trains; chooses C.
    source : RandomSource
        Independent of everything else.

    Returns
    -------
    dict of str to Tensor
        ``(sum + sigma C N(0, I)) / b``, same shapes, float32, on the sums' device.

    Notes
    -----
    Formal guarantee: one release of the Gaussian mechanism with sensitivity C per record and
    noise multiplier sigma; with Poisson batches, one step of ``plan.epsilon``.  Sum and noise
    meet in float64 and are rounded to float32 afterwards.  Not covered: attacks on the finite
    set of floating-point outputs (Mironov, 2012).
    """
    std = plan.noise_std(kind)
    released = {}
    for name, total in clipped_sums.items():
        value = total.detach().to("cpu", torch.float64)
        if std > 0:
            value = value + std * standard_normal(source, total.shape)
        released[name] = (value / plan.expected_batch_size).to(total.device, torch.float32)
    return released


def noised_count(count: int, plan: PrivacyPlan, source: RandomSource) -> float:
    """A number of records that have some property, with the plan's evaluation noise.

    Parameters
    ----------
    count : int
        How many records have it; one record changes it by at most 1.
    plan : PrivacyPlan
        Gives the noise; must have evaluations.
    source : RandomSource
        Independent of everything else.

    Notes
    -----
    Formal guarantee: a release of the Gaussian mechanism with sensitivity 1 and noise of scale
    ``plan.evaluation_noise_multiplier``, which ``plan.epsilon`` composes with the steps.  Not
    covered: a count to which one record adds more than 1.
    """
    if plan.evaluations < 1:
        raise ValueError("the plan allows no evaluations")
    return count + plan.evaluation_noise_multiplier * float(standard_normal(source, (1,))[0])


class PrivateGradient:
    """Draws batches and returns privatised mean gradients, one step at a time.

    Parameters
    ----------
    plan : PrivacyPlan
        All privacy numbers.
    engine : ClippingEngine
        Per-record gradients and clipping.
    num_records : int
        Records of the client.
    losses : callable
        ``losses(indices)`` runs the model on these records and returns one loss each, (n,).
        Never called with an empty batch.
    source : RandomSource
        Coins and noise.
    charged : int
        Steps that were paid for; not one more is taken.
    max_physical_batch_size : int (default: 0)
        Most records in the model at once; 0: the whole batch.
    public_records : int (default: 0)
        The figure that stands for ``num_records`` in the plan; 0: the number itself.

    Attributes
    ----------
    steps_taken : int
        Steps released so far, empty batches included.
    secure : bool
        Whether nobody can reproduce the noise.
    """

    def __init__(
        self,
        plan: PrivacyPlan,
        engine: ClippingEngine,
        num_records: int,
        losses: Losses,
        source: RandomSource,
        charged: int,
        max_physical_batch_size: int = 0,
        public_records: int = 0,
    ) -> None:
        self.plan = plan
        self.steps_taken = 0
        self.secure = source.secure
        self._charged = charged
        self._engine = engine
        self._losses = losses
        self._source = source
        self._max_physical_batch_size = max_physical_batch_size
        self._sampler = PoissonSampler(plan, num_records, source, public_records)

    def step(self, active: Sequence[str], kind: StepKind) -> dict[str, Tensor]:
        """One step's privatised mean gradient of the active tensors.

        An empty batch runs no model and is noised and counted like any other.

        Parameters
        ----------
        active : sequence of str
            Tensors that this step trains; they alone are clipped, noised and returned.
        kind : {"A", "B", "mixed"}
            Which factors those are.

        Notes
        -----
        Formal guarantee: ``steps_taken`` calls cost ``plan.epsilon(steps_taken)`` at
        ``plan.target_delta``; what is done with the result is post-processing.

        Raises
        ------
        BudgetExhausted
            If all steps that were charged are taken; nothing is computed then.
        """
        if self.steps_taken >= min(self._charged, self.plan.steps):
            raise BudgetExhausted(f"all {self.steps_taken} steps that were charged are taken")
        self.steps_taken += 1  # also if what follows fails
        indices = self._sampler.draw()
        sums = clipped_sum_in_parts(
            self._engine,
            active,
            self._losses,
            indices,
            self.plan.clip_norm(kind),
            self._max_physical_batch_size,
        )
        return privatize(sums, self.plan, kind, self._source)
