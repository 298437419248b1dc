"""Joint clipping of one record's gradient over all tensors that a step trains."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def joint_norms(rows: Mapping[str, Tensor]) -> Tensor:
    """L2 norm of each record's gradient over all tensors together.

    Parameters
    ----------
    rows : mapping of str to Tensor
        Per-record gradients, each (n, ...), float32.

    Returns
    -------
    Tensor
        (n,) norms; NaN or infinite where a record's gradient is.
    """
    squares = [row.flatten(start_dim=1).square().sum(dim=1) for row in rows.values()]
    return torch.stack(squares).sum(dim=0).sqrt()


def clip_and_sum(rows: Mapping[str, Tensor], max_grad_norm: float) -> dict[str, Tensor]:
    """Clip each record's joint gradient to ``max_grad_norm`` and add the records up.

    Parameters
    ----------
    rows : mapping of str to Tensor
        Per-record gradients of ALL tensors that the step trains (adapter factors and, where
        trained, the head), each (n, ...).
    max_grad_norm : float
        C > 0; infinity adds up unclipped.

    Returns
    -------
    dict of str to Tensor
        ``sum_j g_j min(1, C / ||g_j||)``, each (...), float32, even under autocast.

    Notes
    -----
    Formal guarantee: adding or removing one record changes the returned tensors, taken
    jointly, by at most C in L2 norm (up to float32 rounding), whatever the record is.  A
    record with a non-finite gradient contributes exactly zero: its rows are replaced, since a
    weight of 0 times NaN would still be NaN.
    """
    with torch.autocast(next(iter(rows.values())).device.type, enabled=False):
        return _clip_and_sum({name: row.float() for name, row in rows.items()}, max_grad_norm)


def _clip_and_sum(rows: Mapping[str, Tensor], max_grad_norm: float) -> dict[str, Tensor]:
    norms = joint_norms(rows)
    finite = torch.isfinite(norms)
    weights = torch.where(finite, (max_grad_norm / norms).clamp(max=1.0), torch.zeros_like(norms))
    everything_finite = bool(finite.all())
    sums = {}
    for name, row in rows.items():
        flat = row.flatten(start_dim=1)
        if not everything_finite:
            flat = torch.where(finite[:, None], flat, torch.zeros_like(flat))
        sums[name] = (weights @ flat).reshape(row.shape[1:])
    return sums
