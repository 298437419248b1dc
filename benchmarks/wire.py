"""``python -m benchmarks.wire``: bytes per client and round, up and down, for every method.

The strategies' own round loop sends real Messages to clients in this process that use the real
node side, with the adapters of RoBERTa-large and Swin-B without a head.  Counted are whole
messages, as Flower serialises them (every nested object once, by content), and the tensors in
them, as the strategies report them.  Updates are white noise: equal tensors would count once.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    no_object_id_recompute,
)

from strategies import STRATEGIES, LoRAStrategy, kind_of

from .report import Bars, Rows, bar, finish, inside_a_run, markdown, page, progress, quiet
from .shapes import ADAPTERS, TRAIN_CONFIG, Adapter, Client, LazyGrid, plan_of

LOCAL_STEPS = 2
HALVES = ("as-lora", "ro-lora", "ffa-lora")  # methods that train one factor in a round
DTYPES = ("float32", "bfloat16", "float16", "int8")
# Rounds from which the downlink is in steady state, and after which we stop.  AS-LoRA draws its
# factors from round 3 on, so round 4 is the first to be sent a mixture.
STEADY = {"as-lora": (4, 9)}
STEADY_OTHERS = (3, 4)
# The project's promises: by whole messages of RoBERTa-large, whose factors are of one size ...
HALF, QUARTER = 0.502, 0.252
# ... and for any shapes, how far a message's share of DP-LoRA's may exceed that of the values.
OVER_SHARE = 1.01


@dataclasses.dataclass
class Round:
    """One round's sizes, in bytes, and the shares of the adapter's values that had to travel."""

    up: list[int] = dataclasses.field(default_factory=list)
    down: list[int] = dataclasses.field(default_factory=list)
    payload_up: float = 0.0
    payload_down: float = 0.0
    share_up: float = 0.0
    share_down: float = 0.0
    layers_a: int = 0


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return 1 if a bar fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wire", description=__doc__)
    for name, known in (("models", ADAPTERS), ("methods", STRATEGIES), ("dtypes", DTYPES)):
        parser.add_argument(f"--{name}", nargs="+", default=list(known), choices=list(known))
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args(arguments)
    inside_a_run()
    rows: Rows = []
    for model in options.models:
        rows += measure_model(model, options.methods, options.dtypes)
    return finish(rows, judge(rows), as_json=options.json, table=table)


def measure_model(model: str, methods: list[str], dtypes: list[str]) -> Rows:
    """One model's adapter, DP-LoRA at float32 first: the others are compared with it."""
    arms = [(method, "float32") for method in methods]
    arms += [(method, dtype) for dtype in dtypes for method in HALVES if method in methods]
    rows: Rows = []
    for method, dtype in dict.fromkeys([("dp-lora", "float32"), *arms]):
        rounds = measure(ADAPTERS[model](), method, dtype)
        base = rows[0] if rows else None
        rows.append({"model": model, "method": method, "dtype": dtype, **summarise(rounds, base)})
        progress(f"{model}, {method}, {dtype}: {rows[-1]['up']:.0f} bytes up")
    return rows


def measure(adapter: Adapter, method: str, dtype: str) -> dict[int, Round]:
    """Sizes of the rounds in steady state, by round."""
    first, last = STEADY.get(method, STEADY_OTHERS)
    others: dict[str, Any] = {"wire_dtype": dtype}
    if method == "as-lora":
        others["num_rounds"] = last
    strategy = STRATEGIES[method](
        local_steps=LOCAL_STEPS,
        weighting="public-counts",
        min_train_nodes=adapter.clients,
        **others,
    )
    rounds: dict[int, Round] = defaultdict(Round)
    grid = _SizingGrid(adapter, method, rounds, first)
    before = adapter.initial()

    def after_round(server_round: int, arrays: ArrayRecord) -> None:
        nonlocal before
        _take_shares(strategy, adapter, rounds, server_round, before, arrays)
        before = arrays

    with quiet():
        strategy.start(
            grid,
            before,
            num_rounds=last,
            train_config=ConfigRecord(dict(TRAIN_CONFIG)),
            evaluate_fn=after_round,
        )
    return {number: rounds[number] for number in range(first, last + 1)}


def message_bytes(message: Message) -> int:
    """Bytes of a message as Flower pushes it: each nested object once."""
    with no_object_id_recompute():
        return sum(len(part.deflate()) for part in get_all_nested_objects(message).values())


