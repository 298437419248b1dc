"""What a run guarantees, in writing: ``privacy_report.json`` and ``privacy_report.txt``."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from typing import Any

from federation.settings import Settings

from .privacy_tracker import PrivacyTracker, Statement

_TERMS = {
    "unit": "one record of one client",
    "adjacency": "zero-out: one record contributes or does not; record counts are public "
    "(the same epsilon as add/remove)",
    "trust_model": "against everybody who sees all messages, the server included; noise is added "
    "on the client, and a site's own policy and ledger bound what any run config can ask for",
    "mechanism": "Poisson-subsampled Gaussian mechanism at every local step: per-record gradients "
    "clipped jointly to norm C, noise of standard deviation sigma C on their sum, divided by a "
    "public constant; all steps of all rounds compose",
    "sampling": "Poisson: each record enters each step independently with probability q; no "
    "amplification is credited for which clients take part",
}

# By the headings of docs/privacy.md, "What is not covered"; a test compares them.
NOT_COVERED = {
    "When a reply comes": "When a reply comes, unless the site's policy fixes it (reply-at).",
    "Whether and why a client does not answer.": "Whether and why a client does not answer.",
    "Padding.": "Padding of texts is checked on made-up records, not proved harmless.",
    "Floating point": "Attacks on floating-point outputs are made hard, not excluded.",
    "Choosing settings on private data.": "Settings that were chosen on private records.",
    "A message that was not used": "Late replies are charged at the site but unknown here.",
    "The server's printed epsilon": "These numbers are the clients' word; a site's own account, "
    "over all runs, is its ledger.",
    "Limits that are raised": "Limits of a site's policy that are raised later.",
    "Copies that hashes do not recognise": "Copies of a record that a site's ledger cannot tell.",
    "A site that allows more": "A site whose policy lets updates without noise leave.",
    "The model's use": "What a prediction tells about a group of people.",
}


def make_report(settings: Settings, tracker: PrivacyTracker) -> dict[str, Any]:
    """State the guarantee of a run by what its clients stated.

    Parameters
    ----------
    settings : Settings
        The run's.
    tracker : PrivacyTracker
        Knows every client's statement, those before a resume included.

    Returns
    -------
    dict
        Plain values: finite numbers, texts, lists, or None where there is no guarantee. It never
        holds a record count or an expected batch, from which one follows by q.

    Notes
    -----
    Formal guarantee: if it is private, everything that client k sent in this run (and in the runs
    that it resumes) is (epsilon_k, delta)-DP per record. Clients hold disjoint data, so ``overall``
    is the client with the largest epsilon. Not covered: ``not_covered``; and the numbers are the
    clients' word.
    """
    found = tracker.statements()
    delta = settings.privacy.target_delta
    reason = _why_not(settings, found)
    noised = settings.privacy.mode != "none"
    norms = _norms(settings)
    clients = [
        {"node_id": node, **_numbers(one, epsilon, delta, norms, private=reason is None)}
        for node, (one, epsilon) in found.items()
    ]
    worst = max(clients, key=lambda client: client["epsilon"] or 0.0, default=None)
    overall = {"clients": len(clients), "epsilon": None, "delta": delta, **norms}
    if reason is None and worst is not None:
        overall = {"clients": len(clients), "largest_of": worst["node_id"], **worst}
        del overall["node_id"]
    noise = settings.privacy.evaluation_noise_multiplier
    evaluation = f"a count of right answers a round, with noise of scale {noise:g}" if noise else ""
    return {
        "statement": _statement(reason, overall),
        "private": reason is None,
        "resumed": bool(settings.resume),
        "target_epsilon": settings.privacy.target_epsilon if noised else None,
        **_TERMS,
        **({} if noised else {"mechanism": "none: nothing was clipped, no noise was added"}),
        **({"evaluation": evaluation} if noise and noised else {}),
        "accountant": _accountant(),
        "overall": overall,
        "clients": clients,
        "not_covered": list(NOT_COVERED.values()),
    }


def _why_not(settings: Settings, found: Mapping[int, tuple[Statement | None, float]]) -> str | None:
    if settings.privacy.mode == "none":
        return "privacy.mode is 'none'"
    if settings.privacy.insecure_test_seed >= 0:
        return "privacy.insecure-test-seed is set, for tests only"
    void = [str(node) for node, (_, epsilon) in found.items() if not math.isfinite(epsilon)]
    if void:
        return f"no guarantee can be stated for client {', '.join(void)}"
    return None if found else "no client has stated anything"


def _norms(settings: Settings) -> dict[str, float | None]:
    privacy = settings.privacy
    if privacy.mode == "none":  # nothing is clipped
        return dict.fromkeys(("max_grad_norm", "max_grad_norm_a", "max_grad_norm_b"))
    return {
        "max_grad_norm": privacy.max_grad_norm,
        "max_grad_norm_a": privacy.max_grad_norm_a or privacy.max_grad_norm,
        "max_grad_norm_b": privacy.max_grad_norm_b or privacy.max_grad_norm,
    }


def _numbers(
    one: Statement | None,
    epsilon: float,
    delta: float,
    norms: Mapping[str, float | None],
    *,
    private: bool,
) -> dict[str, Any]:
    known = math.isfinite(epsilon) and private
    return {
        "sample_rate": one.sample_rate if one else None,
        "noise_multiplier": one.noise_multiplier if one else None,
        **norms,
        "steps": one.steps if one else None,
        "accountant": "PLD",
        "epsilon": epsilon if known else None,
        "delta": delta,
    }


def _accountant() -> dict[str, str]:
    version = importlib.metadata.version
    return {
        "of_record": "PLD, privacy loss distributions with pessimistic discretisation, "
        f"dp-accounting {version('dp-accounting')}",
        "cross_check": f"PRV, Opacus {version('opacus')}: each site calibrates only where both "
        "agree within 2 % plus twice PRV's stated error",
    }


def _statement(reason: str | None, overall: Mapping[str, Any]) -> str:
    if reason is not None:
        return f"NOT PRIVATE: {reason}."
    epsilon = math.ceil(overall["epsilon"] * 1e4) / 1e4  # a smaller one would not hold
    return (
        f"Everything that a client sent is ({epsilon:.4f}, {overall['delta']:g})-"
        "differentially private for each of its records."
    )


def as_text(report: Mapping[str, Any]) -> str:
    """The report for people; the first line says whether the run is private."""
    overall = report["overall"]
    lines = [report["statement"], ""]
    target, epsilon = report["target_epsilon"], overall["epsilon"]
    if epsilon is not None and epsilon > target:
        lines += [f"That is above the run's target epsilon of {target:g}.", ""]
    for term in _TERMS:
        lines.append(f"{term.replace('_', ' ').capitalize()}: {report[term]}.")
    if "evaluation" in report:
        lines.append(f"Evaluation: {report['evaluation']}; the same budget pays for it.")
    for name, text in report["accountant"].items():
        lines.append(f"Accountant, {name.replace('_', ' ').replace('cross ', 'cross-')}: {text}.")
    if report["resumed"]:
        lines.append(
            "This run went on from an earlier one: its clients and steps are in the account, and "
            "nodes may stand there under two ids."
        )
    norms = [_shown(overall[f"max_grad_norm{end}"], "g") for end in ("", "_a", "_b")]
    lines += [
        f"Clip norm C: {norms[0]} (steps on A {norms[1]}, on B {norms[2]}).",
        f"Overall, the largest over {overall['clients']} clients with disjoint records: epsilon "
        f"{_shown(epsilon, '.4f')} at delta {overall['delta']:g}.",
        "",
        f"{'client':<22}{'q':>12}{'sigma':>12}{'steps':>8}{'epsilon':>10}  by PLD, at delta "
        f"{overall['delta']:g}",
    ]
    lines += [
        f"{one['node_id']:<22}{_shown(one['sample_rate'], '.6g'):>12}"
        f"{_shown(one['noise_multiplier'], '.4f'):>12}{_shown(one['steps'], 'd'):>8}"
        f"{_shown(one['epsilon'], '.4f'):>10}"
        for one in report["clients"]
    ]
    if report["private"]:
        lines += ["", "Not covered:", *(f"- {sentence}" for sentence in report["not_covered"])]
    return "\n".join(lines) + "\n"


def _shown(value: float | None, how: str) -> str:
    return "none" if value is None else format(value, how)
