"""``python -m benchmarks.audit``: what a client loses at least, against its claim.

Plays rounds with the real client in this process: real messages, engine, sampler, clipping, noise,
optimizer.  Canary gradients go in before the clip, and lower bounds on epsilon come out; beside
them stand tests of what canaries cannot see.  Then the client is broken on purpose, one fault at a
time, and the detector that is named for each fault must notice.  docs/audit.md explains all of it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from federation.messages import ClientFailure

from .audit_checks import CHECKS
from .audit_controls import CONTROLS, Control
from .audit_runs import CONFIDENCE, OTHERS, canary_run, two_world_bound
from .audit_site import ClientRefused, Site
from .report import Bars, Rows, bar, commit, finish, inside_a_run, markdown, page, progress

# Codes by which a client refuses a step for privacy's sake.  Any other is a bug, not a detection.
_REFUSALS = {int(ClientFailure.PRIVACY), int(ClientFailure.BUDGET_EXHAUSTED)}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is done."""

    canaries: int
    rounds: int
    local_steps: int
    sample_rate: float
    trials: int
    runs: int
    epsilons: tuple[float, ...] = (1.5, 5.0)
    two_world_noise: float = 2.0


QUICK = Scale(1000, 5, 4, 0.2, 6000, 1)
FULL = Scale(2000, 10, 4, 0.2, 12000, 2)


def main(arguments: list[str] | None = None) -> int:
    """Run the audit; return 1 if a bound lies above its claim, or a fault goes unnoticed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer canaries, steps and runs")
    parser.add_argument("--seed", type=int, default=0, help="of coins, data, noise (default: 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error(f"--seed must be 0 or more, got {options.seed}")
    scale = QUICK if options.quick else FULL
    inside_a_run()
    start = time.monotonic()
    with _without_log_lines(), tempfile.TemporaryDirectory() as folder:
        rows = audit(Path(folder), scale, options.seed)
    facts = {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seed": options.seed,
        "confidence": CONFIDENCE,
        "settings": {**dataclasses.asdict(scale), "records_beside_canaries": OTHERS},
        "seconds": round(time.monotonic() - start, 1),
    }
    return finish(rows, judge(rows), as_json=options.json, table=table, facts=facts)


def audit(folder: Path, scale: Scale, seed: int) -> Rows:
    """Bounds and detectors of the client as it is, then the detectors of broken clients."""
    rows: Rows = []
    for run in range(scale.runs):
        place = folder / str(run)
        place.mkdir()
        site = Site(
            place,
            seed + run,
            rounds=scale.rounds,
            local_steps=scale.local_steps,
            sample_rate=scale.sample_rate,
        )
        for epsilon in scale.epsilons:
            rows += bound_rows(site, scale, epsilon, seed + run)
        bound, claimed = two_world_bound(scale.trials, scale.two_world_noise, seed + run)
        rows.append(_bound("one step", "two worlds", bound, claimed, seed + run))
        for name, check in CHECKS.items():
            finding = check(site, seed + run)
            rows.append({"kind": "detector", "seed": seed + run, **dataclasses.asdict(finding)})
            progress(f"{name}: {'passed' if finding.passed else 'FAILED'}")
        if run == 0:
            controls = [try_control(control, site, seed) for control in CONTROLS]
    return rows + controls


def bound_rows(site: Site, scale: Scale, epsilon: float, seed: int) -> Rows:
    """Lower bounds on epsilon from one run with canaries."""
    run = canary_run(site, canaries=scale.canaries, epsilon=epsilon, seed=seed)
    bounds = {**run.bounds(), "one run, accounted": run.accounted_bound()}
    what = f"{scale.rounds} rounds of {scale.local_steps} steps"
    for name, value in bounds.items():
        progress(f"epsilon {run.claimed:.3f} claimed, {name}: at least {value:.3f}")
    return [_bound(what, name, value, run.claimed, seed) for name, value in bounds.items()]


def try_control(control: Control, site: Site, seed: int) -> dict[str, Any]:
    """Break the client and ask the detector that is named for it."""
    row: dict[str, Any] = {"kind": "control", "control": control.name, "seed": seed}
    try:
        with control.broken():
            finding = dataclasses.asdict(CHECKS[control.detector](site, seed))
        row |= {**finding, "detected": not finding["passed"]}
    except ClientRefused as refusal:
        if refusal.code not in _REFUSALS:
            raise
        row |= {"detector": control.detector, "detected": True, "detail": f"refused: {refusal}"}
    progress(f"{control.name}: {'detected' if row['detected'] else 'MISSED'}")
    return row


def judge(rows: Rows) -> Bars:
    """No bound above its claim, no finding against the real client, no fault unnoticed."""
    bars: Bars = {}
    for row in _of(rows, "bound"):
        what = f"{row['mechanism']}, {row['estimator']}, claim {row['claimed']:.2f}"
        bars[f"{what}, seed {row['seed']}"] = bar(
            row["lower_bound"], row["claimed"], at_least=False
        )
    failed = sum(not row["passed"] for row in _of(rows, "detector"))
    bars["detectors that fail the real client"] = bar(failed, 0, at_least=False)
    controls = _of(rows, "control")
    detected = sum(row["detected"] for row in controls)
    bars["controls detected"] = bar(detected, len(CONTROLS), at_least=True)
    return bars


def table(rows: Rows, bars: Bars) -> str:
    """Three Markdown tables, then the bars."""
    bounds = [
        [row["mechanism"], f"{row['claimed']:.2f}", row["estimator"], f"{row['lower_bound']:.2f}"]
        for row in _of(rows, "bound")
    ]
    detectors = [
        [row["detector"], "passed" if row["passed"] else "FAILED", *_numbers(row)]
        for row in _of(rows, "detector")
    ]
    controls = [
        [row["control"], row["detector"], "yes" if row["detected"] else "NO", *_numbers(row)]
        for row in _of(rows, "control")
    ]
    detected = sum(row["detected"] for row in _of(rows, "control"))
    lines = [
        *markdown(("audited", "epsilon claimed", "estimator", "epsilon at least"), bounds),
        "",
        *markdown(("detector", "real client", "value", "limit", "what"), detectors),
        "",
        *markdown(("control", "detector", "detected", "value", "limit", "what"), controls),
        "",
        f"Controls detected: {detected} of {len(CONTROLS)}",
    ]
    return page(lines, bars)


def _bound(
    mechanism: str, estimator: str, value: float, claimed: float, seed: int
) -> dict[str, Any]:
    return {
        "kind": "bound",
        "mechanism": mechanism,
        "estimator": estimator,
        "lower_bound": value,
        "claimed": claimed,
        "seed": seed,
    }


def _numbers(row: dict[str, Any]) -> list[str]:
    return [*(f"{row[k]:.5g}" if k in row else "-" for k in ("value", "limit")), row["detail"]]


def _of(rows: Rows, kind: str) -> Rows:
    return [row for row in rows if row["kind"] == kind]


@contextlib.contextmanager
def _without_log_lines() -> Iterator[None]:
    """Seeded noise and refusals are what is wanted here; the rows tell of both."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


if __name__ == "__main__":
    sys.exit(main())
