"""Joint clipping of one record's gradient over all tensors that a step trains."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .record_gradients import RecordGradient, Rows

Gradients = Mapping[str, RecordGradient] | Mapping[str, Tensor]


def joint_norms(gradients: Gradients) -> Tensor:
    """L2 norm of each record's gradient over all tensors together.

    Parameters
    ----------
    gradients : mapping of str to RecordGradient or Tensor
        Of the same n records, one per tensor; a plain tensor is (n, *shape).

    Returns
    -------
    Tensor
        (n,) norms; NaN or infinite where a record's gradient is.
    """
    return torch.stack([g.squared_norms() for g in _held(gradients).values()]).sum(dim=0).sqrt()


def clip_and_sum(gradients: Gradients, max_grad_norm: float) -> dict[str, Tensor]:
    """Clip each record's joint gradient to ``max_grad_norm`` and add the records up.

    Parameters
    ----------
    gradients : mapping of str to RecordGradient or Tensor
        Per-record gradients of ALL tensors that the step trains (adapter factors and, where
        trained, the head); a plain tensor is (n, *shape).
    max_grad_norm : float
        C > 0; infinity adds up unclipped.

    Returns
    -------
    dict of str to Tensor
        ``sum_j g_j min(1, C / ||g_j||)``, each of its tensor's shape, float32, even under
        autocast.

    Notes
    -----
    Formal guarantee: adding or removing one record changes the returned tensors, taken
    jointly, by at most C in L2 norm (up to float32 rounding), whatever the record is.  A
    record with a non-finite gradient contributes exactly zero: its rows are replaced, since a
    weight of 0 times NaN would still be NaN.
    """
    held = _held(gradients)
    norms = joint_norms(held)
    finite = torch.isfinite(norms)
    weights = torch.where(finite, (max_grad_norm / norms).clamp(max=1.0), torch.zeros_like(norms))
    kept = None if bool(finite.all()) else finite
    with torch.autocast(norms.device.type, enabled=False):
        return {name: gradient.weighted_sum(weights, kept) for name, gradient in held.items()}


def _held(gradients: Gradients) -> dict[str, RecordGradient]:
    return {name: Rows(g) if isinstance(g, Tensor) else g for name, g in gradients.items()}
