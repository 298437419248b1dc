"""How long an honest client's update can be, by the privacy plan that it must have."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

from federation.settings import Settings
from privacy import AccountingError, PrivacyPlan
from strategies import InvalidReply, RoundPlan, UpdateBound
from strategies.tensor_names import Kind


class PlannedBound:
    """The bound of :class:`~strategies.UpdateBound`, for each client's own privacy plan.

    The server makes the plan that a client of this record count has by the settings.  Where counts
    are private it takes the plan with the most noise that a client may have: that of
    ``data.min-records`` records, or, with a common batch size, of a client that takes all its
    records in every step.

    Parameters
    ----------
    settings : Settings
        Of a private run.
    """

    def __init__(self, settings: Settings) -> None:
        self._privacy = settings.privacy
        self._steps = settings.total_steps
        self._rounds = settings.strategy.num_rounds
        batch = settings.privacy.expected_batch_size
        fewest = settings.data.min_records
        # Below the common batch size a client takes all its records in every step.
        self._fewest = min(fewest, math.ceil(batch)) if batch else fewest

    def limits(
        self, plan: RoundPlan, shapes: Mapping[str, tuple[int, ...]], count: float | None
    ) -> dict[Kind, float]:
        """Largest norm by kind of tensor; see :meth:`UpdateBound.limits`.

        Raises
        ------
        InvalidReply
            If no client with that record count can take part in this run.
        """
        bound = self._bound(self._fewest if count is None else self._rounded(int(count)))
        if bound is None:
            raise InvalidReply("no client with so many records can take part")
        return bound.limits(plan, shapes, count)

    def _rounded(self, count: int) -> int:
        """A count, or one up to a tenth below: fewer records have more noise.

        With a common batch size each count has noise of its own, which takes seconds to find;
        rounded, they are a few dozen.
        """
        if not self._privacy.expected_batch_size or count <= self._fewest:
            return count
        return math.floor(self._fewest * 1.1 ** math.floor(math.log(count / self._fewest, 1.1)))

    @functools.lru_cache(maxsize=4096)  # noqa: B019  lives as long as the run
    def _bound(self, count: int) -> UpdateBound | None:
        try:
            plan = PrivacyPlan.for_client(
                self._privacy, num_records=count, steps=self._steps, rounds=self._rounds
            )
        except AccountingError:
            return None
        return UpdateBound(
            max_grad_norm=plan.max_grad_norm,
            max_grad_norm_a=plan.max_grad_norm_a,
            max_grad_norm_b=plan.max_grad_norm_b,
            noise_multiplier=plan.noise_multiplier,
            expected_batch_size=plan.expected_batch_size,
        )
