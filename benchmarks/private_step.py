"""``python -m benchmarks.private_step``: time and memory of a private step over one without.

A step is a whole one: forward, backward, clipping, noise, update.  All arms of a model run in turn
in one process, in a new order each time, from the same weights and on the same batch; a ratio is
the median of the ratios within repetitions.  Before that, the arms' sums are compared.  Memory is
measured in a process per arm.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import step_memory
from .report import Bars, Rows, bar, finish, progress
from .step_arms import BASELINE, FLOOR, Arm, StepError, make_arm, names_for
from .step_checks import same_thing
from .step_models import CPU_MODELS, GPU_MODELS, MODELS, SETS, ModelSpec, Subject
from .step_table import table

Seconds = Mapping[str, list[float]]

# What the project promises on CPUs, for steps on B and on A: of time and of peak memory, over the
# step without privacy on both factors, and over Opacus on the same tensors.
FACTORS = ("B", "A")
TIME_LIMITS = {"vit-tiny": 0.95, "swin-tiny": 0.95, "roberta-small": 1.0, "minilm": 1.0}
TIME_LIMITS_OPACUS = {"vit-tiny": 0.90}
MEMORY_LIMITS = {"vit-tiny": 0.75, "roberta-small": 0.85, "minilm": 0.85}
MEMORY_LIMITS_OPACUS = {"vit-tiny": 0.80}
ALTERNATING = ("private", "peft")  # sides whose steps on B and A in turn are set over both at once
_MEMORY_SIDES = ("peft", "private", "opacus")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return 1 if a bar fails or arms do not compute the same."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.private_step", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="default: the device's")
    parser.add_argument("--batch", type=int, default=32, help="records of a step (default: 32)")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps per arm (default: 7)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those (default: 1)")
    cores = os.cpu_count() or 1
    parser.add_argument("--threads", type=int, default=cores, help="default: all cores")
    parser.add_argument("--seed", type=int, default=0, help="of weights, records and order")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    allocators = list(step_memory.ALLOCATORS)
    parser.add_argument(
        "--allocator", choices=allocators, default=allocators[0], help="where memory is measured"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args(arguments)
    # Also for the processes that measure memory, and for the line on the machine.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    models = options.models or list(GPU_MODELS if options.device == "cuda" else CPU_MODELS)
    rows: Rows = []
    try:
        for model in models:
            rows += [{"model": model, **row} for row in measure(MODELS[model], model, options)]
    except StepError as error:
        progress(f"{model}: {error}")
        return 1
    bars = judge(rows) if options.device == "cpu" else {}
    return finish(rows, bars, as_json=options.json, table=table)


def measure(spec: ModelSpec, model: str, options: argparse.Namespace) -> Rows:
    """All rows of one model.

    Raises
    ------
    StepError
        If arms compute different sums, or a step does not do what it should.
    """
    subject = Subject(spec, options.batch, options.seed, options.device, options.dtype)
    names = names_for(spec.suits_opacus)
    arms = {name: make_arm(name, subject, options.batch) for name in names}
    rows = same_thing(arms, options.dtype)
    progress(f"{model}: {len(rows)} comparisons hold, {len(arms)} arms compute the same")
    seconds = time_all(
        arms,
        repeats=options.repeats,
        warmup=options.warmup,
        seed=options.seed,
        wait=torch.cuda.synchronize if options.device == "cuda" else _nothing,
        said=lambda text: progress(f"{model}: {text}"),
    )
    rows += summarise(seconds)
    settings = {key: getattr(options, key) for key in ("seed", "device", "dtype", "threads")}
    settings["records"] = options.batch
    del arms, subject
    torch.cuda.empty_cache()  # leaves room for the other processes; nothing without a GPU
    memory: dict[str, dict[str, float]] = {}
    for name in names:
        if name.split()[0] in _MEMORY_SIDES:
            memory[name] = step_memory.child(spec, name, options.allocator, settings)
            progress(f"{model}: {name} takes {memory[name]['live_mb']:.0f} MB of tensors")
    rows += compare_memory(memory)
    where = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    how = {key: getattr(options, key) for key in ("dtype", "batch", "allocator")}
    return [{**row, "device": where, **how} for row in rows]


def time_all(
    arms: Mapping[str, Arm],
    *,
    repeats: int,
    warmup: int,
    seed: int,
    wait: Callable[[], None],
    said: Callable[[str], None],
) -> dict[str, list[float]]:
    """Seconds of each arm's steps, one per repetition; each repetition has an order of its own."""
    order = list(arms)
    shuffle = random.Random(seed).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repetition in range(warmup + repeats):
        shuffle(order)
        for name in order:
            taken = time_step(arms[name], wait)
            if repetition >= warmup:
                seconds[name].append(taken)
        said(f"repetition {repetition + 1} of {warmup + repeats} done")
    return seconds


