"""The folder that a run leaves behind: settings, metrics by round, result, adapter."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from strategies.atomic_file import replacing


def default_runs_folder() -> Path:
    """Where runs go when ``output-dir`` is empty."""
    named = os.environ.get("FLOWER_DP_LORA_RUNS")
    return Path(named).expanduser() if named else Path.home() / "flower-dp-lora" / "runs"


def runs_folder(output_dir: str) -> Path:
    """Folder of all runs, by the setting ``output-dir``."""
    return Path(output_dir).expanduser() if output_dir else default_runs_folder()


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` holds all of it or what it held before, even in a crash."""
    with replacing(path) as file:
        file.write(text.encode())


class RunFolder:
    """One run's folder.

    ``settings.json`` (what was asked), ``metrics.jsonl`` (one line a round, round 0 first),
    ``checkpoint.npz`` (the server's state after the last whole round), ``privacy_report.json`` and
    ``.txt`` (what is guaranteed, for machines and for people), ``result.json`` (the end, written
    last), ``adapter/`` (PEFT's format), ``ledgers/`` (in simulation: the virtual clients').

    Parameters
    ----------
    path : Path
        The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.result = path / "result.json"
        self.settings = path / "settings.json"
        self.adapter = path / "adapter"
        self.checkpoint = path / "checkpoint.npz"
        self.ledgers = path / "ledgers"
        self.privacy_report = path / "privacy_report.json"
        self.privacy_report_text = path / "privacy_report.txt"

    @classmethod
    def create(cls, runs: Path, *, method: str, run_id: int) -> RunFolder:
        """Make the folder of a new run; its name ends in the run id."""
        folder = cls(runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{method}-{run_id}")
        folder.path.mkdir(parents=True)
        return folder

    @classmethod
    def find(cls, runs: Path, run_id: int) -> RunFolder | None:
        """The folder of a run, once it exists."""
        found = sorted(runs.glob(f"*-{run_id}"))
        return cls(found[-1]) if found else None

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Keep the settings of the run."""
        write_atomically(self.settings, json.dumps(settings, indent=2, sort_keys=True) + "\n")

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one round's line, on disk when this returns."""
        line = json.dumps({key: _plain(value) for key, value in row.items()}) + "\n"
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def replace_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the lines of an earlier run's rounds, in place of any that are there."""
        lines = [json.dumps({key: _plain(value) for key, value in row.items()}) for row in rows]
        write_atomically(self.metrics, "".join(line + "\n" for line in lines))

    def read_settings(self) -> dict[str, Any]:
        """The settings of the run, by their keys."""
        settings: dict[str, Any] = json.loads(self.settings.read_text(encoding="utf-8"))
        return settings

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write the result; its presence says that the run is complete."""
        plain = {key: _plain(value) for key, value in result.items()}
        write_atomically(self.result, json.dumps(plain, indent=2) + "\n")

    def write_privacy_report(self, report: Mapping[str, Any], text: str) -> None:
        """Write what the run guarantees; ``report`` holds plain finite values or None."""
        write_atomically(self.privacy_report_text, text)
        plain = json.dumps(report, indent=2, allow_nan=False) + "\n"
        write_atomically(self.privacy_report, plain)

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """Lines written so far; one that is still being written is left for later."""
        if not self.metrics.exists():
            return
        for line in self.metrics.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)

    def read_privacy_report(self) -> dict[str, Any]:
        """What a complete run guarantees."""
        report: dict[str, Any] = json.loads(self.privacy_report.read_text(encoding="utf-8"))
        return report

    def read_result(self) -> dict[str, Any]:
        """The result of a complete run."""
        result: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
        return result


def _plain(value: Any) -> Any:
    """JSON has no infinity: what has no finite value (epsilon without privacy) is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
