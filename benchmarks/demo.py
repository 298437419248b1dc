"""``python -m benchmarks.demo``: the demo's accuracy over seeds, through real ``make run`` runs.

Every arm runs the app's own settings (``pyproject.toml``) but for what its name says, with seeds
0, 1, ...; the seed sets partition, adapter and head start, the privacy noise is always fresh.
Accuracy is the last round's on the public test split, on which nothing was tuned.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from cli.run import main as run_command
from federation.round_lines import human_epsilon

from .report import bar, finish, page, progress

ARMS: dict[str, list[str]] = {
    "la-lora, epsilon 8": [],
    "la-lora, non-private": ["--epsilon", "none"],
    "la-lora, epsilon 3": ["--epsilon", "3"],
    "la-lora, epsilon 1": ["--epsilon", "1"],
    "as-lora, epsilon 8": ["--method", "as-lora"],
    "ro-lora, epsilon 8": ["--method", "ro-lora"],
    "ffa-lora, epsilon 8": ["--method", "ffa-lora"],
    "dp-lora, epsilon 8": ["--method", "dp-lora"],
    "fed-svd, epsilon 8": ["--method", "fed-svd"],
    "fedex-lora, epsilon 8": ["--method", "fedex-lora"],
    "flora, epsilon 8": ["--method", "flora"],
    "flex-lora, ranks 4 and 2, epsilon 8": [
        *("--method", "flex-lora", "--config", 'lora.client-ranks="4,2"'),
    ],
    "as-lora, int8, epsilon 8": ["--method", "as-lora", "--config", 'wire.dtype="int8"'],
}
_MAIN_ARM = "la-lora, epsilon 8"


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return 1 if a bar fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="seeds per arm (default: 5)")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args(arguments)
    rows = [row for arm in options.arms for row in run_arm(arm, options.seeds)]
    bars = judge(rows)
    return finish(rows, bars, as_json=options.json, table=table)


def run_arm(arm: str, seeds: int) -> list[dict[str, Any]]:
    """Run one arm with seeds 0 to ``seeds`` - 1; a run that fails ends the benchmark."""
    rows = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                status = run_command([*ARMS[arm], "--seed", str(seed), "--output-dir", folder])
            if status:
                raise SystemExit(f"{arm}, seed {seed}: the run failed")
            path = output.getvalue().strip().splitlines()[-1]
            result = json.loads(Path(path).read_text(encoding="utf-8"))
        rows.append({"arm": arm, "seed": seed, **{k: result[k] for k in result if k != "adapter"}})
        progress(f"{arm}, seed {seed}: {result['accuracy_end']:.1%}")
    return rows


def judge(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Compare the main arm with what the project promises of its demo."""
    main_rows = [row for row in rows if row["arm"] == _MAIN_ARM]
    if not main_rows:
        return {}
    ends = [row["accuracy_end"] for row in main_rows]
    start = max(row["accuracy_start"] for row in main_rows)
    slowest = max(row["seconds"] for row in main_rows)
    return {
        "mean accuracy": bar(statistics.mean(ends), 0.90, at_least=True),
        "smallest accuracy": bar(min(ends), 0.87, at_least=True),
        "largest accuracy before the first round": bar(start, 0.25, at_least=False),
        "longest federation in seconds": bar(slowest, 240.0, at_least=False),
    }


def table(rows: list[dict[str, Any]], bars: dict[str, dict[str, Any]]) -> str:
    """The rows by arm in Markdown, then the bars."""
    lines = [
        "| arm | mean | each seed | before | epsilon | up + down | seconds (median) |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of = [row for row in rows if row["arm"] == arm]
        ends = [row["accuracy_end"] for row in of]
        each = " ".join(f"{end:.1%}" for end in ends)
        sent = (of[0]["bytes_up"] + of[0]["bytes_down"]) / 1e6
        seconds = statistics.median(row["seconds"] for row in of)
        lines.append(
            f"| {arm} | {statistics.mean(ends):.1%} | {each} | {of[0]['accuracy_start']:.1%} "
            f"| {human_epsilon(of[0]['epsilon'])} | {sent:.1f} MB | {seconds:.0f} |"
        )
    return page(lines, bars)


if __name__ == "__main__":
    sys.exit(main())
