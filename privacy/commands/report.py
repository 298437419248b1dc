"""A plan for people and for machines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from .planning import Epsilons, Signal, Training
from .trading import Choice


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """All that ``dp-lora plan`` found.

    Parameters
    ----------
    training : Training
        What was planned.
    target_epsilon : float or None
        What was asked for; ``None`` if the noise was given.
    noise_multiplier : float
        Sigma.
    epsilons : Epsilons
        Of all steps.
    values : int
        Values d that a step trains.
    signal : Signal
        Noise over signal.
    nearby, grid : sequence of Choice
        What one could have instead; upper bounds.
    spending : sequence of (int, float)
        Round, and an upper bound on the epsilon spent until its end.
    """

    training: Training
    target_epsilon: float | None
    noise_multiplier: float
    epsilons: Epsilons
    values: int
    signal: Signal
    nearby: Sequence[Choice]
    grid: Sequence[Choice]
    spending: Sequence[tuple[int, float]]


def as_json(outlook: Outlook) -> dict[str, Any]:
    """Plain values, keys in snake case; what is infinite is null."""
    return {
        "plan": {
            **_numbers(outlook.training),
            "target_epsilon": outlook.target_epsilon,
            "noise_multiplier": outlook.noise_multiplier,
        },
        "epsilon": {
            "of_record": "pld",
            "cross_check": "prv",
            **dataclasses.asdict(outlook.epsilons),
        },
        "noise_to_signal": {"values": outlook.values, **_signal(outlook.signal)},
        "nearby": [_choice(one) for one in outlook.nearby],
        "grid": [_choice(one) for one in outlook.grid],
        "spending": [
            {"round": number, "epsilon": _finite(epsilon)} for number, epsilon in outlook.spending
        ],
    }


def _numbers(training: Training) -> dict[str, Any]:
    return {
        "records": training.records,
        "sample_rate": training.rate,
        "expected_batch_size": training.batch,
        "rounds": training.rounds,
        "local_steps": training.local_steps,
        "steps": training.steps,
        "delta": training.delta,
    }


def _signal(signal: Signal) -> dict[str, float]:
    return {
        "per_step": signal.step,
        "all_steps": signal.run,
        "noise_std_per_value": signal.per_value,
    }


def _choice(one: Choice) -> dict[str, Any]:
    plain = {
        "name": one.name,
        **_numbers(one.training),
        "epsilon": one.epsilon,
        "noise_multiplier": one.noise_multiplier,
        "noise_to_signal": _signal(one.signal),
    }
    if one.epsilon_if_kept is not None:
        plain["epsilon_with_the_plans_noise"] = _finite(one.epsilon_if_kept)
    return plain


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def as_text(outlook: Outlook) -> str:
    """Lines of at most 100 characters."""
    return "\n\n".join([_head(outlook), _noise(outlook), _trades(outlook), _table(outlook)])


def _head(outlook: Outlook) -> str:
    training, epsilons = outlook.training, outlook.epsilons
    given = "given" if outlook.target_epsilon is None else f"for epsilon {outlook.target_epsilon:g}"
    return "\n".join(
        [
            f"One site with {training.records:,} records, {training.rounds:,} rounds x "
            f"{training.local_steps:,} local steps = {training.steps:,} private steps",
            f"  sampling rate     q = {training.rate:.5g}: expected batch b = {training.batch:g}",
            f"  noise multiplier  sigma = {outlook.noise_multiplier:.4f} ({given}): "
            "noise on the clipped sum, over the clip norm C",
            f"  epsilon at delta {training.delta:g}, for each record, over all steps",
            f"    PLD  {epsilons.pld:8.4f}  of record: what a run states and keeps to",
            f"    PRV  {epsilons.prv:8.4f}  the cross-check: a second implementation, upper bound",
            f"    RDP  {epsilons.rdp:8.4f}  looser; for comparison with papers and other tools",
        ]
    )


def _noise(outlook: Outlook) -> str:
    training, signal, values = outlook.training, outlook.signal, outlook.values
    return "\n".join(
        [
            f"Noise against signal, d = {values:,} values trained in a step",
            "  signal     a mean gradient of norm C: the most that clipping leaves, if all records "
            "agree",
            f"  noise      norm sigma C sqrt(d) / b = {signal.step:.4g} C on that mean",
            f"  one step   noise / signal = {signal.step:.4g}",
            f"  each value noise sigma C / b = {signal.per_value:.4g} C, signal C / sqrt(d) = "
            f"{1 / math.sqrt(values):.4g} C: the same ratio",
            f"  all steps  {signal.run:.4g} for the sum of the {training.steps:,} steps, if all "
            "point the same way",
            "  K sites    their mean divides each of these by sqrt(K), if they are of one size",
        ]
    )


def _trades(outlook: Outlook) -> str:
    aim = outlook.nearby[0].epsilon
    head = [
        f"Instead: noise for epsilon {aim:.4g}, and epsilon if sigma stays "
        f"{outlook.noise_multiplier:.4f}",
        "  PLD on a coarse grid, pessimistic: upper bounds, a run needs no more",
        f"  {'':<16}{'q':>9}{'steps':>10}{'sigma':>10}{'noise/signal':>14}{'all steps':>11}"
        f"{'epsilon':>10}",
    ]
    return "\n".join([*head, *(_trade(one) for one in outlook.nearby)])


def _trade(one: Choice) -> str:
    kept = "-" if one.epsilon_if_kept is None else _short(one.epsilon_if_kept)
    return (
        f"  {one.name:<16}{one.training.rate:>9.4g}{one.training.steps:>10,}"
        f"{one.noise_multiplier:>10.3f}{one.signal.step:>14.4g}{one.signal.run:>11.4g}{kept:>10}"
    )


def _table(outlook: Outlook) -> str:
    batches = list(dict.fromkeys(one.training.batch for one in outlook.grid))
    lines = [
        "Rounds and batch at other epsilons: sigma, noise / signal in a step, in all steps",
        "  upper bounds as above",
    ]
    for epsilon in dict.fromkeys(one.epsilon for one in outlook.grid):
        heads = "".join(f"{f'batch {batch:g}':>26}" for batch in batches)
        lines.append(f"  {f'epsilon {epsilon:g}':<16}{heads}")
        cells = [one for one in outlook.grid if one.epsilon == epsilon]
        for rounds in dict.fromkeys(one.training.rounds for one in cells):
            row = [one for one in cells if one.training.rounds == rounds]
            lines.append(f"  {f'rounds {rounds}':<16}{''.join(_cell(one) for one in row)}")
    return "\n".join(lines)


def _cell(one: Choice) -> str:
    return f"{one.noise_multiplier:>10.3f}{one.signal.step:>8.3g}{one.signal.run:>8.3g}"


def _short(epsilon: float) -> str:
    return f"{epsilon:.3f}" if math.isfinite(epsilon) else "useless"
