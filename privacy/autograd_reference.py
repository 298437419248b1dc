"""The slow, obviously right way: one autograd pass per record.  Reference of every engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .clipping import clip_and_sum


def per_record_gradients_by_autograd(
    parameters: Mapping[str, nn.Parameter], loss_of: Callable[[int], Tensor], num_records: int
) -> dict[str, Tensor]:
    """Gradients of each record's loss, from one backward pass per record.

    Parameters
    ----------
    parameters : mapping of str to nn.Parameter
        Tensors to differentiate.
    loss_of : callable
        ``loss_of(j)`` runs the model on record j alone and returns its loss, (1,) or ().
    num_records : int
        n.

    Returns
    -------
    dict of str to Tensor
        (n, *shape) each, float32; zero rows for tensors that a record's loss does not reach.
    """
    flags = {name: p.requires_grad for name, p in parameters.items()}
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    try:
        for p in parameters.values():
            p.requires_grad_(True)
        with torch.enable_grad():
            for record in range(num_records):
                gradients = torch.autograd.grad(
                    loss_of(record).sum(), list(parameters.values()), allow_unused=True
                )
                for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
                    value = torch.zeros_like(p) if gradient is None else gradient
                    rows[name].append(value.detach().float())
    finally:
        for name, p in parameters.items():
            p.requires_grad_(flags[name])
    return {
        name: torch.stack(rows[name]) if rows[name] else p.new_zeros((0, *p.shape)).detach()
        for name, p in parameters.items()
    }


def clipped_sum_by_autograd(
    parameters: Mapping[str, nn.Parameter],
    loss_of: Callable[[int], Tensor],
    num_records: int,
    max_grad_norm: float,
) -> dict[str, Tensor]:
    """Reference of :meth:`~privacy.hook_engine.HookEngine.clipped_sum`, with its guarantee."""
    rows = per_record_gradients_by_autograd(parameters, loss_of, num_records)
    return clip_and_sum(rows, max_grad_norm)
