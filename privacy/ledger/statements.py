"""What each data set has spent and has left, for the operator's eyes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ..privacy_filter import BudgetLimit
from .book import Book, PlanAccount


@dataclasses.dataclass(frozen=True)
class AccountStatement:
    """One data set's account.

    Parameters
    ----------
    dataset : str
        Its id.
    limit : BudgetLimit or None
        What the policy allows; ``None`` if the policy no longer names it.
    shares_with : tuple of str
        Data sets that hold records of this one, whose spending counts here in full.
    records : int
        Distinct records when they were last looked at; the site's own business.
    spent : float
        Epsilon at the limit's delta, of all that was ever charged to it and to those.
    left : float
        Epsilon of the largest single release that is still allowed.
    plans : tuple of PlanAccount
        Trainings that were charged, in their order.
    """

    dataset: str
    limit: BudgetLimit | None
    shares_with: tuple[str, ...]
    records: int
    spent: float
    left: float
    plans: tuple[PlanAccount, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is not finite is null."""
        return {
            "dataset": self.dataset,
            "max-epsilon": self.limit.max_epsilon if self.limit else None,
            "max-delta": self.limit.max_delta if self.limit else None,
            "spent": _finite(self.spent),
            "left": _finite(self.left),
            "records": self.records,
            "shares-records-with": list(self.shares_with),
            "trainings": [
                {
                    "training": plan.training,
                    "dataset": plan.dataset,
                    "sample-rate": plan.sample_rate,
                    "noise-multiplier": plan.noise_multiplier,
                    "steps": plan.steps,
                    "most-steps": plan.most_steps,
                    "rounds": len(plan.rounds),
                    "evaluations": plan.evaluations,
                }
                for plan in self.plans
            ],
        }


def account_statements(
    book: Book, limits: Mapping[str, BudgetLimit], *, delta: float = 1e-5
) -> list[AccountStatement]:
    """State every account of a ledger and of a policy.

    Parameters
    ----------
    book : Book
        The ledger's state.
    limits : mapping of str to BudgetLimit
        The policy's budgets.
    delta : float (default: 1e-5)
        For accounts that have no limit.
    """
    statements = []
    for name in sorted(book.holdings.keys() | limits.keys()):
        plans = tuple(book.spent(name))
        spent = [plan.spendings for plan in plans]
        limit = limits.get(name)
        by = limit or BudgetLimit(math.inf, delta)
        holding = book.holdings.get(name)
        statements.append(
            AccountStatement(
                dataset=name,
                limit=limit,
                shares_with=tuple(sorted(book.group(name) - {name})),
                records=holding.count if holding else 0,
                spent=by.spent(spent),
                left=by.left(spent) if limit else 0.0,
                plans=plans,
            )
        )
    return statements


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
