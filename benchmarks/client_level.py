"""What privacy of whole clients, and noise in shares, cost: noise, and time on a client.

The tables of docs/client-level.md.  Noise does not depend on the machine.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.report import Bars, Rows, bar, finish, markdown, page
from privacy import (
    ClientLevelPlan,
    DistributedMechanism,
    DistributedPlan,
    PrivacyPlan,
    PrivacySettings,
    SecureSource,
    sample_discrete_gaussian,
)
from strategies.secure_aggregation import crypto, shamir

ROUNDS, VALUES, RECORDS, RATE = 100, 100_000, 500, 0.2
WISHES: dict[str, Any] = {"target_epsilon": 8.0, "target_delta": 1e-5, "sample_rate": RATE}
# Shares of a discrete Gaussian under zCDP, against one Gaussian under the tight accountant.
SHARES_OVER_TRUSTED = 1.12
SECONDS = 1.0


def client_rows() -> Rows:
    """Noise on each value of the mean update, in clip norms, by clients and mode."""
    rows: Rows = []
    for clients, rate in ((10, 1.0), (100, 0.5), (1000, 0.1), (10_000, 0.05)):
        common: dict[str, Any] = {**WISHES, "max_update_norm": 1.0, "registered_clients": clients}
        common |= {"client_sample_rate": rate}
        row: dict[str, Any] = {"kind": "clients", "clients": clients, "rate": rate}
        for participation in ("public", "secret"):
            wishes = PrivacySettings(mode="client", participation=participation, **common)
            row[participation] = ClientLevelPlan.for_run(wishes, rounds=ROUNDS).noise_std
        asked = round(clients * rate)
        for name, least in (("shares", asked), ("dropout", math.ceil(0.75 * asked))):
            wishes = PrivacySettings(mode="client-distributed", least_clients=least, **common)
            plan = DistributedPlan.for_run(wishes, rounds=ROUNDS, values=VALUES)
            row[name] = plan.noise_std(asked)
        rows.append(row)
    return rows


def record_rows() -> Rows:
    """Noise on each value of the mean gradient, in clip norms: each client's own, and shares."""
    rows: Rows = []
    for clients in (5, 20, 100):
        own = PrivacyPlan.for_client(PrivacySettings(**WISHES), num_records=RECORDS, steps=ROUNDS)
        alone = own.noise_std("B") / own.expected_batch_size / math.sqrt(clients)
        wishes = PrivacySettings(
            mode="record-distributed", registered_clients=clients, least_clients=clients,
            registered_records=RECORDS * clients, **WISHES,
        )  # fmt: skip
        plan = DistributedPlan.for_run(wishes, rounds=ROUNDS, values=VALUES)
        shared = plan.noise_std(clients)
        rows.append({"kind": "records", "clients": clients, "own": alone, "shares": shared})
    return rows


def time_rows(repeats: int) -> Rows:
    """Seconds of what is new on a client, the best of several."""
    wishes = PrivacySettings(
        mode="client-distributed", max_update_norm=1.0, registered_clients=100, least_clients=75,
        **WISHES,
    )  # fmt: skip
    mechanism = DistributedMechanism(DistributedPlan.for_run(wishes, rounds=ROUNDS, values=VALUES))
    update = np.random.default_rng(0).standard_normal(VALUES)
    secret, public = crypto.new_secret(), crypto.public_key(crypto.new_secret())

    def noise() -> object:
        return sample_discrete_gaussian(SecureSource(), 2**20, VALUES)

    def masks(clients: int) -> None:
        for other in range(clients - 1):
            crypto.mask(crypto.agree(secret, public, f"{other}"), VALUES)

    def shares(clients: int) -> None:
        for _ in range(2):
            shamir.split(secret, clients, clients // 2 + 1)
        for other in range(clients):
            crypto.seal(crypto.agree(secret, public, f"{other}"), bytes(2 * shamir.SHARE_BYTES))

    timed: list[tuple[str, int, Callable[[], object]]] = [
        (
            "discrete Gaussian noise",
            0,
            lambda: sample_discrete_gaussian(SecureSource(), 2**20, VALUES),
        ),
        ("clip, round and noise", 0, lambda: mechanism.encode(update, 1, 1)),
    ]
    for clients in (10, 100):
        timed.append(("masks", clients, functools.partial(masks, clients)))
        timed.append(("keys and sealed shares", clients, functools.partial(shares, clients)))
    return [
        {"kind": "time", "what": what, "clients": clients, "seconds": _best(function, repeats)}
        for what, clients, function in timed
    ]


def make_bars(rows: Rows) -> Bars:
    """What is promised: shares cost little noise, and little time."""
    bars: Bars = {}
    for row in rows:
        if row["kind"] == "clients":
            value = row["shares"] / row["public"]
            name = f"noise in shares over a trusted server's, {row['clients']} clients"
            bars[name] = bar(value, SHARES_OVER_TRUSTED, at_least=False)
        elif row["kind"] == "time" and not row["clients"]:
            bars[f"{row['what']}, seconds"] = bar(row["seconds"], SECONDS, at_least=False)
    return bars


def table(rows: Rows, bars: Bars) -> str:
    """Three tables in Markdown, then the bars."""

    def of(kind: str) -> Rows:
        return [row for row in rows if row["kind"] == kind]

    def ratio(row: dict[str, Any]) -> float:
        return float(row["own"] / row["shares"])

    numbers = ("public", "secret", "shares", "dropout")
    clients = [
        [str(r["clients"]), f"{r['rate']:g}", *(f"{r[n]:.5f}" for n in numbers)]
        for r in of("clients")
    ]
    records = [
        [
            str(r["clients"]),
            f"{r['own']:.5f}",
            f"{r['shares']:.5f}",
            f"{r['own'] / r['shares']:.2f}",
        ]
        for r in of("records")
    ]
    times = [[r["what"], str(r["clients"] or "any"), f"{r['seconds']:.3f}"] for r in of("time")]
    lines = [
        f"epsilon 8, delta 1e-5, {ROUNDS} rounds, {VALUES:,} values",
        "",
        *markdown(
            (
                "registered",
                "asked",
                "trusted, seen",
                "trusted, secret",
                "shares",
                "shares, 3/4 stay",
            ),
            clients,
        ),
        "",
        *markdown(("clients", "own noise at each", "in shares", "ratio"), records),
        "",
        *markdown(("on a client", "clients", "seconds"), times),
    ]
    return page(lines, bars)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a bar fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="timings are the best of these")
    parser.add_argument("--json", action="store_true", help="one JSON object, no tables")
    options = parser.parse_args(arguments)
    rows = [*client_rows(), *record_rows(), *time_rows(options.repeats)]
    return finish(rows, make_bars(rows), as_json=options.json, table=table)


def _best(function: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    sys.exit(main())
