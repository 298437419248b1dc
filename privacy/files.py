"""Files of the site's own: whole or absent, and closed to other users."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path


def write_atomically(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Put ``content`` in place of ``path``, on disk when this returns.

    After an error or a crash ``path`` is what it was before.

    Parameters
    ----------
    path : Path
        In a folder that exists.
    content : bytes
        All of it.
    mode : int (default: 0o600)
        Of a new file, less what the umask takes off.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring a folder's own entries (new names, renames) to the disk."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_to_others(path: Path, *, reading: bool) -> str:
    """Say why others than this user could change (or read) a file or folder; empty if none can.

    Parameters
    ----------
    path : Path
        Must exist.
    reading : bool
        Whether others may not read it either.
    """
    if os.name != "posix":
        return ""
    status = path.stat()
    if status.st_uid not in (os.geteuid(), 0):
        return "it belongs to another user"
    bits = stat.S_IRWXG | stat.S_IRWXO if reading else stat.S_IWGRP | stat.S_IWOTH
    if stat.S_IMODE(status.st_mode) & bits:
        return f"its mode is {stat.S_IMODE(status.st_mode):04o}"
    return ""
