"""FLoRA: the clients' products stacked into the frozen weights, the adapter begun anew."""

from __future__ import annotations

import numpy as np
from flwr.app import Message

from .base import Update
from .folding import FoldingStrategy
from .round_plan import RoundPlan
from .tensor_names import factor_names, kind_of


class FLoRA(FoldingStrategy):
    """FLoRA (arXiv 2409.05976): ``W0 += s sum_k p_k B_k A_k``; A and B start again.

    After each round every client's frozen weight takes up the weighted sum of all products, of
    rank K r, A is drawn anew (seeded, Kaiming uniform as PEFT draws it) and B is zero.
    """

    name = "flora"
    rule = "A and B in every step; their products go into the frozen weights, then both start anew"

    def _fold(self, update: Update, weight: float, reply: Message, rank: int) -> None:
        heads = {name: value for name, value in update.items() if kind_of(name) == "head"}
        super()._fold(heads, weight, reply, rank)
        moved = {
            name: self._adapter[name].astype(np.float64) + change
            for name, change in update.items()
            if kind_of(name) in ("A", "B")
        }
        self._add_products(self._factors(moved), weight)
        self._weight += weight

    def _apply(self, plan: RoundPlan) -> None:
        layers = list(self._products)
        super()._apply(plan)
        self._fold_products(plan.server_round)
        for place, layer in enumerate(layers):
            a, b = factor_names(layer)
            generator = np.random.default_rng((self.seed, plan.server_round, place))
            limit = 1 / np.sqrt(self._adapter[a].shape[1])
            drawn = generator.uniform(-limit, limit, self._adapter[a].shape)
            self._adapter[a] = drawn.astype(np.float32)
            self._adapter[b] = np.zeros_like(self._adapter[b])
