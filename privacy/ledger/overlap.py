"""Which data sets share records, by keyed hashes of each record's content."""

from __future__ import annotations

import hashlib
import hmac
import sqlite3
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from .errors import LedgerError

_BYTES = 16


def keyed_hashes(key: bytes, digests: Iterable[bytes]) -> list[bytes]:
    """HMAC-SHA-256 of each record's digest, cut to 16 bytes, sorted, without repetition.

    Without the key nobody can tell by a hash whether a record that they know is in the data.
    """
    return sorted({hmac.digest(key, one, "sha256")[:_BYTES] for one in digests})


def summary_of(hashes: Iterable[bytes]) -> str:
    """One hash of many sorted ones."""
    total = hashlib.sha256()
    for one in hashes:
        total.update(one)
    return total.hexdigest()


def sharing(
    connection: sqlite3.Connection,
    dataset: str,
    hashes: Collection[bytes],
    expected: Mapping[str, str],
) -> tuple[list[str], list[bytes]]:
    """Look for hashes among all that data sets ever had.

    Parameters
    ----------
    connection : sqlite3.Connection
        The ledger's.
    dataset : str
        Whose hashes they are.
    hashes : collection of bytes
        What to look for.
    expected : mapping of str to str
        Summary of each data set's hashes, as the sealed entries say.

    Returns
    -------
    names : list of str
        The other data sets that have any of them.
    held : list of bytes
        All hashes that ``dataset`` itself ever had.

    Raises
    ------
    LedgerError
        If any hash is missing, changed or added.
    """
    wanted = set(hashes)
    names: set[str] = set()
    held: list[bytes] = []
    totals: dict[str, Any] = {}
    # One pass both checks and looks: a damaged tree could show a search less than it shows a scan.
    for one, name in connection.execute("select hash, dataset from records order by hash"):
        if type(one) is not bytes or type(name) is not str:
            raise LedgerError("the ledger's record hashes are damaged")
        totals.setdefault(name, hashlib.sha256()).update(one)
        if name == dataset:
            held.append(one)
        elif one in wanted:
            names.add(name)
    empty = hashlib.sha256().hexdigest()
    for name in totals.keys() | expected.keys():
        found = totals[name].hexdigest() if name in totals else empty
        if found != expected.get(name):
            raise LedgerError(f"the ledger's record hashes of {name} are damaged")
    return sorted(names), held


def hold(connection: sqlite3.Connection, dataset: str, hashes: Iterable[bytes]) -> None:
    """Add hashes to those that a data set ever had."""
    connection.executemany("insert into records values (?, ?)", ((one, dataset) for one in hashes))
