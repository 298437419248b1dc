"""Per-record gradients of adapter and head layers, kept directly by forward hooks.

Opacus takes dimension 0 of a layer's input for the batch.  Inside Swin's windows that dimension
is records x windows, and a record would be clipped window by window, up to as many times C as it
has windows.  This engine is told the true number of records and groups every layer's positions by
record.  It also lets the trained factor change from step to step at no cost: hooks live for one
step, parameters never require a gradient, and autograd never forms a summed weight gradient.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .clipping import clip_and_sum
from .guards import EngineError, check_losses, locate_linear_parameters, refuse_training_batchnorm


@dataclasses.dataclass
class _Capture:
    """What one layer showed during one forward and backward pass."""

    inputs: Tensor | None = None
    grad_outputs: Tensor | None = None


class HookEngine:
    """Computes clipped sums of per-record gradients of chosen adapter tensors.

    Parameters
    ----------
    model : nn.Module
        The model; all its parameters must have ``requires_grad = False`` (the engine makes the
        graph it needs), BatchNorm must not be in training mode.
    adapter : mapping of str to nn.Parameter
        The tensors that a step may train, by name.  Each must be the weight or bias of exactly
        one ``nn.Linear`` of the model.

    Raises
    ------
    EngineError
        If a tensor does not belong to one ``nn.Linear``, or parameters require gradients.
    """

    def __init__(self, model: nn.Module, adapter: Mapping[str, nn.Parameter]) -> None:
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        if trainable:
            raise EngineError(
                f"parameters must not require gradients under the hook engine, but {trainable[0]}"
                f" (and {len(trainable) - 1} more) do"
            )
        self._model = model
        self._places = locate_linear_parameters(model, adapter)

    def per_record_gradients(
        self, active: Collection[str], losses: Callable[[], Tensor], num_records: int
    ) -> dict[str, Tensor]:
        """Gradients of each record's own loss, for the active tensors only.

        Parameters
        ----------
        active : collection of str
            Names of the tensors this step trains.
        losses : callable
            Runs the model once on the batch and returns the records' losses, (n,); each must
            depend on its own record only.
        num_records : int
            n >= 1, the true number of records in the batch.

        Returns
        -------
        dict of str to Tensor
            (n, *shape of the parameter) each, float32, in the order of ``active``.

        Raises
        ------
        EngineError
            If a layer fires twice or not at all, its positions do not divide by n, the losses
            are not one per record, or BatchNorm is in training mode.
        """
        refuse_training_batchnorm(self._model)
        captures: dict[nn.Linear, _Capture] = {}
        for name in active:
            captures.setdefault(self._places[name].module, _Capture())
        with self._hooks(captures), torch.enable_grad():
            values = losses()
            check_losses(values, num_records)
            if captures and not values.requires_grad:
                raise EngineError(f"none of the layers of {sorted(active)} took part in the loss")
            values.sum().backward()  # type: ignore[no-untyped-call]
        with torch.autocast(values.device.type, enabled=False):  # rows are float32 in any case
            return {name: self._row(name, captures, num_records) for name in active}

    def clipped_sum(
        self,
        active: Collection[str],
        losses: Callable[[], Tensor],
        num_records: int,
        max_grad_norm: float,
    ) -> dict[str, Tensor]:
        """Sum over the batch of jointly clipped per-record gradients of the active tensors.

        Parameters as in :meth:`per_record_gradients`; ``num_records`` may be 0, for which the
        model is not run and the sum is zero.  ``max_grad_norm`` is C.

        Returns
        -------
        dict of str to Tensor
            One tensor of its parameter's shape per active name, float32.

        Notes
        -----
        Formal guarantee: that of :func:`~privacy.clipping.clip_and_sum`, over adapters and
        head jointly.  Assumes that records do not meet inside the model or the loss; see
        :func:`~privacy.guards.check_engine`, which tests it on made-up records.
        """
        if num_records == 0:
            return {name: self._zeros(name) for name in active}
        return clip_and_sum(self.per_record_gradients(active, losses, num_records), max_grad_norm)

    def _zeros(self, name: str) -> Tensor:
        place = self._places[name]
        return torch.zeros_like(place.parameter, dtype=torch.float32, requires_grad=False)

    @contextlib.contextmanager
    def _hooks(self, captures: Mapping[nn.Linear, _Capture]) -> Iterator[None]:
        handles = [
            module.register_forward_hook(_make_hook(capture))
            for module, capture in captures.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _row(self, name: str, captures: Mapping[nn.Linear, _Capture], num_records: int) -> Tensor:
        place = self._places[name]
        capture = captures[place.module]
        if capture.inputs is None or capture.grad_outputs is None:
            raise EngineError(
                f"{name}: its layer took no part in the loss, so it would silently not train"
            )
        grads = _by_record(name, capture.grad_outputs, num_records)
        if place.kind == "bias":
            return grads.sum(dim=1)
        inputs = _by_record(name, capture.inputs, num_records)
        return torch.bmm(grads.transpose(1, 2), inputs)


def _make_hook(capture: _Capture) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def forward_hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if capture.inputs is not None:
            raise EngineError(
                f"a {type(module).__name__} with an active tensor ran twice in one pass (a shared "
                "layer, or activation checkpointing): its record norms would be split"
            )
        capture.inputs = args[0].detach()
        if not output.requires_grad:
            output.requires_grad_(True)  # the first active layer starts the graph

        def keep(grad: Tensor) -> None:
            capture.grad_outputs = grad.detach()

        output.register_hook(keep)  # type: ignore[no-untyped-call]
        return output

    return forward_hook


def _by_record(name: str, values: Tensor, num_records: int) -> Tensor:
    """View (..., d) as (n, positions, d); the batch must be the slowest dimension."""
    positions = values.shape[:-1].numel()
    if positions % num_records:
        raise EngineError(
            f"{name}: its layer saw {positions} positions, which does not divide by "
            f"{num_records} records"
        )
    return values.reshape(num_records, positions // num_records, values.shape[-1]).float()
