"""What a site's ledger costs: milliseconds of a message by the ledger's length, and admission.

The figures of docs/site.md.  Each message admits the data set, looks for a stored reply, charges
and stores, every time with the whole chain of entries checked and everything on disk.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.report import Bars, Rows, bar, finish, markdown, page
from privacy import Ledger, PrivacyPlan, Request
from privacy.ledger.store import Store

REPLY_BYTES = 1_000_000
LENGTHS = (10, 100, 1000, 10_000)
PLAN = PrivacyPlan(
    sample_rate=0.2, expected_batch_size=20.0, max_grad_norm=1.0, noise_multiplier=2.0,
    steps=1_000_000, target_delta=1e-5,
)  # fmt: skip
# A message of a hundred rounds' ledger takes no longer; a private round takes seconds.
MESSAGE_MS = 100.0


def message_rows(folder: Path, lengths: Sequence[int], repeats: int) -> Rows:
    """Median milliseconds of each call, at ledgers of so many entries."""
    ledger = Ledger.create(folder / "ledger", folder / "head" / "head.json")
    store = Store(folder / "ledger", folder / "head" / "head.json")
    records = ledger.admit("data", "stamp", lambda: [b"0" * 32])
    server_round, rows = 0, []
    for length in lengths:
        _lengthen(ledger, store, records, length)
        taken: dict[str, list[float]] = {name: [] for name in ("admit", "find", "charge", "keep")}
        for _ in range(repeats):
            server_round += 1
            request = _request(server_round, records)
            _timed(taken["admit"], lambda: ledger.admit("data", "stamp", list))
            _timed(taken["find"], functools.partial(ledger.find, request))
            start = time.perf_counter()
            charge = ledger.charge(request, {})
            taken["charge"].append(1e3 * (time.perf_counter() - start))
            _timed(taken["keep"], functools.partial(ledger.keep, charge, bytes(REPLY_BYTES)))
        medians = {name: statistics.median(times) for name, times in taken.items()}
        rows.append({"kind": "message", "entries": length, **medians, "all": sum(medians.values())})
    return rows


def admission_row(folder: Path, records: int) -> Rows:
    """Seconds to look at so many new records."""
    ledger = Ledger.create(folder / "ledger", folder / "head" / "head.json")
    digests = _digests(records)
    start = time.perf_counter()
    ledger.admit("data", "stamp", lambda: digests)
    return [{"kind": "admission", "records": records, "seconds": time.perf_counter() - start}]


def _digests(records: int) -> list[bytes]:
    content = np.random.default_rng(0).bytes(32 * records)
    return [content[32 * row : 32 * row + 32] for row in range(records)]


def _request(server_round: int, records: str) -> Request:
    return Request(
        dataset="data",
        training="benchmark",
        server_round=server_round,
        inputs=f"{server_round}",
        plan=PLAN,
        secure_noise=True,
        steps=1,
        records=records,
    )


def _lengthen(ledger: Ledger, store: Store, records: str, length: int) -> None:
    """Append charges, many in one transaction, until the ledger has so many entries."""
    book = ledger.book()
    if not book.plans:
        ledger.charge(_request(0, records), {})
    with store.transaction() as current:
        values = current.entries[-1].values
        while len(current.entries) < length:
            current.append("charge", {**values, "request": f"filler-{len(current.entries)}"})


def _timed(into: list[float], call: Callable[[], object]) -> None:
    start = time.perf_counter()
    call()
    into.append(1e3 * (time.perf_counter() - start))


def table(rows: Rows, bars: Bars) -> str:
    """Both tables and the bar."""
    messages = [row for row in rows if row["kind"] == "message"]
    names = ("admit", "find", "charge", "keep", "all")
    lines = markdown(
        ("entries", *(f"{name}, ms" for name in names)),
        [(f"{row['entries']:,}", *(f"{row[name]:.1f}" for name in names)) for row in messages],
    )
    admissions = [row for row in rows if row["kind"] == "admission"]
    lines += ["", *markdown(
        ("new records", "seconds to admit"),
        [(f"{row['records']:,}", f"{row['seconds']:.1f}") for row in admissions],
    )]  # fmt: skip
    return page(lines, bars, ".1f")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 1 if a bar fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ledger", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="short ledgers, few records")
    parser.add_argument("--repeats", type=int, default=11, help="messages each (default: 11)")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats: got {options.repeats}; takes 1 or more")
    lengths, records = (LENGTHS[:2], 1000) if options.quick else (LENGTHS, 1_000_000)
    with tempfile.TemporaryDirectory() as name:
        rows = message_rows(Path(name) / "messages", lengths, options.repeats)
        rows += admission_row(Path(name) / "admission", records)
    at_100 = next(row["all"] for row in rows if row.get("entries") == 100)
    bars = {"a message at 100 entries, ms": bar(at_100, MESSAGE_MS, at_least=False)}
    return finish(rows, bars, as_json=options.json, table=table)


if __name__ == "__main__":
    sys.exit(main())
