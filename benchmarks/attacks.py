"""``python -m benchmarks.attacks``: what a curious server learns from one client's update.

Membership inference and gradient inversion against updates of one LoRA factor (B only, A only),
of both, and of B with the head, without privacy and at epsilon 8, 3 and 1.  Every update comes
from the production client, ``client_app.round_handler.handle_train``.  What differential privacy
promises of any attack is computed beside what these attacks reached; the command ends with status
1 if one is above it, or if an attack fails where nothing protects the record.  The page is
docs/attacks.md.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from strategies import RoundPlan
from task.embedded.digits import load_digits_arrays

from .attack_inversion import (
    Inversion,
    identify,
    layer_inputs,
    write_candidates,
    write_class_token_vit,
)
from .attack_membership import Game, play, rows_of, write_adapters, write_sites
from .attack_pixels import Search, reconstruct, references
from .attack_site import LEVELS, TRAINED, Server, ask_site, run_config, site_context, write_records
from .attack_table import draw_figure, table
from .report import Bars, Rows, bar, finish, inside_a_run, progress, quiet

# Probability that any check fails in a run although every guarantee holds.
FALSE_ALARM = 1e-3
SAMPLE_RATE = 0.2
# Below the norm of every record's gradient: all are clipped, and the record moves the sum as far
# as the guarantee allows.  The strongest case for the attacker; epsilon does not depend on C.
MAX_GRAD_NORM = 0.01
# The app's own, for comparison.
APP_MAX_GRAD_NORM = 1.0
_WARM_UP, _OTHERS, _TARGETS = 300, 15, 10
_WARM_UP_ROUNDS, _WARM_UP_STEPS, _WARM_UP_RATE = 4, 6, 0.5
_SINGLE = ("B", "A")
_COMPARED = ("none", "epsilon 8")


@dataclass(frozen=True)
class Size:
    """How much is attacked."""

    trained: tuple[str, ...]
    levels: tuple[str, ...]
    worlds: int
    open_worlds: int
    rounds: int
    candidates: int
    trials: int
    pixel_records: int
    search: Search


FULL = Size(tuple(TRAINED), tuple(LEVELS), 500, 120, 3, 100, 2, 6, Search(8, 60, 2, 250))
QUICK = Size(
    *(_SINGLE, ("none", "epsilon 8", "epsilon 1"), 160, 80, 3, 100, 1, 2, Search(8, 50, 2, 150))
)


@dataclass(frozen=True)
class Job:
    """One arm of one attack, for whichever process is free."""

    name: str
    work: Callable[..., Any]
    arguments: tuple[Any, ...]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return 1 if a bar fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer arms, worlds and records")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--seed", type=int, default=0, help="public seed (default: 0)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(2, os.cpu_count() or 1),
        help="processes of one thread each (default: 2)",
    )
    parser.add_argument("--figure", type=Path, help="write originals and reconstructions as PNG")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    size = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory() as place:
        rows = attack(Path(place), size, options.seed, options.jobs)
    if options.figure:
        draw_figure(rows, options.figure)
    return finish(rows, judge(rows), as_json=options.json, table=table)


def attack(folder: Path, size: Size, seed: int, jobs: int) -> Rows:
    """Set the scene, run all arms, and return their rows in a fixed order."""
    _be_a_worker()
    reference = set_scene(folder, size, seed)
    todo = list(plan_jobs(folder, size, seed))
    done: dict[str, Rows] = {}
    for name, rows in run_jobs(todo, jobs):
        done[name] = rows
        progress(f"{name}: done, {len(done)} of {len(todo)}")
    return [row for job in todo for row in done[job.name]] + reference


def set_scene(folder: Path, size: Size, seed: int) -> Rows:
    """Share out the digits' train split, and make the adapters that the server sends.

    They come from a few rounds on other records, without privacy, as another site's would: at the
    zero start of B and head the factors' gradients are zero and nothing could be seen.
    """
    images, labels = load_digits_arrays("train")
    order = np.random.default_rng(seed).permutation(len(labels))
    ends = np.cumsum([_WARM_UP, _OTHERS, _TARGETS, size.candidates])
    parts = [(images[rows], labels[rows]) for rows in np.split(order[: ends[-1]], ends[:-1])]
    write_sites(folder, parts[1], parts[2])
    write_candidates(folder, *parts[3])
    write_class_token_vit(folder / "class-token-vit", seed)
    config = run_config(
        None,
        rounds=_WARM_UP_ROUNDS + size.rounds,
        sample_rate=SAMPLE_RATE,
        max_grad_norm=1.0,
        **{"strategy.local-steps": _WARM_UP_STEPS, "privacy.insecure-test-seed": seed},
    )
    server = Server(config)
    context = site_context(config, write_records(folder / "warm-up.npz", *parts[0]))
    adapters = [server.start()]
    with quiet("privacy.randomness"):
        for number in range(1, _WARM_UP_ROUNDS + size.rounds + 1):
            plan = RoundPlan(
                server_round=number,
                mode="alternate",
                local_steps=_WARM_UP_STEPS,
                lr_a=_WARM_UP_RATE,
                lr_b=_WARM_UP_RATE,
                lr_head=_WARM_UP_RATE,
            )
            update = ask_site(context, plan, adapters[-1], server.model.fingerprint)
            adapters.append({name: old + update[name] for name, old in adapters[-1].items()})
    write_adapters(folder, adapters[-size.rounds :])
    return references(folder, size.pixel_records, parts[0])


def plan_jobs(folder: Path, size: Size, seed: int) -> Iterator[Job]:
    """All arms; the long ones of each kind are alike, so their order does not matter much."""
    # Bounds do not depend on what is trained, so one epsilon is enough to compare with both
    # factors and the head.
    arms = [
        (trained, level)
        for trained in size.trained
        for level in size.levels
        if trained in _SINGLE or level in _COMPARED
    ]
    error = error_per_side(size)
    for trained, level in arms:
        game = Game(
            *(str(folder), trained, level, size.rounds, _TARGETS),
            sample_rate=SAMPLE_RATE,
            max_grad_norm=MAX_GRAD_NORM,
        )
        worlds = size.open_worlds if LEVELS[level] is None else size.worlds
        yield Job(f"membership, {trained}, {level}", membership, (game, worlds, error))
    for trained, level in arms:
        norms = (MAX_GRAD_NORM,) if LEVELS[level] is None else (MAX_GRAD_NORM, APP_MAX_GRAD_NORM)
        for norm in norms:
            arm = Inversion(str(folder), trained, level, norm)
            name = f"identification, {trained}, {level}, C = {norm:g}"
            yield Job(name, identification, (arm, size.trials, error))
    for trained, level in arms:
        if trained == "A and B":
            continue
        backbone = str(folder / "class-token-vit")
        arm = Inversion(str(folder), trained, level, MAX_GRAD_NORM, backbone)
        yield Job(f"layer input, {trained}, {level}", layer_inputs, (arm,))
    for level in size.levels:
        arm = Inversion(str(folder), "A", level, MAX_GRAD_NORM)
        yield Job(f"span of layer inputs, A, {level}", layer_inputs, (arm,))
    for trained, level in arms:
        arm = Inversion(str(folder), trained, level, MAX_GRAD_NORM)
        search = (arm, size.pixel_records, size.search, seed)
        yield Job(f"pixels, {trained}, {level}", pixels, search)


def membership(game: Game, worlds: int, error: float) -> Rows:
    """One arm of the membership attack."""
    return rows_of(game, play(game, worlds), error)


def identification(arm: Inversion, trials: int, error: float) -> Rows:
    """One arm of the identification attack."""
    return [identify(arm, trials, error)]


def pixels(arm: Inversion, records: int, search: Search, seed: int) -> Rows:
    """One arm of the search for pixels."""
    return [reconstruct(arm, records, search, seed)]


def error_per_side(size: Size) -> float:
    """What each side of each checked interval may err by: FALSE_ALARM over their number.

    Counted generously: each trained set and level with two spans of rounds, two attackers and
    three false positive rates of two sides, and two identifications.
    """
    return FALSE_ALARM / (len(size.trained) * len(size.levels) * (2 * 2 * 3 * 2 + 2))


def run_jobs(todo: list[Job], jobs: int) -> Iterator[tuple[str, Rows]]:
    """Run jobs, in this process if there is to be only one; yields as they end."""
    if jobs == 1:
        for job in todo:
            yield job.name, job.work(*job.arguments)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_be_a_worker) as pool:
        names = {pool.submit(job.work, *job.arguments): job.name for job in todo}
        for future in as_completed(names):
            yield names[future], future.result()


def judge(rows: Rows) -> Bars:
    """Compare with the guarantee, and see that the attacks work where nothing protects."""
    bars: Bars = {}
    for row in rows:
        where = f"{row['trained']}, {row['level']}"
        if row["attack"] == "membership" and row["auc_bound"] < 1:
            name = f"membership, {where}: largest lower limit of a TPR over its bound"
            excess = max(point["checked_low"] - point["checked_bound"] for point in row["points"])
            excess = max(excess, bars.get(name, {"value": -1.0})["value"])
            bars[name] = bar(excess, 0.0, at_least=False)
        if row["attack"] == "identification" and row["level"] != "none":
            excess = row["checked_low"] - row["bound"]
            norm = f"C = {row['max_grad_norm']:g}"
            name = f"identification, {where}, {norm}: lower limit of the rate over its bound"
            bars[name] = bar(excess, 0.0, at_least=False)
    for row in rows:
        if row["level"] == "none":
            bars |= _teeth(row)
    return bars


def _teeth(row: dict[str, Any]) -> Bars:
    """What an attack must reach without privacy; else its silence under DP says nothing."""
    trained = row["trained"]
    if row["attack"] == "membership" and row["attacker"] == "knows all records":
        # The target is found whenever it is in a batch at all.
        drawn = 1 - (1 - SAMPLE_RATE) ** row["rounds"]
        name = f"membership, {trained}, none, {row['rounds']} rounds: TPR at 1 % over share drawn"
        point = next(point for point in row["points"] if point["fpr"] == 0.01)
        return {name: bar(point["tpr_high"] / drawn, 0.8, at_least=True)}
    if row["attack"] == "identification":
        return {f"identification, {trained}, none": bar(row["rate"], 0.99, at_least=True)}
    if row["attack"] == "pixels":
        found = row["nearest"] / row["records"]
        name = f"pixels, {trained}, none: share nearest to the original of all candidates"
        return {name: bar(found, 0.5, at_least=True)}
    if row["attack"] == "layer input":
        name = f"layer input, {trained} shows {row['shows']}, none: median cosine"
        return {name: bar(row["cosine"][1], 0.999, at_least=True)}
    return {}


def _be_a_worker() -> None:
    inside_a_run()
    torch.set_num_threads(1)
    logging.getLogger("timm").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
