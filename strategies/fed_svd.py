"""FedSVD: B is trained, and after each round A becomes an orthonormal basis of the product."""

from __future__ import annotations

import numpy as np

from .base import LoRAStrategy
from .low_rank import numerical_rank, qr_core_svd
from .round_plan import Mode, RoundPlan
from .tensor_names import factor_names, layers_of


class FedSVD(LoRAStrategy):
    """FedSVD (arXiv 2505.12805): clients train B; the server refactors ``B A`` after each round.

    With ``B A = U S V^T``, A becomes ``V^T`` and B becomes ``U S``: the product stays, A has
    orthonormal rows that follow what was learned, and no client ever puts noise on A.  The mean
    of B is exact, as all clients hold the same A.

    Both factors travel down, as both change; up goes B alone.
    """

    name = "fed-svd"
    rule = "B; after each round A becomes the right singular vectors of B A"

    def mode(self, server_round: int) -> Mode:
        """B, in every round."""
        return "B"

    def _apply(self, plan: RoundPlan) -> None:
        super()._apply(plan)
        for layer in layers_of(self._adapter):
            a, b = factor_names(layer)
            rank = self._adapter[a].shape[0]
            u, s, vt = qr_core_svd(self._adapter[b], self._adapter[a], rank)
            if len(s) < rank or not numerical_rank(s, (u.shape[0], vt.shape[1])):
                continue  # no product yet, or none of full size: any basis would be made up
            self._adapter[a] = vt.astype(np.float32)
            self._adapter[b] = (u * s).astype(np.float32)
