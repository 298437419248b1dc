"""Detectors of the audit: each plays rounds with a real client and returns a finding.

None of them knows of the controls, and no control changes anything here.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import RecordDict
from torch import Tensor

from privacy.audit import (
    Canaries,
    Finding,
    Silence,
    lower_bounds,
    noise_scale,
    recorded,
    sampling,
    sensitivity,
    unrelated,
)
from privacy.audit.tape import Indices, Tape
from strategies import SCORES_KEY, kind_of
from strategies.selection import group_of

from .audit_runs import ANY_MECHANISM, CANARY_NORM, CLIP_NORM, OTHERS, canary_run
from .audit_site import Reply, RunConfig, Site, released

_NEIGHBOURS = 6
_SCORE_TOLERANCE = 1e-3
# What a reply of a private run with uniform weights may hold, by record.
_ALLOWED = {
    "arrays": None,
    "metrics": set(),
    "privacy": {"sample-rate", "noise-multiplier", "target-delta", "steps", "secure-noise"},
    "wire": {"version", "rank"},
}


def check_canaries(site: Site, seed: int) -> Finding:
    """No lower bound above a small claim, by the form that holds for any mechanism."""
    run = canary_run(site, canaries=1000, epsilon=1.5, seed=seed)
    bounds = run.bounds()
    return lower_bounds({ANY_MECHANISM: bounds[ANY_MECHANISM]}, run.claimed)


def check_canaries_gaussian(site: Site, seed: int) -> Finding:
    """No lower bound above a larger claim, by the forms for Gaussian mechanisms.

    The plain form proves little there: with every guess right it ends near log(guesses).
    """
    run = canary_run(site, canaries=1000, epsilon=5.0, seed=seed)
    bounds = {name: bound for name, bound in run.bounds().items() if name != ANY_MECHANISM}
    return lower_bounds(bounds, run.claimed, "canaries, Gaussian")


def check_sensitivity(site: Site, seed: int) -> Finding:
    """Zero out one record of the first step's batch, with everything else the same."""
    records = OTHERS
    canaries = Canaries.draw(site.shapes, np.arange(records), seed=seed, norm=CANARY_NORM)
    all_in = dataclasses.replace(canaries, included=np.ones(records, dtype=bool))
    pairs = []
    # Records' own gradients are clipped by a clip norm below theirs; canaries' by any.
    for base, clip_norm in ((None, 0.01), (all_in, CLIP_NORM)):
        config = site.config(records=records, privacy__max_grad_norm=clip_norm)

        def first_step(without: int | None, base: Canaries | None, config: RunConfig) -> Tape:
            with recorded(_Without(base, without)) as tape:
                site.train(site.context(config), site.plan(1, steps=1))
            return tape

        whole = first_step(None, base, config)
        for record in whole.batches[0][:_NEIGHBOURS]:
            other = first_step(int(record), base, config)
            pairs.append(
                tuple(
                    {n: value / clip_norm for n, value in tape.sums[0].items()}
                    for tape in (whole, other)
                )
            )
    return sensitivity(pairs, 1.0)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class _Without:
    """Zeroes one record's gradient, on top of canaries or of the records' own."""

    base: Canaries | None
    record: int | None

    def replace(self, name: str, records: Indices, rows: Tensor) -> Tensor:
        rows = rows.clone() if self.base is None else self.base.replace(name, records, rows)
        rows[torch.from_numpy(records == (-1 if self.record is None else self.record))] = 0
        return rows


def check_noise(site: Site, seed: int) -> Finding:
    """With every gradient zero, each tensor's update is noise of the stated size."""
    context = site.context(site.config(records=OTHERS))
    groups: dict[str, list[npt.NDArray[np.float64]]] = {}
    with recorded(Silence()):
        for server_round in range(1, site.rounds + 1):
            plan = site.plan(server_round)
            reply = site.train(context, plan)
            for name, value in released(reply, plan).items():
                groups.setdefault(name, []).append(value.ravel())
    std = _stated_noise(reply, site, OTHERS) * np.sqrt(site.local_steps)
    return noise_scale([np.concatenate(group) for group in groups.values()], std)


def check_normaliser(site: Site, seed: int) -> Finding:
    """With every gradient zero, each step's noise has one public size, whatever was drawn."""
    records = 30
    context = site.context(site.config(records=records))
    groups = []
    with recorded(Silence()):
        for server_round in range(1, site.rounds * site.local_steps + 1):
            plan = site.plan(server_round, steps=1)
            reply = site.train(context, plan)
            values = released(reply, plan).values()
            groups.append(np.concatenate([value.ravel() for value in values]))
    return noise_scale(groups, _stated_noise(reply, site, records), "normaliser")


def check_record_count(site: Site, seed: int) -> Finding:
    """Where a policy states a figure for the record count, the normaliser goes by that figure."""
    stated, groups = 2 * OTHERS, []
    context = site.stating(site.config(records=OTHERS), stated)
    with recorded(Silence()):
        for server_round in range(1, site.rounds + 1):
            plan = site.plan(server_round)
            reply = site.train(context, plan)
            groups += [value.ravel() for value in released(reply, plan).values()]
    std = _stated_noise(reply, site, stated) * np.sqrt(site.local_steps)
    return noise_scale([np.concatenate(groups)], std, "record count")