def summarise(rounds: dict[int, Round], base: dict[str, Any] | None) -> dict[str, Any]:
    """One row: means over rounds and clients, and the ratios to DP-LoRA's row ``base``."""
    of = list(rounds.values())
    row: dict[str, Any] = {"first_round": min(rounds), "last_round": max(rounds)}
    row["least_layers_a"] = min(each.layers_a for each in of)
    row["most_layers_a"] = max(each.layers_a for each in of)
    for way in ("up", "down"):
        row[way] = statistics.mean(size for each in of for size in getattr(each, way))
        row[f"payload_{way}"] = statistics.mean(getattr(each, f"payload_{way}") for each in of)
        row[f"share_{way}"] = statistics.mean(getattr(each, f"share_{way}") for each in of)
    for way in ("up", "down"):
        whole = (base or row)[way]
        row[f"{way}_ratio"] = row[way] / whole
        row[f"payload_{way}_ratio"] = row[f"payload_{way}"] / (base or row)[f"payload_{way}"]
        row[f"{way}_least_share"] = min(getattr(each, f"share_{way}") for each in of)
        row[f"{way}_most_share"] = max(getattr(each, f"share_{way}") for each in of)
        # The worst single message of any round, not the mean.
        row[f"{way}_over_share"] = max(
            max(getattr(each, way)) / whole / getattr(each, f"share_{way}") for each in of
        )
    return row


def judge(rows: Rows) -> Bars:
    """Compare with what the project promises of the wire."""
    bars: Bars = {}
    for row in rows:
        model, method, dtype = row["model"], row["method"], row["dtype"]
        arm = f"{model}, {method}, {dtype}"
        if model == "roberta-large" and method in HALVES:
            if dtype == "float32":
                for way in ("up", "down"):
                    value = row[f"{way}_ratio"]
                    bars[f"{arm}, {way}: of dp-lora"] = bar(value, HALF, at_least=False)
            elif dtype == "bfloat16":
                value = row["up_ratio"]
                bars[f"{arm}, up: of dp-lora's float32"] = bar(value, QUARTER, at_least=False)
        if dtype == "float32" and method != "dp-lora":
            for way in ("up", "down"):
                value = row[f"{way}_over_share"]
                bars[f"{arm}, {way}: over its share"] = bar(value, OVER_SHARE, at_least=False)
    return bars


def table(rows: Rows, bars: Bars) -> str:
    """The rows by model in Markdown, then the bars."""
    header = (
        "model", "method", "dtype up", "up, bytes", "of dp-lora", "tensors only",
        "down, bytes", "of dp-lora", "tensors only", "share of values up", "down", "layers with A",
    )  # fmt: skip
    lines = [
        [
            *(row[key] for key in ("model", "method", "dtype")),
            *(
                f"{row[key]:{form}}"
                for way in ("up", "down")
                for key, form in (
                    (way, ",.0f"), (f"{way}_ratio", ".4f"), (f"payload_{way}_ratio", ".4f")
                )
            ),
            *(_span(row, f"{way}_least_share", f"{way}_most_share") for way in ("up", "down")),
            _span(row, "least_layers_a", "most_layers_a"),
        ]
        for row in rows
    ]  # fmt: skip
    return page(markdown(header, lines), bars, ".4f")


class _SizingGrid(LazyGrid):
    """Notes the size of every message of the rounds that count."""

    def __init__(self, adapter: Adapter, method: str, rounds: dict[int, Round], first: int) -> None:
        rank = adapter.rank if method == "flex-lora" else 0
        nodes = range(1, adapter.clients + 1)
        clients = {node: Client(node, rank) for node in nodes}
        super().__init__(adapter.clients, lambda node, message: clients[node].answer(message))
        self._rounds, self._first = rounds, first

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        for message in messages:
            if (number := _number(message)) >= self._first:
                self._rounds[number].down.append(message_bytes(message))
        return super().push_messages(messages)

    def reply_to(self, message_id: str) -> Message:
        number = _number(self._waiting[message_id][1])
        reply = super().reply_to(message_id)
        if number >= self._first:
            self._rounds[number].up.append(message_bytes(reply))
        return reply


def _number(message: Message) -> int:
    return plan_of(message).server_round


def _take_shares(
    strategy: LoRAStrategy,
    adapter: Adapter,
    rounds: dict[int, Round],
    server_round: int,
    before: ArrayRecord,
    after: ArrayRecord,
) -> None:
    """Note what a round trained and changed; what it changed is what the next one sends."""
    report = strategy.last_round
    if report is None:
        return  # before the first round
    if report.valid != adapter.clients:
        raise RuntimeError(f"round {server_round} lost replies: {report.failures}")
    one = rounds[server_round]
    one.payload_up = report.bytes_up / adapter.clients
    one.payload_down = report.bytes_down / adapter.clients
    trained = report.plan.uploaded(adapter.shapes)
    one.layers_a = sum(kind_of(name) == "A" for name in trained)
    one.share_up = sum(after[name].numpy().size for name in trained) / adapter.size
    changed = [n for n in after if n not in before or after[n].data != before[n].data]
    values = sum(after[name].numpy().size for name in changed)
    rounds[server_round + 1].share_down = values / adapter.size


def _span(row: dict[str, Any], *keys: str) -> str:
    values = dict.fromkeys(f"{row[key]:.3f}".removesuffix(".000") for key in keys)
    return " to ".join(values)


if __name__ == "__main__":
    sys.exit(main())
