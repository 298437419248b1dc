"""The site's own account of what its data sets have lost, on its own disk.

``chain.py`` seals entries, ``book.py`` says what they add up to, ``store.py`` keeps them in SQLite
with a head in a second place, ``overlap.py`` finds data sets that share records, ``releases.py``
keeps replies, and ``ledger.py`` puts these together.
"""

from __future__ import annotations

from .book import Book, PlanAccount
from .errors import BudgetExhausted, DataChanged, LedgerError, LedgerRolledBack, PlanChanged
from .ledger import Charge, Ledger, Request

__all__ = [
    "Book",
    "BudgetExhausted",
    "Charge",
    "DataChanged",
    "Ledger",
    "LedgerError",
    "LedgerRolledBack",
    "PlanAccount",
    "PlanChanged",
    "Request",
]
