"""``python -m benchmarks.aggregation``: time and memory of a round on the server.

RoBERTa-large's adapter (r = 8), through the strategies' own round loop.  Each arm is a process of
its own whose grid makes a reply when it is pulled and keeps none; the time that this takes is
taken off.  The dense SVD is that of a reference which lives in this file only: it forms ``B A``
and calls ``numpy.linalg.svd``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from strategies import STRATEGIES, WIRE_KEY, FedSVD, LoRAStrategy, RoundPlan
from strategies.base import Update
from strategies.low_rank import Float64s, Floats, Svd, qr_core_svd
from strategies.tensor_names import factor_names, layers_of

from . import report, shapes
from .report import Bars, Rows, bar, finish, markdown, page, progress

MEANS = ("as-lora", "ro-lora", "la-lora")
DENSE = "fed-svd, dense"
WHAT = {
    "as-lora": "mean of the active factors, and scores",
    "ro-lora": "mean of the active factor",
    "la-lora": "mean of both factors",
    "fed-svd": "mean of B, QR-core SVD",
    DENSE: "mean of B, dense SVD",
}
MOST_GROWTH = 1.10  # peak memory with the most clients over that with the fewest
PRODUCT_ERROR = 1e-6
_DISTINCT = 3  # updates that the clients share out among them
_REPEATS = 5


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return 1 if a bar fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aggregation", description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[6, 1000])
    parser.add_argument("--memory-clients", type=int, nargs=2, default=[10, 1000])
    parser.add_argument("--layers", type=int, default=24, help="of RoBERTa-large (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--arm", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.arm:
        print(json.dumps(run_arm(**options.arm)))
        return 0
    rows = [
        child(method, clients, options.layers)
        for clients in dict.fromkeys([*options.clients, *options.memory_clients])
        for method in (WHAT if clients in options.clients else MEANS)
    ]
    for clients in options.memory_clients:
        rows += [child(method, clients, options.layers, traced=True) for method in MEANS]
    return finish(rows, judge(rows, options), as_json=options.json, table=table)


def child(method: str, clients: int, layers: int, *, traced: bool = False) -> dict[str, Any]:
    """Run an arm in a process of its own, which prints its row."""
    arm = {"method": method, "clients": clients, "layers": layers, "traced": traced}
    command = [sys.executable, "-m", "benchmarks.aggregation", "--arm", json.dumps(arm)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, check=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout)
    progress(f"{method}, {clients} clients{', traced' if traced else ''}: {row['ms']:.1f} ms")
    return row


def run_arm(method: str, clients: int, layers: int, traced: bool) -> dict[str, Any]:
    """Run rounds of one method and measure them; what a child process does."""
    report.inside_a_run()
    adapter = shapes.roberta_large(layers)
    # As many for all whose memory is compared; one where it takes half a minute.
    rounds = 1 if method == DENSE else 2 if traced else 3 if clients >= 10 else 15
    others: dict[str, Any] = {"num_rounds": rounds} if method == "as-lora" else {}
    made: type[LoRAStrategy] = DenseFedSVD if method == DENSE else STRATEGIES[method]
    strategy = made(local_steps=2, weighting="public-counts", **others)
    grid = _SmallGrid(clients, adapter)
    if traced:
        tracemalloc.start()
    seconds = shapes.timed(strategy, grid)
    config = ConfigRecord(dict(shapes.TRAIN_CONFIG))
    with report.quiet():
        strategy.start(grid, adapter.initial(), num_rounds=rounds, train_config=config)
    last = strategy.last_round
    if last is None or last.valid != clients:
        raise RuntimeError(f"{method}: a round lost replies")
    row = {
        "method": method,
        "clients": clients,
        "layers_measured": len(layers_of(adapter.shapes)),
        "rounds": rounds,
        "ms": 1000 * statistics.median(seconds),
        "ms_least": 1000 * min(seconds),
        "ms_most": 1000 * max(seconds),
    }
    if traced:
        row["peak_traced_mb"] = tracemalloc.get_traced_memory()[1] / 1e6
    else:
        row["peak_rss_mb"] = report.peak_rss() / 1e6
    if isinstance(strategy, DenseFedSVD):
        row |= strategy.compare()
    return row


def dense_svd(b: Floats, a: Floats, rank: int) -> Svd:
    """The SVD of ``b @ a`` as a dense matrix, in the precision of ours (float64)."""
    product = b.astype(np.float64) @ a.astype(np.float64)
    u, s, vt = np.linalg.svd(product, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


def refactor(adapter: Update, svd: Callable[[Floats, Floats, int], Svd]) -> tuple[Update, float]:
    """FedSVD's new factors of every layer, and the seconds that they took."""
    start, after = time.perf_counter(), {}
    for layer in layers_of(adapter):
        a, b = factor_names(layer)
        u, s, vt = svd(adapter[b], adapter[a], len(adapter[a]))
        after[a], after[b] = vt.astype(np.float32), (u * s).astype(np.float32)
    return after, time.perf_counter() - start


