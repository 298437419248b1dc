"""RoLoRA: rounds alternate between the factors."""

from __future__ import annotations

from .base import LoRAStrategy
from .round_plan import Mode


class RoLoRA(LoRAStrategy):
    """RoLoRA (arXiv 2409.02346, 2502.01755): B in odd rounds, A in even rounds.

    The whole model is tied: within a round every client trains the same factor while the
    other is the same everywhere, so the mean is exact.  B comes first: with B = 0 the gradient
    of A is zero and a private step on it would be noise alone.
    """

    name = "ro-lora"
    rule = "B in odd rounds, A in even rounds"

    def mode(self, server_round: int) -> Mode:
        """B in odd rounds, A in even ones."""
        return "B" if server_round % 2 else "A"