def _stated_noise(reply: Reply, site: Site, records: int) -> float:
    """Noise on each value of one step's mean gradient, from public numbers: sigma C / b."""
    said = reply.statement
    batch = float(said["sample-rate"]) * records  # type: ignore[arg-type]
    return float(said["noise-multiplier"]) * CLIP_NORM / batch  # type: ignore[arg-type]


def check_sampling(site: Site, seed: int) -> Finding:
    """Who enters a step: many records, then few, so that many batches are empty."""
    findings = []
    for records, runs in ((OTHERS * 4, 1), (5, 12)):
        batches = []
        for server_round in range(1, runs + 1):
            context = site.context(site.config(records=records))
            with recorded() as tape:
                plan = site.plan(server_round, steps=site.rounds * site.local_steps)
                reply = site.train(context, plan)
            batches += tape.batches
        rate = float(reply.statement["sample-rate"])  # type: ignore[arg-type]
        findings.append(sampling(batches, records, rate))
    return next((finding for finding in findings if not finding.passed), findings[0])


def check_reply(site: Site, seed: int) -> Finding:
    """Only what is allowed, and beside the update nothing that depends on the data."""
    contents = []
    for variant in (0, 1):
        context = site.context(site.config(records=OTHERS, variant=variant))
        contents.append(site.train(context, site.plan(1)).content)
    strange = sorted({*_strange(contents[0], site), *_strange(contents[1], site)})
    first, second = (_plain_values(content) for content in contents)
    differing = sorted(k for k in first.keys() | second.keys() if first.get(k) != second.get(k))
    found = sorted({*strange, *differing})
    return Finding.at_most(
        "reply", len(found), 0, "values not allowed or moved by the data" + _named(found)
    )


def _strange(content: RecordDict, site: Site) -> list[str]:
    found = [key for key in content if key not in _ALLOWED]
    for key, allowed in _ALLOWED.items():
        if allowed is not None and key in content:
            found += [f"{key}.{name}" for name in content[key] if name not in allowed]
    for name, array in content.array_records["arrays"].items():
        if site.shapes.get(name) != tuple(array.shape) or array.dtype != "float32":
            found.append(f"arrays.{name}")
    return found


def _plain_values(content: RecordDict) -> dict[str, object]:
    return {
        f"{key}.{name}": content[key][name]
        for key in content
        if key not in content.array_records
        for name in content[key]
    }


def _named(found: list[str]) -> str:
    return f" ({', '.join(found)})" if found else ""


def check_scores(site: Site, seed: int) -> Finding:
    """AS-LoRA's client scores of a one-step round follow from its update and public numbers."""
    config = site.config(
        records=OTHERS,
        strategy__method="as-lora",
        strategy__score="client",
        strategy__weighting="public-counts",
    )
    plan = site.plan(1, steps=1, scores="module")
    reply = site.train(site.context(config), plan)
    stated = dict(reply.content[SCORES_KEY]) if SCORES_KEY in reply.content else {}
    variance = float(reply.statement["noise-std"]) ** 2  # type: ignore[arg-type]
    ours: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for name, value in released(reply, plan).items():
        if kind_of(name) in ("A", "B"):
            group, energy = group_of(name, "module"), float(np.vdot(value, value))
            ours[group] = ours.get(group, 0.0) + energy - value.size * variance
            sizes[group] = sizes.get(group, 0.0) + energy
    worst = _largest_difference(stated, ours, sizes)
    return Finding.at_most(
        "scores", worst, _SCORE_TOLERANCE,
        "largest difference of a score from the update's own, over its energy",
    )  # fmt: skip


def _largest_difference(
    stated: Mapping[str, object], ours: Mapping[str, float], sizes: Mapping[str, float]
) -> float:
    if stated.keys() != ours.keys():
        return float("inf")
    return max(abs(float(stated[g]) - ours[g]) / sizes[g] for g in ours)  # type: ignore[arg-type]


def check_fresh_noise(site: Site, seed: int) -> Finding:
    """Two rounds that are equal in all that can be seeded have noise of their own."""
    config = site.config(records=OTHERS, privacy__insecure_test_seed=-1)
    noises = []
    for _ in range(2):
        random.seed(seed)
        np.random.seed(seed)  # what careless code would draw from
        torch.manual_seed(seed)
        with recorded(Silence()):
            reply = site.train(site.context(config), site.plan(1))
        noises.append(np.concatenate([v.ravel() for v in reply.update.values()]))
    return unrelated(*noises)


def check_steps(site: Site, seed: int) -> Finding:
    """Every step taken was charged, by the client's statement and by its ledger on disk."""
    context = site.context(site.config(records=OTHERS))
    with recorded() as tape:
        for server_round in (1, 2):
            reply = site.train(context, site.plan(server_round))
    stated = int(reply.statement["steps"])  # type: ignore[arg-type]
    charged = min(stated, site.steps_in_the_ledger(context))
    return Finding.at_most(
        "steps", len(tape.batches) - charged, 0, "steps taken beyond those stated and in the ledger"
    )


CHECKS: dict[str, Callable[[Site, int], Finding]] = {
    "canaries": check_canaries,
    "canaries, Gaussian": check_canaries_gaussian,
    "sensitivity": check_sensitivity,
    "noise": check_noise,
    "normaliser": check_normaliser,
    "record count": check_record_count,
    "sampling": check_sampling,
    "reply": check_reply,
    "scores": check_scores,
    "fresh noise": check_fresh_noise,
    "steps": check_steps,
}
