"""Low-rank terms that go into the frozen weights of every client."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from .base import LoRAStrategy, Update
from .low_rank import ProductSum
from .round_plan import Mode, RoundPlan
from .tensor_names import factor_names, fold_names, layer_of, layers_of

Float64s = npt.NDArray[np.float64]


class FoldingStrategy(LoRAStrategy):
    """Base of FedEx-LoRA and FLoRA, whose rounds change the weights that LoRA leaves frozen.

    The terms of a round are a pair of thin tensors per layer, ``left (m, R)`` and
    ``right (R, n)``, kept and sent beside the adapter under names of their own
    (``<layer>.fold_B.<round>.weight``, ``<layer>.fold_A.<round>.weight``).  Once made they never
    change, and a client's weight is ``W0 + s sum_t left_t right_t`` from the first t to the last:
    a client that missed rounds, or lost everything, is sent the pairs that it lacks and ends with
    the same numbers.

    When the pairs of any layer have more than twice as many columns as its weight has rows or
    columns (the fewer), they are put together into one, exactly up to rounding, and every client
    is sent all of it once.
    """

    can_trim = False

    def mode(self, server_round: int) -> Mode:
        """Both factors, in every round."""
        return "both"

    def _begin(self, plan: RoundPlan) -> None:
        self._products = {layer: ProductSum() for layer in layers_of(self._adapter)}
        self._weight = 0.0

    def _add_products(self, pairs: Mapping[str, tuple[Float64s, Float64s]], weight: float) -> None:
        """Add ``weight * left @ right`` to each layer's sum."""
        for layer, (left, right) in pairs.items():
            self._products[layer].add(left, right, weight)

    def _factors(
        self, tensors: Update | Mapping[str, Float64s]
    ) -> dict[str, tuple[Float64s, Float64s]]:
        """B and A of each layer, as (left, right)."""
        pairs = {}
        for layer in self._products:
            a, b = factor_names(layer)
            pairs[layer] = (tensors[b].astype(np.float64), tensors[a].astype(np.float64))
        return pairs

    def _fold_products(self, server_round: int) -> None:
        """Keep each layer's weighted mean product as the round's pair."""
        for layer, product in self._products.items():
            left, right = product.factors()
            self._keep(layer, server_round, left / self._weight, right)
        self._products = {}
        self._merge(server_round)

    def _keep(self, layer: str, number: int, left: Float64s, right: Float64s) -> None:
        if left.shape[1]:
            right_name, left_name = fold_names(layer, number)
            self._adapter[right_name] = right.astype(np.float32)
            self._adapter[left_name] = left.astype(np.float32)

    def _merge(self, server_round: int) -> None:
        pairs = self._pairs()
        columns = {layer: sum(left.shape[1] for left, _ in of) for layer, of in pairs.items()}
        limits = {layer: 2 * min(len(of[0][0]), of[0][1].shape[1]) for layer, of in pairs.items()}
        if not any(columns[layer] > limits[layer] for layer in pairs):
            return
        self._adapter = {n: value for n, value in self._adapter.items() if ".fold_" not in n}
        for layer, of in pairs.items():
            product = ProductSum()
            for left, right in of:
                product.add(left, right, 1.0)
            self._keep(layer, server_round, *product.factors())

    def _pairs(self) -> dict[str, list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]]:
        pairs = defaultdict(list)
        for name in sorted(name for name in self._adapter if ".fold_B." in name):
            right = self._adapter[name.replace(".fold_B.", ".fold_A.")]
            pairs[layer_of(name)].append((self._adapter[name], right))
        return dict(pairs)