def time_step(arm: Arm, wait: Callable[[], None]) -> float:
    """Seconds of one step; what comes before and after it is not counted."""
    arm.prepare()
    gc.collect()
    wait()
    start = time.perf_counter()
    arm.step()
    wait()
    seconds = time.perf_counter() - start
    arm.settle()
    return seconds


def summarise(seconds: Seconds) -> Rows:
    """Rows of times: medians, and ratios within repetitions with their quartiles."""
    rows: Rows = []
    for name, taken in seconds.items():
        row: dict[str, Any] = {"kind": "time", "arm": name}
        row |= _spread("ms", [1000 * each for each in taken])
        for key, other in references(name).items():
            if other in seconds:
                row |= _spread(f"over_{key}", _ratios(taken, seconds[other]))
        rows.append(row)
    for side in ALTERNATING:
        b, a, both = (seconds[f"{side} {trained}"] for trained in SETS)
        turns = [(x + y) / 2 for x, y in zip(b, a, strict=True)]
        ratio = _spread("over_both", _ratios(turns, both))
        rows.append({"kind": "alternation", "what": "time", "side": side, **ratio})
    return rows


def compare_memory(memory: Mapping[str, Mapping[str, float]]) -> Rows:
    """Rows of peak memory, resident and live, with their ratios."""
    rows: Rows = []
    for name, peaks in memory.items():
        row: dict[str, Any] = {"kind": "memory", "arm": name, **peaks}
        for key, other in references(name).items():
            if other in memory:
                for what in peaks:
                    row[f"{what.removesuffix('_mb')}_over_{key}"] = (
                        peaks[what] / memory[other][what]
                    )
        rows.append(row)
    for side in ALTERNATING:
        b, a, both = (memory[f"{side} {trained}"] for trained in SETS)
        for what in both:
            # A client needs room for the larger of its two kinds of step.
            ratio = max(b[what], a[what]) / both[what]
            what = {"rss_mb": "peak RSS", "live_mb": "live tensors"}[what]
            rows.append({"kind": "alternation", "what": what, "side": side, "over_both": ratio})
    return rows


def references(name: str) -> dict[str, str]:
    """The arms that an arm is compared with, by the key of the ratio."""
    if name == FLOOR:
        return {"peft_both": BASELINE}
    trained = name.split()[1]
    same = {"peft_same": f"peft {trained}", "opacus_same": f"opacus {trained}"}
    return {"peft_both": BASELINE, **same, "floor": FLOOR}


def judge(rows: Rows) -> Bars:
    """Compare with what the project promises of a private step on a CPU."""
    bars: Bars = {}
    for what, kind, key, reference, limits in (
        ("time", "time", "over_peft_both", "peft both", TIME_LIMITS),
        ("time", "time", "over_opacus_same", "opacus", TIME_LIMITS_OPACUS),
        ("peak RSS", "memory", "rss_over_peft_both", "peft both", MEMORY_LIMITS),
        ("peak RSS", "memory", "rss_over_opacus_same", "opacus", MEMORY_LIMITS_OPACUS),
    ):
        found = {(row["model"], row.get("arm")): row for row in rows if row["kind"] == kind}
        for model, limit in limits.items():
            for factor in FACTORS:
                if (row := found.get((model, f"private {factor}"))) is not None:
                    over = reference if reference == BASELINE else f"{reference} {factor}"
                    name = f"{model}, {what}: private {factor} over {over}"
                    bars[name] = bar(row[key], limit, at_least=False)
    return bars


def _ratios(values: list[float], others: list[float]) -> list[float]:
    return [value / other for value, other in zip(values, others, strict=True)]


def _spread(key: str, values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {key: middle, f"{key}_low": low, f"{key}_high": high}


def _nothing() -> None:
    """Wait for a device that works in step with us."""


if __name__ == "__main__":
    sys.exit(main())
