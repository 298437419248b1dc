"""DP-LoRA: both factors in every step, the baseline."""

from __future__ import annotations

from .base import LoRAStrategy
from .round_plan import Mode


class DPLoRA(LoRAStrategy):
    """Federated LoRA (FedIT) under differential privacy: A and B trained together.

    The means of A and of B are taken separately, so the product is biased,
    ``mean(B_k) mean(A_k) != mean(B_k A_k)``, and noise on both factors multiplies
    (FFA-LoRA, arXiv 2403.12313, section 3).
    """

    name = "dp-lora"
    rule = "A and B in every step"

    def mode(self, server_round: int) -> Mode:
        """Both factors, in every round."""
        return "both"
