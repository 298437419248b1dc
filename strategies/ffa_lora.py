"""FFA-LoRA: A frozen at its shared random start."""

from __future__ import annotations

from .base import LoRAStrategy
from .round_plan import Mode


class FFALoRA(LoRAStrategy):
    """FFA-LoRA (arXiv 2403.12313): only B is trained, A stays as drawn.

    The mean of B is exact, ``mean(B_k) A = mean(B_k A)``, and half of the tensors travel.
    """

    name = "ffa-lora"
    rule = "B in every step; A never"

    def mode(self, server_round: int) -> Mode:
        """B, in every round."""
        return "B"
