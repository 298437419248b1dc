"""Canary gradients: fixed random directions of large norm, one per canary record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .tape import Indices


@dataclasses.dataclass(frozen=True)
class Canaries:
    """Records whose gradients the auditor chooses, each present or absent by a fair coin.

    An included canary's gradient is its direction times ``norm`` in every step that samples it;
    an excluded one's is zero, which is the neighbouring data set of zero-out adjacency.  Either
    takes part in sampling, clipping and summing like any record.

    Parameters
    ----------
    records : numpy.ndarray
        int64 (m,), which of the client's records are canaries.
    included : numpy.ndarray
        bool (m,), the coins; kept by the auditor.
    directions : mapping of str to Tensor
        (m, *shape) for every tensor that is trained, float32; over all tensors together each
        canary's direction has norm 1.
    norm : float
        Norm of a canary's gradient, far above the clip norm so that clipping acts.
    """

    records: Indices
    included: npt.NDArray[np.bool_]
    directions: Mapping[str, Tensor]
    norm: float

    @classmethod
    def draw(
        cls,
        shapes: Mapping[str, Sequence[int]],
        records: Indices,
        *,
        seed: int,
        norm: float,
    ) -> Self:
        """Toss the coins and draw uniformly random directions, orthogonal ones if they fit.

        With as many values as canaries or more, the directions are a random orthonormal frame:
        no canary then shows in another's score.  Otherwise they are independent.

        Parameters
        ----------
        shapes : mapping of str to sequence of int
            The tensors that every step of the audited run trains.
        records : numpy.ndarray
            int64 (m,) distinct indices.
        seed : int
            Of the auditor's coins and directions; unknown to the mechanism.
        norm : float
            Above 0.
        """
        if not norm > 0:
            raise ValueError(f"norm must be > 0, got {norm}")
        rng = np.random.default_rng([seed, 0x0A0D17])
        included = rng.random(len(records)) < 0.5
        sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
        flat = rng.standard_normal((len(records), sum(sizes.values())), dtype=np.float32)
        if len(flat) <= flat.shape[1]:
            flat = np.linalg.qr(flat.T).Q.T
        flat /= np.linalg.norm(flat, axis=1, keepdims=True)
        directions, start = {}, 0
        for name, shape in shapes.items():
            part = flat[:, start : start + sizes[name]]
            directions[name] = torch.from_numpy(part.reshape(len(records), *shape).copy())
            start += sizes[name]
        return cls(np.asarray(records, dtype=np.int64), included, directions, norm)

    def replace(self, name: str, records: Indices, rows: Tensor) -> Tensor:
        """Per-record gradients of one tensor with the canaries' in their places."""
        order = np.argsort(self.records)
        at = np.searchsorted(self.records, records, sorter=order).clip(max=len(self.records) - 1)
        which = order[at]
        places = np.flatnonzero(self.records[which] == records)
        canary = which[places]
        scale = torch.from_numpy(self.norm * self.included[canary].astype(np.float32))
        values = self.directions[name][torch.from_numpy(canary)].to(rows)
        shape = (-1,) + (1,) * (values.dim() - 1)
        rows = rows.clone()
        rows[torch.from_numpy(places)] = values * scale.to(rows).reshape(shape)
        return rows

    def scores(self, summed: Mapping[str, npt.NDArray[np.floating]]) -> npt.NDArray[np.float64]:
        """Inner product of each canary's direction with a sum of released gradients.

        Parameters
        ----------
        summed : mapping of str to numpy.ndarray
            What left the client, as the sum of its released gradients: updates divided by minus
            their public learning rates.

        Returns
        -------
        numpy.ndarray
            (m,) float64; higher for included canaries.
        """
        total = np.zeros(len(self.records))
        for name, directions in self.directions.items():
            flat = directions.reshape(len(total), -1).numpy()
            total += flat @ np.asarray(summed[name], dtype=np.float64).ravel()
        return total