class DenseFedSVD(FedSVD):
    """FedSVD with the dense SVD."""

    def _apply(self, plan: RoundPlan) -> None:
        LoRAStrategy._apply(self, plan)
        self.before = dict(self._adapter)
        self.after, self.seconds = refactor(self.before, dense_svd)
        self._adapter.update(self.after)

    def compare(self) -> dict[str, float]:
        """Time and result of both SVDs on the very factors of the round."""
        runs = [refactor(self.before, qr_core_svd) for _ in range(_REPEATS)]
        errors = []
        for layer in layers_of(self.before):
            ours, dense = _product(runs[0][0], layer), _product(self.after, layer)
            errors.append(float(np.linalg.norm(ours - dense) / np.linalg.norm(dense)))
        return {
            "svd_step_ms": 1000 * self.seconds,
            "qr_core_step_ms": 1000 * statistics.median(seconds for _, seconds in runs),
            "product_error": max(errors),
        }


def judge(rows: Rows, options: argparse.Namespace) -> Bars:
    """Compare with what the project promises of the server."""
    bars: Bars = {}
    few, many = options.memory_clients
    for key, name in (("peak_rss_mb", "peak RSS"), ("peak_traced_mb", "peak of tracemalloc")):
        for method in MEANS:
            sizes = {r["clients"]: r[key] for r in rows if r["method"] == method and key in r}
            growth = bar(sizes[many] / sizes[few], MOST_GROWTH, at_least=False)
            bars[f"{method}, {name}: {many} clients over {few}"] = growth
    dense = [row for row in rows if row["method"] == DENSE]
    error = max(row["product_error"] for row in dense)
    bars["products by both SVDs, relative difference"] = bar(error, PRODUCT_ERROR, at_least=False)
    least = min(row["svd_step_ms"] / row["qr_core_step_ms"] for row in dense)
    bars["dense SVD over QR-core SVD, step alone"] = bar(least, 1.0, at_least=True)
    return bars


def table(rows: Rows, bars: Bars) -> str:
    """Time, memory, ratios and bars in Markdown."""

    def pick(key: str, *, traced: bool = False) -> dict[tuple[str, int], float]:
        of = [row for row in rows if ("peak_traced_mb" in row) == traced and key in row]
        return {(row["method"], row["clients"]): row[key] for row in of}

    def line(title: str, values: Iterable[float], form: str = ",.1f") -> list[str]:
        return [title, *(f"{value:{form}}" for value in values)]

    ms, dense, ours = pick("ms"), pick("svd_step_ms"), pick("qr_core_step_ms")
    sizes = [clients for _, clients in dense]
    header = [f"{clients} clients" for clients in sizes]
    times = [line(f"{m}: {what}", (ms[m, n] for n in sizes)) for m, what in WHAT.items()]
    for name, steps in (("QR-core", ours), ("dense", dense)):
        times.append(line(f"SVD step alone, {name}", steps.values()))
    ratios = [
        line(f"{svd} / {mean}", (ms[svd, n] / ms[mean, n] for n in sizes), ",.2f")
        for svd in ("fed-svd", DENSE)
        for mean in MEANS
    ]
    alone = (dense[DENSE, n] / ours[DENSE, n] for n in sizes)
    ratios.append(line("SVD step alone, dense / QR-core", alone))
    rss = pick("peak_rss_mb")
    memory = [
        line(f"{m}, {n} clients", (rss[m, n], size), ".1f")
        for (m, n), size in pick("peak_traced_mb", traced=True).items()
    ]
    text = [f"LoRA layers: {rows[0]['layers_measured']}"]
    for first, others, lines in (
        ("aggregation, ms per round (median)", header, times),
        ("ratio of times", header, ratios),
        ("server's memory, MB", ["peak RSS", "peak of tracemalloc"], memory),
    ):
        text += ["", *markdown([first, *others], lines)]
    return page(text, bars, ".4g")


class _SmallGrid(shapes.LazyGrid):
    """Answers for clients that keep nothing: their memory is not the server's."""

    def __init__(self, nodes: int, adapter: shapes.Adapter) -> None:
        super().__init__(nodes, self._reply)
        self._kept: dict[int, Message] = {}
        rng = np.random.default_rng(1)
        both = RoundPlan(server_round=1, mode="both", local_steps=2, lr_a=0.5, lr_b=0.5, lr_head=0)
        self._updates = [shapes.noise_update(both, adapter.shapes, rng) for _ in range(_DISTINCT)]

    def kept(self, message: Message) -> Message:
        """Nodes that are sent the same share one message, without its tensors."""
        number = shapes.plan_of(message).server_round
        if number not in self._kept:
            content = RecordDict({k: v for k, v in message.content.items() if k != "arrays"})
            self._kept = {number: Message(content, message.metadata.dst_node_id, "train")}
        return self._kept[number]

    def _reply(self, node: int, message: Message) -> Message:
        plan = shapes.plan_of(message)
        update = self._updates[node % _DISTINCT]
        # New Arrays, so that a strategy that held replies would be seen to.
        arrays = ArrayRecord({name: Array(update[name]) for name in plan.uploaded(update)})
        sent = shapes.config_of(message, WIRE_KEY)
        wire = ConfigRecord({"version": sent["version"], "rank": sent["rank"]})
        content = RecordDict({"arrays": arrays, WIRE_KEY: wire, **shapes.statements(plan)})
        return Message(content, reply_to=message)


def _product(adapter: Update, layer: str) -> Float64s:
    a, b = factor_names(layer)
    return adapter[b].astype(np.float64) @ adapter[a].astype(np.float64)


if __name__ == "__main__":
    sys.exit(main())
