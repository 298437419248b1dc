"""How the one long wait of the embedded default shows itself on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[str, int, int], None]
"""Called with the stage's name, the units done and the units in all."""

_SECONDS_BETWEEN_LINES = 10.0


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""


@contextmanager
def shown_on_stderr() -> Iterator[Report]:
    """Give a report that draws a bar on a terminal and writes occasional lines elsewhere."""
    if sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        yield _lines()


@contextmanager
def _bar() -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    tasks: dict[str, TaskID] = {}
    with Progress(console=Console(stderr=True)) as bars:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield report


def _lines() -> Report:
    last_stage = ""
    last_time = 0.0

    def report(stage: str, done: int, total: int) -> None:
        nonlocal last_stage, last_time
        now = time.monotonic()
        due = now - last_time >= _SECONDS_BETWEEN_LINES
        if due or stage != last_stage or done == total:
            print(f"{stage}: {done}/{total}", file=sys.stderr, flush=True)
            last_stage, last_time = stage, now

    return report
