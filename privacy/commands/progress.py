"""Progress on stderr, so that stdout holds the answer alone."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Counts parts of a task: one line that changes on a terminal, a few lines elsewhere.

    Parameters
    ----------
    parts : int
        How many there are.
    stream : TextIO, optional
        Where to; ``None``: stderr.
    """

    def __init__(self, parts: int, stream: TextIO | None = None) -> None:
        self._parts = parts
        self._done = 0
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._started = self._told = time.monotonic()

    def begin(self, what: str) -> None:
        """Say what is being done now; each call is a part."""
        now = time.monotonic()
        self._done = min(self._done + 1, self._parts)
        line = f"[{self._done}/{self._parts}] {what}"
        if self._live:
            print(f"\r{line:<72.72}", end="", file=self._stream, flush=True)
        elif self._done == 1 or now - self._told >= 5:  # a log shall not fill up
            print(line, file=self._stream, flush=True)
            self._told = now

    def end(self) -> None:
        """Clear the line, or say how long it took."""
        if self._live:
            print(f"\r{'':<72}\r", end="", file=self._stream, flush=True)
        else:
            seconds = time.monotonic() - self._started
            print(f"[{self._parts}/{self._parts}] {seconds:.0f} s", file=self._stream, flush=True)
