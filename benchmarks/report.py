"""What all benchmarks share: rows and bars, how they are printed, and being inside a run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.supercore.task_identity import TaskIdentity

Rows = list[dict[str, Any]]
Bars = dict[str, dict[str, Any]]


def bar(value: float, limit: float, *, at_least: bool) -> dict[str, Any]:
    """One promise and whether it holds."""
    return {"value": value, "limit": limit, "ok": value >= limit if at_least else value <= limit}


def finish(
    rows: Rows,
    bars: Bars,
    *,
    as_json: bool,
    table: Callable[[Rows, Bars], str] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> int:
    """Print the result on standard output; return 1 if a bar fails.

    Parameters
    ----------
    rows, bars : list and dict
        What was measured, and what was promised of it.
    as_json : bool
        One JSON object instead of the table.
    table : callable, optional
        Makes the text; only needed without ``as_json``.
    facts : mapping, optional
        More for the JSON object: the commit, settings.
    """
    if as_json or table is None:
        result = {"machine": machine(), **(facts or {}), "rows": rows, "bars": bars}
        print(json.dumps(result, indent=2))
    else:
        print(table(rows, bars))
    return 0 if all(promise["ok"] for promise in bars.values()) else 1


def bar_lines(bars: Bars, form: str = ".3f") -> list[str]:
    """A line for each bar; ``form`` is the format of its value."""
    lines = []
    for name, promise in bars.items():
        verdict = "holds" if promise["ok"] else "FAILS"
        lines.append(f"{name}: {promise['value']:{form}} (limit {promise['limit']:g}): {verdict}")
    return lines


def page(lines: Sequence[str], bars: Bars, form: str = ".3f") -> str:
    """The machine, what was measured, and the bars."""
    return "\n".join([f"Machine: {machine()}", "", *lines, "", *bar_lines(bars, form)])


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, line by line."""
    rule = ["---"] * len(header)
    return [
        f"| {' | '.join(header)} |",
        f"|{'|'.join(rule)}|",
        *(f"| {' | '.join(cells)} |" for cells in lines),
    ]


def machine() -> str:
    """What the figures were measured on."""
    parts = [f"{os.cpu_count()} cores", platform.machine(), *_cpu_model()]
    threads = os.environ.get("OMP_NUM_THREADS", "")
    threads = f"OMP_NUM_THREADS={threads}" if threads else f"{os.cpu_count()} threads"
    parts += [f"Python {platform.python_version()}", f"numpy {np.__version__}"]
    # By its metadata: most benchmarks do not load torch.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        parts.append(f"torch {importlib.metadata.version('torch')}")
    parts.append(threads)
    return ", ".join(parts)


def commit() -> str:
    """The commit that is measured, ``+`` behind it if files differ; ``unknown`` outside git."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def peak_rss() -> int:
    """Peak resident bytes of this process.

    ``ru_maxrss`` starts from what the parent held when it started us; Linux's VmHWM does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def inside_a_run() -> None:
    """Let this process make Messages, which Flower allows inside a run only.

    It is an internal class of Flower's that says so; its tests and ours set it the same way.
    """
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


@contextlib.contextmanager
def quiet(name: str = "flwr") -> Iterator[None]:
    """Keep a logger's lines out of a benchmark's own; by default the strategies' on each round."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def progress(text: str) -> None:
    """Say on standard error what was just done: standard output is for the result."""
    print(text, file=sys.stderr, flush=True)


def _cpu_model() -> list[str]:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")][:1]
