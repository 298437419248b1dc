"""AS-LoRA's choice: which factor each group of layers trains in a round."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from .tensor_names import layer_of

Factor = Literal["A", "B"]
Granularity = Literal["block", "module"]

_BLOCK = re.compile(r"^(.*\.\d+)(?=\.|$)")


def group_of(name: str, granularity: Granularity) -> str:
    """Group of a factor tensor: its transformer block, or its module.

    A block is the name up to its last number.

    >>> group_of("base_model.model.layers.0.blocks.1.attn.qkv.lora_A.weight", "block")
    'base_model.model.layers.0.blocks.1'
    """
    layer = layer_of(name)
    found = _BLOCK.match(layer) if granularity == "block" else None
    return found.group(1) if found else layer


class FactorChoice:
    """Moving averages of the scores, and the draw that they lead to (AS-LoRA, arXiv 2605.05769).

    Parameters
    ----------
    groups : sequence of str
        Groups of layers, in a fixed order.
    warm_up : int
        Rounds T_w in which all groups train B (odd rounds) or A (even rounds).
    ema : float (default: 0.9)
        Weight beta of the past in ``S <- beta S + (1 - beta) s``.
    exploration : float (default: 0.05)
        Floor p_min of both probabilities.
    seed : int (default: 0)
        Seeds the draws; a round's draw depends on seed, round and scores only.

    Notes
    -----
    A function of privatised scores and public numbers: post-processing.
    """

    def __init__(
        self,
        groups: Sequence[str],
        *,
        warm_up: int,
        ema: float = 0.9,
        exploration: float = 0.05,
        seed: int = 0,
    ) -> None:
        self.groups = tuple(groups)
        self.warm_up = warm_up
        self.ema = ema
        self.exploration = exploration
        self.seed = seed
        self._scores: dict[str, dict[Factor, float]] = {group: {} for group in self.groups}

    def temperature(self, server_round: int) -> float:
        """``max(0.1, 0.95^(t - T_w))``: sharper with every round."""
        return max(0.1, float(0.95 ** (server_round - self.warm_up)))

    def probability_of_a(self, group: str, server_round: int) -> float:
        """Probability that ``group`` trains A in a round.

        ``sigmoid(d / tau_t)`` with ``d = (S_A - S_B) / (|S_A| + |S_B| + 1e-8)``, clipped to
        [p_min, 1 - p_min]; 0 or 1 in the warm-up and for a factor never observed.
        """
        if server_round <= self.warm_up:
            return float(server_round % 2 == 0)
        seen = self._scores[group]
        if len(seen) < 2:  # B first, then what is missing
            return float("B" in seen and "A" not in seen)
        # Clamped only here, after averaging: before it would bias both upwards.
        a, b = max(seen["A"], 0.0), max(seen["B"], 0.0)
        drive = (a - b) / (a + b + 1e-8)
        probability = 1 / (1 + math.exp(-drive / self.temperature(server_round)))
        return min(max(probability, self.exploration), 1 - self.exploration)

    def choose(self, server_round: int) -> dict[str, Factor]:
        """Draw each group's factor for a round; the same draw whenever asked."""
        draws = np.random.default_rng((self.seed, server_round)).random(len(self.groups))
        return {
            group: "A" if draw < self.probability_of_a(group, server_round) else "B"
            for group, draw in zip(self.groups, draws, strict=True)
        }

    def observe(self, group: str, factor: Factor, score: float) -> None:
        """Fold a score into the moving average of a group's factor."""
        seen = self._scores[group]
        seen[factor] = self.ema * seen[factor] + (1 - self.ema) * score if factor in seen else score

    def scores(self) -> dict[str, dict[Factor, float]]:
        """Moving averages by group and factor; a factor never observed is missing."""
        return {group: dict(seen) for group, seen in self._scores.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that changes from round to round."""
        return {"scores": self.scores()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises
        ------
        ValueError
            If it is of other groups.
        """
        if set(state["scores"]) != set(self.groups):
            raise ValueError("the state belongs to other groups of layers")
        self._scores = {group: dict(state["scores"][group]) for group in self.groups}
