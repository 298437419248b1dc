"""What a round of AS-LoRA says of its choice."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .scores import ScoreSource
from .selection import Factor


def describe_round(
    server_round: int,
    chosen: Mapping[str, Factor],
    source: ScoreSource,
    scores: Mapping[str, float],
    floors: Mapping[str, float] | None,
) -> str:
    """Say what was chosen, the scores, and how they stand to the noise, in one line.

    Parameters
    ----------
    server_round : int
        The round.
    chosen : mapping of str to {"A", "B"}
        Factor that each group trained.
    source : str
        Where the scores come from.
    scores : mapping of str to float
        Score of each group that has one, at least one.
    floors : mapping of str to float or None
        Expected energy of the noise alone, in the scores' units; ``None`` if it is not known.
    """
    count = sum(factor == "A" for factor in chosen.values())
    values = np.array(list(scores.values()))
    text = f"median {np.median(values):.3g}, from {values.min():.3g} to {values.max():.3g}"
    if floors is not None:
        total = sum(floors.values())
        text += f", signal to noise {values.sum() / total:.3g}" if total else ", no noise"
    return (
        f"Round {server_round}: A in {count} and B in {len(chosen) - count} groups; "
        f"{source} scores: {text}"
    )
