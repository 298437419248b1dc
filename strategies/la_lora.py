"""LA-LoRA: local steps alternate between the factors."""

from __future__ import annotations

from .base import LoRAStrategy
from .round_plan import Mode


class LALoRA(LoRAStrategy):
    """LA-LoRA (arXiv 2602.19926): within each round, B in odd local steps and A in even ones.

    Every step clips and noises one factor only, starts at B in every round, and takes an even
    number of steps.  Both factors move in a round and both travel; their means are taken
    separately.  The paper's low-pass filter on noised factor gradients is on unless
    ``low_pass=False``; it needs a learning rate of its own.
    """

    name = "la-lora"
    rule = "alternating local steps, B first"
    low_pass_by_default = True

    def mode(self, server_round: int) -> Mode:
        """Alternate, in every round."""
        return "alternate"
