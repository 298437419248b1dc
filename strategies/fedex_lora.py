"""FedEx-LoRA: the means of A and B, and what they miss folded into the frozen weights."""

from __future__ import annotations

from flwr.app import Message

from .base import Update
from .folding import FoldingStrategy
from .round_plan import RoundPlan


class FedExLoRA(FoldingStrategy):
    """FedEx-LoRA (arXiv 2410.09432): exact aggregation of A and B trained together.

    A and B become their means; the residual ``sum_k p_k B_k A_k - mean(B) mean(A)``, which the
    product of the means lacks, goes into the frozen weight of every client.  In the changes
    ``dB_k, dA_k`` it is ``sum_k p_k dB_k dA_k - mean(dB) mean(dA)``, of rank (K - 1) r at most.

    Under differential privacy the residual holds products of noises too; folded in, they stay.
    """

    name = "fedex-lora"
    rule = "A and B in every step; the residual of their means goes into the frozen weights"

    def _fold(self, update: Update, weight: float, reply: Message, rank: int) -> None:
        super()._fold(update, weight, reply, rank)
        self._add_products(self._factors(update), weight)
        self._weight += weight

    def _apply(self, plan: RoundPlan) -> None:
        means = self._mean.mean()
        for layer, (left, right) in self._factors(means).items():
            self._products[layer].add(left, right, -self._weight)
        super()._apply(plan)
        self._fold_products(plan.server_round)
