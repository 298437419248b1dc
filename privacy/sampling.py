"""Poisson sampling of records."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .plan import PrivacyPlan
from .randomness import RandomSource, coins


class PoissonSampler:
    """Draws batches in which every record appears independently with the plan's rate.

    Parameters
    ----------
    plan : PrivacyPlan
        Gives the rate q; its ``expected_batch_size`` must be q x ``public_records``.
    num_records : int
        Number of records the client holds.
    source : RandomSource
        The coins.
    public_records : int (default: 0)
        The figure that stands for ``num_records`` in the plan; 0: the number itself.

    Notes
    -----
    Formal guarantee: inclusions are independent across records and steps with probability
    q (to 2^-64, never above), which is what the accountant assumes.  Empty and large batches
    are returned as drawn: dropping, topping up or truncating them would void it.
    """

    def __init__(
        self, plan: PrivacyPlan, num_records: int, source: RandomSource, public_records: int = 0
    ) -> None:
        if num_records < 1:
            raise ValueError(f"cannot sample from {num_records} records")
        public = public_records or num_records
        expected = plan.sample_rate * public
        if abs(expected - plan.expected_batch_size) > 1e-6 * expected:
            raise ValueError(
                f"the plan is for an expected batch of {plan.expected_batch_size}, but rate "
                f"{plan.sample_rate} on {public} records gives {expected}"
            )
        self._rate = plan.sample_rate
        self._num_records = num_records
        self._source = source

    def draw(self) -> npt.NDArray[np.int64]:
        """Return the sorted indices of one batch; possibly none."""
        chosen = coins(self._source, self._num_records, self._rate)
        return np.flatnonzero(chosen).astype(np.int64)
