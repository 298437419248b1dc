"""Why a ledger says no."""

from __future__ import annotations


class LedgerError(RuntimeError):
    """The ledger cannot be used: in doubt nothing is released.  The text names file and reason."""


class LedgerRolledBack(LedgerError):
    """The ledger is older than its head in the second place says."""


class DataChanged(RuntimeError):
    """The records are no longer those that the training began with."""


class PlanChanged(RuntimeError):
    """The privacy plan is no longer the one that the training began with."""


class BudgetExhausted(RuntimeError):
    """The steps asked for would exceed the plan, or the data set's budget; nothing was charged."""
