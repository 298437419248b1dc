"""FlexLoRA: every client its own rank, the server's mean product cut to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Message

from .base import LoRAStrategy, Update
from .low_rank import ProductSum
from .round_plan import Mode, RoundPlan
from .tensor_names import factor_names, kind_of, layers_of


class FlexLoRA(LoRAStrategy):
    """FlexLoRA (arXiv 2402.11505): truncated SVD of ``sum_k p_k s_k B_k A_k``, to each its rank.

    The server keeps ``A = V^T`` and ``B = U S`` of the largest rank R, that of the initial
    arrays.  A client of rank r holds the first r rows of A and the first r columns of B.  With
    PEFT's scaling ``s_k = lora_alpha / r_k``, ``lora_alpha`` being the same everywhere, a client's
    B is the server's times ``r / R``, so that both stand for the same change.

    A node states its rank when it answers; the first time it is taken to be R, and a node of
    another rank then asks for everything.
    """

    name = "flex-lora"
    rule = "A and B in every step; the SVD of the mean product, cut to each client's rank"
    can_trim = False

    def __init__(self, **others: Any) -> None:
        self._products: dict[str, ProductSum] = {}
        self._weight = 0.0
        self._views: dict[int, dict[str, npt.NDArray[np.float32]]] = {}
        super().__init__(**others)

    def mode(self, server_round: int) -> Mode:
        """Both factors, in every round."""
        return "both"

    def _default_rank(self) -> int:
        ranks = {len(self._adapter[factor_names(layer)[0]]) for layer in layers_of(self._adapter)}
        if len(ranks) != 1:
            raise ValueError(f"flex-lora needs one rank in all layers, the adapter has {ranks}")
        return ranks.pop()

    def _tensors_for(self, rank: int) -> Update:
        largest = self._default_rank()
        if rank == largest:
            return self._adapter
        if not 1 <= rank < largest:
            raise ValueError(f"ranks of clients are from 1 to {largest}, got {rank}")
        if rank not in self._views:
            self._views[rank] = {n: _cut(n, v, rank) for n, v in self._adapter.items()}
        return self._views[rank]

    def take_arrays(self, arrays: Any) -> None:
        """Make these arrays the adapter; views of it by rank are made anew."""
        if arrays is not self._record:
            self._views = {}
        super().take_arrays(arrays)

    def _begin(self, plan: RoundPlan) -> None:
        self._products = {layer: ProductSum() for layer in layers_of(self._adapter)}
        self._weight = 0.0

    def _fold(self, update: Update, weight: float, reply: Message, rank: int) -> None:
        heads = {name: value for name, value in update.items() if kind_of(name) == "head"}
        super()._fold(heads, weight, reply, rank)
        before, scale = self._tensors_for(rank), self._default_rank() / rank
        for layer, product in self._products.items():
            a, b = factor_names(layer)
            left = before[b].astype(np.float64) + update[b]
            product.add(left, before[a].astype(np.float64) + update[a], scale * weight)
        self._weight += weight

    def _apply(self, plan: RoundPlan) -> None:
        super()._apply(plan)
        for layer, product in self._products.items():
            a, b = factor_names(layer)
            rank = len(self._adapter[a])
            u, s, vt = product.svd(rank)
            left = np.zeros(self._adapter[b].shape)
            right = np.zeros(self._adapter[a].shape)
            left[:, : len(s)], right[: len(s)] = u * (s / self._weight), vt
            # Directions that no client of the round had: B is zero there, and A must not be, or
            # neither would ever get a gradient again.
            rest = _beside(vt, self._adapter[a], rank - len(s))
            right[len(s) : len(s) + len(rest)] = rest
            self._adapter[a], self._adapter[b] = right.astype(np.float32), left.astype(np.float32)
        self._products, self._views = {}, {}


def _beside(
    basis: npt.NDArray[np.float64], rows: npt.NDArray[np.float32], count: int
) -> npt.NDArray[np.float64]:
    """Up to ``count`` orthonormal rows from ``rows``' span, orthogonal to the rows of ``basis``."""
    rest = rows.astype(np.float64)
    rest = rest - (rest @ basis.T) @ basis
    return np.linalg.svd(rest, full_matrices=False)[2][:count]


def _cut(name: str, value: npt.NDArray[np.float32], rank: int) -> npt.NDArray[np.float32]:
    """The first ``rank`` directions of a factor, B rescaled for the smaller rank's scaling."""
    kind = kind_of(name)
    if kind == "A":
        return np.ascontiguousarray(value[:rank])
    if kind == "B":
        return np.ascontiguousarray(value[:, :rank]) * np.float32(rank / value.shape[1])
    return value
