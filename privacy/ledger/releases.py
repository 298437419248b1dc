"""Replies that were made, kept until they are no longer asked for: sent again, never made again."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..files import write_atomically
from .errors import LedgerError


class Releases:
    """The latest reply of each plan, on disk before it is sent.

    Parameters
    ----------
    folder : Path
        Made when first needed, closed to other users.

    Notes
    -----
    A reply is what left the site, or was about to: privatised already, and protected as it is.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, plan: int, request: str, reply: bytes) -> None:
        """Store a reply; it takes the place of the plan's earlier ones.

        Raises
        ------
        LedgerError
            If it cannot be brought to the disk: then it must not be sent.
        """
        path = self._path(plan, request)
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            write_atomically(path, hashlib.sha256(reply).digest() + reply)
            for earlier in self._folder.glob(f"{plan}-*.reply"):
                if earlier != path:
                    earlier.unlink(missing_ok=True)
        except OSError as error:
            raise LedgerError(
                f"ledger: a reply cannot be stored in {self._folder} ({error.strerror})"
            ) from error

    def find(self, plan: int, request: str) -> bytes | None:
        """The stored reply to a request; ``None`` if there is none, or it is damaged."""
        try:
            content = self._path(plan, request).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LedgerError(f"ledger: {self._folder} cannot be read") from error
        seal, reply = content[:32], content[32:]
        return reply if hashlib.sha256(reply).digest() == seal else None

    def _path(self, plan: int, request: str) -> Path:
        return self._folder / f"{plan}-{request}.reply"
