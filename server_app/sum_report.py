"""The privacy report of a run in which nothing but noised sums over clients is used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from federation.settings import Settings
from privacy.client_settings import CLIENT_MODES, SECURE_MODES

from .client_account import ClientAccount

_NOT_COVERED = (
    "A server that does not keep to the protocol; in mode 'client' the server at all.",
    "Whether and why a client does not answer, and how long a round takes.",
    "Other runs on the same data: their epsilons, of the same unit, add up.",
    "Settings that were chosen on private records.",
    "What a prediction tells about a group of people.",
)


def make_sum_report(settings: Settings, account: ClientAccount) -> dict[str, Any]:
    """State the guarantee of a run in a client-level or distributed mode.

    Parameters
    ----------
    settings : Settings
        The run's.
    account : ClientAccount
        Counts the sums that were released.

    Returns
    -------
    dict
        Plain values.  Nothing of it tells who or how many answered.

    Notes
    -----
    Formal guarantee: that of the mechanism's plan, for the rounds released; see
    ``docs/client-level.md``.
    """
    mechanism = account.mechanism
    spent = mechanism.epsilon()
    private = math.isfinite(spent) and mechanism.secure
    unit = "a client with all its records" if settings.privacy.mode in CLIENT_MODES else "a record"
    delta = settings.privacy.target_delta
    if private:
        statement = (
            f"All released sums together are ({_up(spent):.4f}, {delta:g})-differentially private "
            f"for {unit}."
        )
    else:
        statement = "NOT PRIVATE: privacy.insecure-test-seed is set, for tests only."
    shares = settings.privacy.mode in SECURE_MODES
    return {
        "statement": statement,
        "private": private,
        "resumed": bool(settings.resume),
        "target_epsilon": settings.privacy.target_epsilon,
        "unit": unit,
        "adjacency": "zero-out: the unit's contributions to all rounds count, or are zero",
        "trust_model": mechanism.guards_against,
        "mechanism": "discrete Gaussian noise in shares, under secure aggregation"
        if shares
        else "Gaussian noise of the server on the sum of clipped updates",
        "plan": dataclasses.asdict(mechanism.plan),
        "rounds_released": mechanism.rounds_released,
        "epsilon": spent if private else None,
        "delta": delta,
        "accountant": "concentrated and Rényi bounds for the discrete Gaussian"
        if shares
        else "PLD, cross-checked with PRV",
        "not_covered": list(_NOT_COVERED),
    }


def sum_report_text(report: Mapping[str, Any]) -> str:
    """The report for people; the first line says whether the run is private."""
    lines = [report["statement"], ""]
    for key in ("unit", "adjacency", "trust_model", "mechanism", "accountant"):
        lines.append(f"{key.replace('_', ' ').capitalize()}: {report[key]}.")
    if report["resumed"]:
        lines.append("This run went on from an earlier one: the round cut off there counts twice.")
    lines.append(f"Rounds released: {report['rounds_released']}.")
    lines += ["", "Plan:"]
    lines += [f"  {key.replace('_', ' '):<22}{value}" for key, value in report["plan"].items()]
    lines += ["", "Not covered:", *(f"- {sentence}" for sentence in report["not_covered"])]
    return "\n".join(lines) + "\n"


def _up(epsilon: float) -> float:
    return math.ceil(epsilon * 1e4) / 1e4
