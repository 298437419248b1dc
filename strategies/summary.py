"""What a strategy says of itself when a run starts: Flower's tree."""

from __future__ import annotations

from logging import INFO
from typing import TYPE_CHECKING

from flwr.common import log

from .client_level import describe_client_level

if TYPE_CHECKING:
    from .base import LoRAStrategy

_UNIT = "one record of one client"
_NOISED = "that of the mechanism which noises each round's sum"
_BY_CLIENTS = "as the ClientApps' replies state it; a round whose replies state none is NOT PRIVATE"


def log_summary(strategy: LoRAStrategy) -> None:
    """Log method, active-factor rule, privacy, wire, sampling and mean as a tree."""
    one = strategy
    sampling = [
        f"Fraction: train ({one.fraction_train:.2f})",
        f"Minimum nodes: train ({one.min_train_nodes})",
    ]
    mean = f"trimmed by {one.trim:g} at either end" if one.trim else "over all valid replies"
    if one.client_level is not None:
        sampling = ["Each connected node by a coin of its own (Poisson)"]
        mean = "the noised sum over a public constant"
    bound = "none" if one.update_bound is None else "signal plus noise of the public plan"
    rates = f"lr A {one.lr_a:g}, B {one.lr_b:g}, head {one.lr_head:g}, decay {one.lr_decay:g}"
    promised = _BY_CLIENTS if one.client_level is None else _NOISED
    tree: list[tuple[str, list[str]]] = [
        (
            f"Method: {one.name}",
            [
                f"Active factors: {one.rule}",
                f"Head: {'trained' if one.train_head else 'frozen'}",
                f"Local steps asked for: {one.local_steps} ({one.optimizer}, {rates} a round)",
                f"Low-pass filter: {'on' if one.low_pass else 'off'}",
            ],
        ),
        (
            "Privacy:",
            [
                *describe_client_level(one.client_level, _UNIT),
                f"Guarantee: {one.privacy or promised}",
            ],
        ),
        (
            "Wire:",
            [
                f"Up: the change of the tensors active in the round, {one.wire_dtype}",
                "Down: the tensors that changed since the version a node holds, float32",
            ],
        ),
        (
            "Sampling:",
            [
                *sampling,
                f"Minimum available nodes: {one.min_available_nodes}",
            ],
        ),
        ("Mean over clients:", [f"Weights: {one.weighting}", mean, f"Longest update: {bound}"]),
    ]
    for number, (title, lines) in enumerate(tree, 1):
        last = number == len(tree)
        log(INFO, "\t%s──> %s", "└" if last else "├", title)
        for place, line in enumerate(lines, 1):
            log(
                INFO,
                "\t%s\t%s── %s",
                " " if last else "│",
                "└" if place == len(lines) else "├",
                line,
            )
