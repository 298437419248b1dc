"""Which data sets share records, by keyed hashes of each record's content."""

from __future__ import annotations

import hashlib
import hmac
import sqlite3
from collections.abc import Iterable

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


def sharing(connection: sqlite3.Connection, dataset: str, hashes: list[bytes]) -> list[str]:
    """Other data sets that hold any of these hashes."""
    connection.execute("create temp table if not exists asked (hash blob primary key)")
    connection.execute("delete from asked")
    connection.executemany("insert into asked values (?)", ((one,) for one in hashes))
    found = connection.execute(
        "select distinct dataset from records join asked using (hash) where dataset <> ?",
        (dataset,),
    )
    return sorted(str(row[0]) for row in found)


def hold(connection: sqlite3.Connection, dataset: str, hashes: list[bytes]) -> str:
    """Add hashes to those that a data set ever had; the summary of all of them."""
    connection.executemany(
        "insert or ignore into records values (?, ?)", ((one, dataset) for one in hashes)
    )
    return held(connection, dataset)


def held(connection: sqlite3.Connection, dataset: str) -> str:
    """Summary of all hashes that a data set ever had."""
    found = connection.execute(
        "select hash from records where dataset = ? order by hash", (dataset,)
    )
    return summary_of(row[0] for row in found)


def check_held(connection: sqlite3.Connection, expected: dict[str, str]) -> None:
    """Refuse hashes that are not those which the sealed entries speak of.

    Raises
    ------
    LedgerError
        If any is missing, changed or added.
    """
    for dataset, summary in expected.items():
        if held(connection, dataset) != summary:
            raise LedgerError(f"the ledger's record hashes of {dataset} are damaged")
    known = {row[0] for row in connection.execute("select distinct dataset from records")}
    if known - expected.keys():
        raise LedgerError("the ledger has record hashes of a data set that it does not know")
