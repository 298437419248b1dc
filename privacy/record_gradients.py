"""Gradients of single records, held in whichever form is cheaper, and clipped as they are held.

The gradient of a linear layer's weight for one record is ``sum_t g_t outer x_t`` over the
record's T positions.  Formed as a matrix it takes ``p q`` numbers, as its two thin sides
``T (p + q)``.  For the factors of LoRA the matrix is smaller, for a head on pooled features
(T = 1) the sides are.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

# Rounding of one operation in float64, twice what it can be.
_ROUNDING = 2.0**-52
# Numbers summed up in float32: off by 1e-6 at most.
_PIECE = 256


class RecordGradient(Protocol):
    """The gradients of n records with respect to one tensor."""

    def squared_norms(self) -> Tensor:
        """Squared L2 norm of each record's gradient, (n,); never too small."""
        ...

    def weighted_sum(self, weights: Tensor, kept: Tensor | None = None) -> Tensor:
        """``sum_j w_j g_j`` for weights (n,), of the tensor's shape, float32.

        ``kept``, (n,) bool, names the records that count; the others contribute exactly zero,
        be their gradients finite or not.  ``None``: all.
        """
        ...

    def rows(self) -> Tensor:
        """The gradients themselves, (n, *shape), float32."""
        ...


class Rows:
    """Gradients as they are.

    Parameters
    ----------
    values : Tensor
        (n, *shape), float32; with ``transposed`` (n, q, p) for a tensor of shape (p, q).
    transposed : bool (default: False)
        Whether the last two dimensions are swapped.
    """

    def __init__(self, values: Tensor, *, transposed: bool = False) -> None:
        self._values = values.float()
        self._transposed = transposed

    def squared_norms(self) -> Tensor:
        """Squared L2 norm of each record's gradient, (n,)."""
        # A float32 sum over a large tensor can be too small by 1e-4 and more: such sums over short
        # pieces only, and their squares in float64.
        flat = self._values.flatten(start_dim=1)
        whole = flat.shape[1] // _PIECE * _PIECE
        pieces = _lengths(flat[:, :whole].reshape(len(flat), -1, _PIECE)) if whole else flat[:, :0]
        rest = _lengths(flat[:, whole:])
        return (pieces.double().square().sum(dim=1) + rest.double().square()).float()

    def weighted_sum(self, weights: Tensor, kept: Tensor | None = None) -> Tensor:
        """``sum_j w_j g_j`` of the kept records."""
        flat = _only(kept, self._values).flatten(start_dim=1)
        total = (weights @ flat).reshape(self._values.shape[1:])
        return total.t().contiguous() if self._transposed else total

    def rows(self) -> Tensor:
        """The gradients, (n, *shape)."""
        return self._values.transpose(1, 2) if self._transposed else self._values


class Sides:
    """Gradients ``sum_t g_t outer x_t`` as their two thin sides.

    The norm is that of a Gram matrix; the sum over records is one matrix product that never forms
    a record's gradient.  Norm and sum are rounded apart, unlike those of :class:`Rows`, so both
    are computed in float64 and what the norm may be too small by is added to it: a record whose
    positions are made to cancel is held to its bound, too.

    Parameters
    ----------
    grads : Tensor
        g, (n, T, p), float32.
    inputs : Tensor
        x, (n, T, q), float32.
    """

    def __init__(self, grads: Tensor, inputs: Tensor) -> None:
        self._grads = grads
        self._inputs = inputs

    @staticmethod
    def cheaper(positions: int, p: int, q: int) -> bool:
        """Whether T (p + q) <= p q, by which both memory and the norm's products are fewer."""
        return positions * (p + q) <= p * q

    def squared_norms(self) -> Tensor:
        """Squared L2 norm of each record's gradient plus its rounding, (n,)."""
        g, x = self._grads.double(), self._inputs.double()
        gram = torch.bmm(g, g.transpose(1, 2)) * torch.bmm(x, x.transpose(1, 2))
        magnitude: Tensor = (_lengths(g) * _lengths(x)).sum(dim=1)
        # The terms of the sums that make the norm: p, q, and T squared.
        terms = g.shape[2] + x.shape[2] + g.shape[1] ** 2
        return (gram.sum(dim=(1, 2)) + terms * _ROUNDING * magnitude.square()).float()

    def weighted_sum(self, weights: Tensor, kept: Tensor | None = None) -> Tensor:
        """``sum_j w_j g_j`` of the kept records."""
        g, x = _only(kept, self._grads).double(), _only(kept, self._inputs).double()
        return ((g * weights[:, None, None]).flatten(0, 1).t() @ x.flatten(0, 1)).float()

    def rows(self) -> Tensor:
        """The gradients, (n, p, q)."""
        return torch.bmm(self._grads.transpose(1, 2), self._inputs)


def of_weight(grads: Tensor, inputs: Tensor) -> RecordGradient:
    """Gradients ``sum_t g_t outer x_t`` (p, q) of a linear weight.

    Parameters
    ----------
    grads : Tensor
        Of the layer's output, (n, T, p), float32.
    inputs : Tensor
        Of the layer, (n, T, q), float32.
    """
    positions, p, q = grads.shape[1], grads.shape[2], inputs.shape[2]
    if Sides.cheaper(positions, p, q):
        return Sides(grads, inputs)
    # Several times faster with the thin side on the left (measured on MKL).
    if q < p:
        return Rows(torch.bmm(inputs.transpose(1, 2), grads), transposed=True)
    return Rows(torch.bmm(grads.transpose(1, 2), inputs))


def of_bias(grads: Tensor) -> RecordGradient:
    """Gradients of a linear layer's bias, from those (n, T, p) of its output."""
    return Rows(grads.sum(dim=1))


def _lengths(vectors: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return lengths


def _only(kept: Tensor | None, values: Tensor) -> Tensor:
    """Put zeros in place of what is not kept: a weight of 0 times NaN would still be NaN."""
    if kept is None:
        return values
    shape = (-1,) + (1,) * (values.dim() - 1)
    return torch.where(kept.view(shape), values, torch.zeros_like(values))
