"""One Poisson batch computed in parts that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

Losses = Callable[[npt.NDArray[np.int64]], Tensor]


class ClippingEngine(Protocol):
    """Gives clipped sums; see :class:`~privacy.hook_engine.HookEngine`."""

    def clipped_sum(
        self,
        active: Sequence[str],
        losses: Callable[[], Tensor],
        num_records: int,
        max_grad_norm: float,
    ) -> dict[str, Tensor]:
        """Sum of per-record gradients, each clipped to ``max_grad_norm``."""
        ...


def clipped_sum_in_parts(
    engine: ClippingEngine,
    active: Sequence[str],
    losses: Losses,
    indices: npt.NDArray[np.int64],
    max_grad_norm: float,
    max_physical_batch_size: int,
) -> dict[str, Tensor]:
    """Clipped sum of a batch, of which at most so many records are in the model at once.

    Parameters
    ----------
    engine : ClippingEngine
        Per-record gradients and clipping.
    active : sequence of str
        Tensors that this step trains.
    losses : callable
        ``losses(part)`` runs the model on these records and returns one loss each.
    indices : numpy.ndarray
        The drawn batch, int64 (n,); may be empty.
    max_grad_norm : float
        C.
    max_physical_batch_size : int
        Most records at once, 1 or more; 0: all of them.

    Returns
    -------
    dict of str to Tensor
        As ``engine.clipped_sum`` of the whole batch, but for float32 rounding.

    Notes
    -----
    Formal guarantee: that of the engine.  A record is clipped by its own norm, in whichever part
    it stands, and sampling, noise and normaliser belong to the whole batch: the split is seen in
    nothing but time.
    """

    def sum_of(part: npt.NDArray[np.int64]) -> dict[str, Tensor]:
        return engine.clipped_sum(active, lambda: losses(part), len(part), max_grad_norm)

    parts = _parts(indices, max_physical_batch_size)
    total = sum_of(next(parts))
    for part in parts:
        for name, value in sum_of(part).items():
            total[name] += value
    return total


def _parts(indices: npt.NDArray[np.int64], most: int) -> Iterator[npt.NDArray[np.int64]]:
    """Split evenly, so that no small rest costs a pass of its own; at least one part."""
    if most < 0:
        raise ValueError(f"max_physical_batch_size must be 0 or more, got {most}")
    count = max(1, -(-len(indices) // most)) if most else 1
    yield from np.array_split(indices, count)
