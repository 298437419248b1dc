"""One round in one line, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def human_bytes(count: float) -> str:
    """Write a number of bytes with a unit, in powers of 1000.

    >>> human_bytes(1234567)
    '1.2 MB'
    """
    for unit in ("B", "kB", "MB"):
        text = f"{count:.0f}" if unit == "B" else f"{count:.1f}"
        if float(text) < 1000:
            return f"{text} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def human_epsilon(epsilon: float | None) -> str:
    """Write an epsilon; ``None`` means that nothing is guaranteed."""
    return "none (NOT PRIVATE)" if epsilon is None else f"{epsilon:.2f}"


def describe_privacy(result: Mapping[str, Any]) -> str:
    """Say what a run guarantees, for whom and, where it matters, against whom."""
    of_clients = "client_epsilon" in result
    epsilon = result["client_epsilon" if of_clients else "epsilon"]
    text = f"{'client-level ' if of_clients else ''}epsilon {human_epsilon(epsilon)}"
    if epsilon is None:
        return text
    unit = "for each client as a whole" if of_clients else "for each record"
    text += f" at delta {result['delta']:g}, {unit}, over all rounds"
    return text + (f"; against {result['guards_against']}" if "guards_against" in result else "")


def round_line(row: Mapping[str, Any], rounds: int) -> str:
    """Describe a line of ``metrics.jsonl``: round, accuracy, epsilon, bytes, time left."""
    accuracy = "     -" if row["accuracy"] is None else f"{row['accuracy']:6.1%}"
    if "client_epsilon" in row:
        epsilon = f"client-level epsilon {human_epsilon(row['client_epsilon'])}"
    else:
        epsilon = f"epsilon {human_epsilon(row['epsilon'])}"
    line = f"round {row['round']:>{len(str(rounds))}}/{rounds}  accuracy {accuracy}  {epsilon}"
    if row["bytes_up"] is not None:  # hidden where it would tell who took part
        line += f"  up {human_bytes(row['bytes_up'])}  down {human_bytes(row['bytes_down'])}"
    if row["round"]:
        if row["clients"] is not None:
            line += f"  clients {row['clients']}/{row['clients'] + row['failures']}"
        left = row["round_seconds"] * (rounds - row["round"])
        if row["round"] == rounds:
            line += f"  {row['seconds']:.0f} s"
        elif row["round"] > 1:  # the first round also starts the workers: it tells nothing
            line += f"  {left:.0f} s left"
    return line
