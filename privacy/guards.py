"""Refusals that keep a per-record bound true: what an engine cannot be right about."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from .autograd_reference import per_record_gradients_by_autograd


class EngineError(RuntimeError):
    """The model or the batch is one for which per-record clipping would not hold."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an adapter tensor lives: the weight or the bias of one linear layer."""

    module: nn.Linear
    kind: Literal["weight", "bias"]
    parameter: nn.Parameter


class Engine(Protocol):
    """What :func:`check_engine` needs of an engine."""

    def per_record_gradients(
        self, active: Collection[str], losses: Callable[[], Tensor], num_records: int
    ) -> dict[str, Tensor]:
        """Return (n, *shape) gradients of each record's loss."""
        ...


def locate_linear_parameters(
    model: nn.Module, adapter: Mapping[str, nn.Parameter]
) -> dict[str, Place]:
    """Find the linear layer that owns each adapter tensor.

    Raises
    ------
    EngineError
        If a tensor belongs to no ``nn.Linear`` (its gradient would be unknown), or to two (its
        record norms would be split between them).
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for kind, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, kind))
    places = {}
    for name, parameter in adapter.items():
        found = owners.get(id(parameter), [])
        if len(found) != 1:
            raise EngineError(f"{name}: belongs to {len(found)} layers of the model, must be 1")
        module, kind = found[0]
        if not isinstance(module, nn.Linear) or kind not in ("weight", "bias"):
            raise EngineError(
                f"{name}: belongs to a {type(module).__name__}; per-record gradients are known "
                "for nn.Linear only"
            )
        places[name] = Place(module, "bias" if kind == "bias" else "weight", parameter)
    return places


def refuse_trainable(model: nn.Module) -> None:
    """Refuse parameters that require gradients: autograd would leave raw sums in ``.grad``.

    Raises
    ------
    EngineError
        Naming the first such parameter.
    """
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    if trainable:
        raise EngineError(
            f"parameters must not require gradients under this engine, but {trainable[0]} (and "
            f"{len(trainable) - 1} more) do: their raw gradients would stay in .grad"
        )


def refuse_training_batchnorm(model: nn.Module) -> None:
    """Refuse BatchNorm in training mode, which mixes records and remembers them.

    Raises
    ------
    EngineError
        Naming the first such layer.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise EngineError(
                f"{name} is a {type(module).__name__} without running statistics: it averages "
                "over the records of a batch even in eval mode"
            )
        if module.training and isinstance(
            module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
        ):
            if isinstance(module, nn.modules.instancenorm._InstanceNorm) and not (
                module.track_running_stats
            ):
                continue
            raise EngineError(
                f"{name} is a {type(module).__name__} in training mode: it averages over the "
                "records of a batch and keeps their statistics without noise; put it in eval mode"
            )


def check_losses(losses: Tensor, num_records: int) -> None:
    """Refuse anything but one floating-point loss per record.

    Raises
    ------
    EngineError
        Naming the shape found; a scalar is a mean or a sum over records.
    """
    if losses.shape != (num_records,) or not losses.is_floating_point():
        raise EngineError(
            f"losses must be one per record, shape ({num_records},), got shape "
            f"{tuple(losses.shape)} of {losses.dtype}; use reduction='none'"
        )


def check_engine(
    engine: Engine,
    adapter: Mapping[str, nn.Parameter],
    losses: Callable[[slice], Tensor],
    num_records: int,
    *,
    sets: Sequence[Collection[str]] = (),
    tolerance: float = 1e-3,
) -> None:
    """Compare an engine with plain autograd, record by record, on made-up records.

    Catches every coupling that a shape cannot show: a loss weighted over the batch, in-batch
    negatives, a model that reorders or mixes records, a layer that saw other positions than
    the engine thinks.  Runs once per model, on public data, before any private record is read.

    Parameters
    ----------
    engine : Engine
        The engine to trust.
    adapter : mapping of str to nn.Parameter
        Every tensor that may be trained.  All-zero ones (LoRA's B at its start) are filled
        with small numbers for the time of the check, so that their partners' gradients are not
        trivially zero.
    losses : callable
        ``losses(rows)`` runs the model on that slice of the made-up batch and returns its
        losses.  Must be deterministic (dropout off).
    num_records : int
        Records in the made-up batch, at least 2.
    sets : sequence of collections of str (default: all tensors at once)
        Which tensors a step may train together, by name: an engine may take other ways for each.
    tolerance : float (default: 1e-3)
        Largest difference, relative to the norm of a record's gradient.

    Raises
    ------
    EngineError
        Naming the tensor and the size of the difference.
    """
    if num_records < 2:
        raise ValueError(f"coupling shows only between records: needs 2 or more, got {num_records}")
    saved = {name: p.detach().clone() for name, p in adapter.items() if not p.any()}
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for name in saved:
                noise = torch.randn(adapter[name].shape, generator=generator) * 0.02
                adapter[name].copy_(noise.to(adapter[name]))
        fast = [
            engine.per_record_gradients(names, lambda: losses(slice(0, num_records)), num_records)
            for names in sets or [list(adapter)]
        ]
        slow = per_record_gradients_by_autograd(
            adapter, lambda record: losses(slice(record, record + 1)), num_records
        )
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                adapter[name].copy_(value)
    for rows in fast:
        for name, row in rows.items():
            scale = slow[name].flatten(1).norm(dim=1).clamp(min=1e-6)
            error = (row - slow[name]).flatten(1).norm(dim=1) / scale
            worst = float(error.max())
            if not worst <= tolerance:
                raise EngineError(
                    f"{name}: gradients in a batch differ from those of each record alone by "
                    f"{worst:.2g} (relative; accepted: {tolerance:g}): the model or the loss "
                    "couples records, so clipping per record would not bound a record's influence"
                )
