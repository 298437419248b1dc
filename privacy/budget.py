"""A client's count of steps within one run."""

from __future__ import annotations

import dataclasses

from .plan import PrivacyPlan


class BudgetExhausted(RuntimeError):
    """The steps asked for would exceed what the plan was calibrated for."""


@dataclasses.dataclass
class StepBudget:
    """Counts private steps against a plan; charged before use, never given back.

    Parameters
    ----------
    plan : PrivacyPlan
        Says how many steps there are.
    charged : int (default: 0)
        Steps charged so far.
    """

    plan: PrivacyPlan
    charged: int = 0

    def charge(self, steps: int) -> None:
        """Take ``steps`` from the budget, before the first of them runs.

        Raises
        ------
        BudgetExhausted
            If fewer are left; nothing is charged then.
        """
        if steps < 1:
            raise ValueError(f"steps must be >= 1, got {steps}")
        if self.charged + steps > self.plan.steps:
            raise BudgetExhausted(
                f"{self.charged} of {self.plan.steps} steps are spent, {steps} more were asked for"
            )
        self.charged += steps

    @property
    def epsilon(self) -> float:
        """Epsilon of the steps charged so far, at the plan's delta."""
        return self.plan.epsilon(self.charged)
