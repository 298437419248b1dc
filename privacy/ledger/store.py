"""The ledger's file: SQLite, one transaction per charge, with its head in a second place."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..files import open_to_others, sync_folder, write_atomically
from .chain import Entry, Kind, next_entry, verified
from .errors import LedgerError, LedgerRolledBack

_FORMAT = 1
_FILE, _LOCK, _KEY = "ledger.sqlite", "lock", "key"
_KEY_BYTES = 32
# One charge takes milliseconds; looking through the hashes of a large data set a minute.
LOCK_SECONDS = 120.0
_TABLES = """
create table ledger (format integer not null, id text not null);
create table entries (
    number integer primary key, kind text not null, body text not null, seal blob not null
);
create table records (hash blob not null, dataset text not null, primary key (hash, dataset))
    without rowid;
"""


class Transaction:
    """The verified ledger, held by this process alone until the transaction ends."""

    def __init__(self, connection: sqlite3.Connection, entries: list[Entry]) -> None:
        self.connection = connection
        self.entries = entries

    def append(self, kind: Kind, values: dict[str, Any]) -> Entry:
        """Add an entry; it is on disk, or none of it is, when the transaction has ended."""
        entry = next_entry(self.entries[-1] if self.entries else None, kind, values)
        self.connection.execute(
            "insert into entries values (?, ?, ?, ?)",
            (entry.number, entry.kind, entry.body, entry.seal),
        )
        self.entries.append(entry)
        return entry


class Store:
    """Entries and record hashes on disk.

    Parameters
    ----------
    folder : Path
        Folder of the ledger; closed to other users.
    head : Path
        File in the second place: number and seal of the last entry.

    Notes
    -----
    The head is written after the entry is committed.  A crash in between leaves a ledger that is
    ahead of its head, which loses nothing; a ledger that does not contain its head's entry was
    rolled back or replaced, and is refused.  Who can put back old copies of both, or delete the
    ledger and let somebody make a new one, is not noticed.
    """

    def __init__(self, folder: Path, head: Path) -> None:
        self.folder = folder
        self.head = head

    @classmethod
    def create(cls, folder: Path, head: Path, *, may_exist: bool = False) -> Store:
        """Make an empty ledger.

        Parameters
        ----------
        folder, head : Path
            As for the class; folders are made.
        may_exist : bool (default: False)
            Whether a ledger that is there already is left as it is, instead of an error.

        Raises
        ------
        LedgerError
            If there is one already, or the head of one that was used.
        """
        store = cls(folder, head)
        if may_exist and (folder / _FILE).exists():
            return store
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            head.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with store._lock():
                if not (may_exist and (folder / _FILE).exists()):
                    store._create()
        except (OSError, sqlite3.Error) as error:
            raise LedgerError(f"ledger {folder}: cannot be made ({_reason(error)})") from error
        return store

    def _create(self) -> None:
        # SQLite would play a lost ledger's write-ahead log into the new one.
        for name in (_FILE, f"{_FILE}-wal"):
            if (self.folder / name).exists():
                raise LedgerError(f"ledger {self.folder}: there is one already ({name})")
        if self.head.exists() and self._head()["entries"] != 0:
            raise LedgerError(
                f"ledger {self.folder}: {self.head} is the head of a ledger that was lost; put "
                "that back: a new one would forget what was spent"
            )
        self._refuse_if_open()
        if not (self.folder / _KEY).exists():
            write_atomically(self.folder / _KEY, secrets.token_bytes(_KEY_BYTES))
        identity = _identity_of(self._read_key())
        # The ledger comes last, and whole: after a crash before that, this can be done again.
        write_atomically(self.head, _head_text(identity, None))
        beside = self.folder / f".{_FILE}.{secrets.token_hex(4)}"
        try:
            os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            with contextlib.closing(sqlite3.connect(beside, isolation_level=None)) as connection:
                connection.executescript("pragma journal_mode = wal; begin;" + _TABLES)
                connection.execute("insert into ledger values (?, ?)", (_FORMAT, identity))
                connection.execute("commit")
            beside.rename(self.folder / _FILE)
        finally:
            beside.unlink(missing_ok=True)
        sync_folder(self.folder)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Hold the verified ledger; what is appended is committed when the block ends.

        Raises
        ------
        LedgerError
            If the ledger is missing, damaged, rolled back, open to other users, locked for too
            long, or the disk is full.  Nothing was appended then, or all of it.
        """
        try:
            self._refuse_if_open()
            with self._lock(), contextlib.closing(self._connect()) as connection:
                connection.execute("begin immediate")
                identity, entries = self._read(connection)
                known = self._compare_head(identity, entries)
                current = Transaction(connection, entries)
                try:
                    yield current
                except BaseException:
                    if connection.in_transaction:  # SQLite ends it by itself on a full disk
                        connection.execute("rollback")
                    raise
                connection.execute("commit")
                if len(entries) > known:
                    write_atomically(self.head, _head_text(identity, entries[-1]))
        except (OSError, sqlite3.Error) as error:
            raise LedgerError(f"ledger {self.folder}: {_reason(error)}") from error

    def key(self) -> bytes:
        """The secret that record hashes are keyed with.

        Raises
        ------
        LedgerError
            If it is lost, or another than the ledger was made with: no overlap would show then.
        """
        key = self._read_key()
        if _identity_of(key) != self._head()["ledger"]:
            raise LedgerError(f"ledger {self.folder}: its key is another ledger's")
        return key

    def _read_key(self) -> bytes:
        try:
            key = (self.folder / _KEY).read_bytes()
        except OSError as error:
            raise LedgerError(f"ledger {self.folder}: its key cannot be read") from error
        if len(key) != _KEY_BYTES:
            raise LedgerError(f"ledger {self.folder}: its key is damaged")
        return key

    def _lock(self) -> contextlib.AbstractContextManager[Any]:
        return _locked(self.folder / _LOCK)

    def _refuse_if_open(self) -> None:
        if not self.folder.is_dir():
            raise LedgerError(f"ledger {self.folder}: there is none; make it with dp-lora ledger")
        why = open_to_others(self.folder, reading=True)
        if why:
            raise LedgerError(
                f"ledger {self.folder}: {why}; accepted is a folder of this user's with mode 0700"
            )

    def _connect(self) -> sqlite3.Connection:
        path = self.folder / _FILE
        if not path.is_file():
            raise LedgerError(
                f"ledger {self.folder}: {_FILE} is not there; make a ledger with dp-lora ledger, "
                "once, or put it back"
            )
        connection = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=30
        )
        connection.execute("pragma synchronous = full")
        return connection

    def _read(self, connection: sqlite3.Connection) -> tuple[str, list[Entry]]:
        rows = connection.execute("select format, id from ledger").fetchall()
        if len(rows) != 1 or rows[0][0] != _FORMAT:
            raise LedgerError(f"ledger {self.folder}: not a ledger of format {_FORMAT}")
        identity = str(rows[0][1])
        found = connection.execute("select number, kind, body, seal from entries order by number")
        try:
            entries = verified(Entry(*row) for row in found)
        except (TypeError, AttributeError, ValueError) as error:
            raise LedgerError(f"ledger {self.folder}: an entry is damaged") from error
        return identity, entries

    def _compare_head(self, identity: str, entries: list[Entry]) -> int:
        """Number of the entry that the second place knows, which must be one of these."""
        head = self._head()
        if head["ledger"] != identity:
            raise LedgerError(f"ledger {self.folder}: {self.head} is the head of another ledger")
        number: int = head["entries"]
        # Each transaction writes the head, so a crash leaves the ledger ahead by one at the most;
        # a head that is further behind was put back itself, which takes nothing from the ledger.
        if number > len(entries) or (number and entries[number - 1].seal.hex() != head["seal"]):
            raise LedgerRolledBack(
                f"ledger {self.folder}: {self.head} knows entry {number}, which the ledger does "
                "not have; an old copy was put back, or another ledger. Put back the newest copy"
            )
        return number

    def _head(self) -> dict[str, Any]:
        try:
            content = self.head.read_bytes()
            why = open_to_others(self.head, reading=False)
            head = json.loads(content)
        except FileNotFoundError as error:
            raise LedgerError(
                f"ledger {self.folder}: its head {self.head} is missing; put it back"
            ) from error
        except (ValueError, RecursionError) as error:
            raise LedgerError(f"ledger {self.folder}: its head {self.head} is damaged") from error
        if why:
            raise LedgerError(
                f"ledger {self.folder}: others could change its head {self.head}, {why}; accepted "
                "is a file of this user's with mode 0600"
            )
        kinds = {"ledger": str, "entries": int, "seal": str}
        whole = isinstance(head, dict) and {n: type(v) for n, v in head.items()} == kinds
        if not whole or head["entries"] < 0:
            raise LedgerError(f"ledger {self.folder}: its head {self.head} is damaged")
        values: dict[str, Any] = head
        return values


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The lock covers commit and head together; it is let go by the system when a process dies.
    lock = FileLock(path, timeout=LOCK_SECONDS, mode=0o600)
    try:
        lock.acquire()
    except Timeout:
        raise LedgerError(f"{path}: another process has held it for {LOCK_SECONDS:g} s") from None
    try:
        yield
    finally:
        lock.release()


def _identity_of(key: bytes) -> str:
    return hashlib.sha256(b"flower-dp-lora ledger\n" + key).hexdigest()[:32]


def _head_text(identity: str, last: Entry | None) -> bytes:
    values = {
        "ledger": identity,
        "entries": last.number if last else 0,
        "seal": last.seal.hex() if last else "",
    }
    return json.dumps(values).encode() + b"\n"


def _reason(error: Exception) -> str:
    # SQLite's texts name tables and states, never values.
    return (
        str(error)
        if isinstance(error, sqlite3.Error)
        else type(error).__name__
        + (f": {error.strerror}" if isinstance(error, OSError) and error.strerror else "")
    )
