"""Per-record gradients of adapter and head layers, reported by forward hooks.

Opacus takes dimension 0 of a layer's input for the batch.  Inside Swin's windows that dimension
is records x windows, and a record would be clipped window by window, up to as many times C as it
has windows.  This engine is told the true number of records and groups every layer's positions by
record.  It also lets the trained factor change from step to step at no cost: hooks live for one
step, parameters never require a gradient, and autograd never forms a summed weight gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .clipping import clip_and_sum
from .guards import (
    EngineError,
    Place,
    check_losses,
    locate_linear_parameters,
    refuse_trainable,
    refuse_training_batchnorm,
)
from .record_pass import RecordPass, tapping_hook


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
        self._model = model
        self._places = locate_linear_parameters(model, adapter)
        refuse_trainable(model)

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
            are not one per record, BatchNorm is in training mode, or a parameter has come to
            require a gradient (PEFT's switches do that).
        """
        gradients = self._run(active, losses, num_records).gradients
        return {name: gradients[name].rows() for name in active}

    def clipped_sum(
        self,
        active: Sequence[str],
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
        gradients = self._run(active, losses, num_records).gradients
        return clip_and_sum({name: gradients[name] for name in active}, max_grad_norm)

    def _run(
        self, active: Collection[str], losses: Callable[[], Tensor], num_records: int
    ) -> RecordPass:
        refuse_training_batchnorm(self._model)
        refuse_trainable(self._model)
        record_pass = RecordPass(active, num_records)
        with self._listening(record_pass), torch.enable_grad():
            values = losses()
            check_losses(values, num_records)
            if record_pass.active and not values.requires_grad:
                raise EngineError(f"none of the layers of {sorted(active)} took part in the loss")
            values.sum().backward()  # type: ignore[no-untyped-call]
        record_pass.check_complete()
        return record_pass

    def _zeros(self, name: str) -> Tensor:
        place = self._places[name]
        return torch.zeros_like(place.parameter, dtype=torch.float32, requires_grad=False)

    @contextlib.contextmanager
    def _listening(self, record_pass: RecordPass) -> Iterator[None]:
        """Make the layers of the active tensors report."""
        with self._hooks(record_pass, record_pass.active):
            yield

    @contextlib.contextmanager
    def _hooks(self, record_pass: RecordPass, names: Collection[str]) -> Iterator[None]:
        layers: dict[nn.Linear, dict[str, Place]] = {}
        for name in names:
            place = self._places[name]
            layers.setdefault(place.module, {})[name] = place
        handles = [
            module.register_forward_hook(tapping_hook(record_pass, places))
            for module, places in layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
