"""Files that are whole or what they were before."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path``: written beside it, brought to the disk, renamed.

    After an error or a crash ``path`` holds what it held before.

    Parameters
    ----------
    path : Path
        In a folder that exists; a file there is replaced.
    content : bytes
        All of the file.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    if os.name == "posix":  # the rename lives in the folder: a power cut could take it back
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
