"""Where a client's time goes: one line a message, in a file of the site's own.

Off unless the environment variable ``DP_LORA_TRACE`` names a folder.  Each process appends to a
file of its own there, which its user alone can read.  The times depend on the drawn batches, and
so on private records: like every log of a site they are for its operator, and nothing here is
ever sent.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LOGGER = logging.getLogger(__name__)
VARIABLE = "DP_LORA_TRACE"


class MessageTrace:
    """What is known of one message; values are added as they come up."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the seconds that the block takes, by the clock and of this process's own work."""
        clock, work = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self._add(f"{name}_seconds", time.perf_counter() - clock)
            self._add(f"{name}_cpu_seconds", time.process_time() - work)

    def _add(self, key: str, seconds: float) -> None:
        self.values[key] = self.values.get(key, 0.0) + seconds


@contextlib.contextmanager
def traced_message() -> Iterator[MessageTrace]:
    """Trace one message from its arrival to its reply."""
    trace = MessageTrace()
    trace.values["started"] = time.time()
    with trace.span("message"):
        yield trace
    trace.values["ended"] = time.time()
    if folder := os.environ.get(VARIABLE):
        _append(Path(folder), trace.values)


def _append(folder: Path, values: dict[str, Any]) -> None:
    try:
        line = json.dumps({"pid": os.getpid(), **values}) + "\n"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        descriptor = os.open(folder / f"{os.getpid()}.jsonl", flags, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            file.write(line)
    except (OSError, TypeError, ValueError) as error:  # it must not cost a round
        _LOGGER.warning("%s: the trace cannot be written: %s", VARIABLE, error)


def read_trace(folder: Path) -> list[dict[str, Any]]:
    """Read all lines of a folder, in the order in which messages ended."""
    lines = [
        json.loads(line)
        for file in sorted(folder.glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    return sorted(lines, key=lambda line: float(line["ended"]))
