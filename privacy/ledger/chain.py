"""The ledger's entries: append-only, each sealed by a hash over all before it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from .errors import LedgerError

Kind = Literal["dataset", "plan", "charge"]
START = bytes(32)
"""What the first entry's hash is computed from."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    Parameters
    ----------
    number : int
        1, 2, 3, ... without a gap.
    kind : {"dataset", "plan", "charge"}
        What ``body`` says.
    body : str
        Canonical JSON.
    seal : bytes
        SHA-256 over the seal before, number, kind and body.
    """

    number: int
    kind: Kind
    body: str
    seal: bytes

    @property
    def values(self) -> dict[str, Any]:
        """The body, parsed."""
        values: dict[str, Any] = json.loads(self.body)
        return values


def next_entry(before: Entry | None, kind: Kind, values: Mapping[str, Any]) -> Entry:
    """Seal a new entry that follows ``before``."""
    number = before.number + 1 if before else 1
    body = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return Entry(number, kind, body, _seal(before.seal if before else START, number, kind, body))


def verified(entries: Iterable[Entry]) -> list[Entry]:
    """Return the entries if they are a whole chain.

    Raises
    ------
    LedgerError
        If an entry is missing, changed or out of place.
    """
    chain: list[Entry] = []
    seal = START
    for number, entry in enumerate(entries, 1):
        seal = _seal(seal, number, entry.kind, entry.body)
        if entry.number != number or entry.seal != seal:
            raise LedgerError(f"the ledger's entry {number} is missing or was changed")
        chain.append(entry)
    return chain


def _seal(before: bytes, number: int, kind: str, body: str) -> bytes:
    return hashlib.sha256(before + f"{number}\n{kind}\n{body}".encode()).digest()
