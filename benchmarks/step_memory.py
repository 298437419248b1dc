"""Peak memory of an arm's step, in a process of its own, beyond what the idle model holds."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .report import peak_rss
from .step_arms import Arm, make_arm
from .step_models import ModelSpec, Subject

# What the C library is told.  "returning": blocks of 64 KiB and more are given back when they are
# freed, so that resident memory is live memory.  "usual": nothing; glibc then keeps much of what
# was freed, how much depends on the order of sizes, and varies from run to run.
ALLOCATORS = {
    "usual": {},
    "returning": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
}
_SILENCE = {"KINETO_LOG_LEVEL": "99"}  # the profiler's own lines
_STEPS = 2
_WARM_RECORDS = 2


def child(
    spec: ModelSpec, arm: str, allocator: str, settings: Mapping[str, Any]
) -> dict[str, float]:
    """Run :func:`measure` in a process of its own.

    Parameters
    ----------
    spec : ModelSpec
        The model.
    arm : str
        The arm's name.
    allocator : str
        A key of ``ALLOCATORS``, the same for all children of this process.
    settings : mapping
        The other arguments.
    """
    # Forked off a server that has loaded the libraries and done nothing else, since loading them
    # takes longer than most arms.  The server is started with the first process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.step_preload"])
    with _environment(ALLOCATORS[allocator] | _SILENCE), ProcessPoolExecutor(1, context) as pool:
        return pool.submit(measure, spec, arm, **settings).result()


def measure(
    spec: ModelSpec,
    arm: str,
    *,
    records: int,
    seed: int,
    device: str,
    dtype: str,
    threads: int,
) -> dict[str, float]:
    """Measure an arm in this process, in MB beyond model and batch; what a child does.

    ``rss_mb`` is resident memory, ``live_mb`` that of tensors; on a GPU only the latter.
    """
    torch.set_num_threads(threads)
    subject = Subject(spec, records, seed, device, dtype)
    # Code, thread pools and caches are loaded by a step on next to nothing.
    _take(make_arm(arm, subject, min(_WARM_RECORDS, records)), 1)
    measured = make_arm(arm, subject, records)
    gc.collect()
    if device == "cuda":
        return {"live_mb": _cuda_peak(measured) / 1e6}
    # VmHWM starts anew from what is resident; where it cannot, from the peak so far.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    base = peak_rss()
    _take(measured, _STEPS)
    resident = peak_rss() - base
    return {"rss_mb": resident / 1e6, "live_mb": live_peak(measured) / 1e6}


def live_peak(arm: Arm) -> int:
    """Most bytes of tensors that were alive at once in a step, beyond those before it.

    Every allocation and release of torch's CPU allocator, added up in the order of time: the exact
    figure without the allocator's own rounding and without what libraries take elsewhere.
    """
    arm.prepare()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        arm.step()
    arm.settle()
    results: Any = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def _take(arm: Arm, steps: int) -> None:
    for _ in range(steps):
        arm.prepare()
        arm.step()
        arm.settle()


def _cuda_peak(arm: Arm) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    _take(arm, _STEPS)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - base


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
