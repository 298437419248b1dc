"""One forward and backward pass in which layers report their records' gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .guards import EngineError, Place
from .record_gradients import RecordGradient, of_bias, of_weight


class RecordPass:
    """Collects the gradients of one pass, each active tensor's exactly once.

    Parameters
    ----------
    active : collection of str
        Names of the tensors that this step trains.
    num_records : int
        n >= 1, the true number of records.

    Attributes
    ----------
    gradients : dict of str to RecordGradient
        What was reported so far.
    anchor : Tensor
        A scalar that requires a gradient.  Given to the layers that report, it makes autograd
        run their backward though no parameter requires a gradient.
    """

    def __init__(self, active: Collection[str], num_records: int) -> None:
        self.active = frozenset(active)
        self.gradients: dict[str, RecordGradient] = {}
        self.anchor = torch.zeros((), requires_grad=True)
        self._num_records = num_records

    def report_weight(self, name: str, grads: Tensor, inputs: Tensor) -> None:
        """Take a linear weight's gradients: of the output (..., p) and the input (..., q)."""
        self._keep(name, of_weight(self.by_record(name, grads), self.by_record(name, inputs)))

    def report_bias(self, name: str, grads: Tensor) -> None:
        """Take a linear bias's gradients, from those (..., p) of the output."""
        self._keep(name, of_bias(self.by_record(name, grads)))

    def by_record(self, name: str, values: Tensor) -> Tensor:
        """View (..., d) as float32 (n, positions, d); the batch must be the slowest dimension.

        Raises
        ------
        EngineError
            If the positions do not divide by the records.
        """
        positions = values.shape[:-1].numel()
        if positions % self._num_records:
            raise EngineError(
                f"{name}: its layer saw {positions} positions, which does not divide by "
                f"{self._num_records} records"
            )
        shape = (self._num_records, positions // self._num_records, values.shape[-1])
        return values.detach().reshape(shape).float()

    def check_complete(self) -> None:
        """Refuse a pass in which an active tensor's layer did not report.

        Raises
        ------
        EngineError
            Naming the tensor.
        """
        for name in sorted(self.active - self.gradients.keys()):
            raise EngineError(
                f"{name}: its layer took no part in the loss, so it would silently not train"
            )

    def _keep(self, name: str, gradient: RecordGradient) -> None:
        if name in self.gradients:
            raise EngineError(
                f"{name}: its layer ran twice in one pass (it is shared), so its record norms "
                "would be split"
            )
        self.gradients[name] = gradient


class _Tap(torch.autograd.Function):
    """Hands a layer's output on, and reports the layer's input and output gradient.

    The input is saved the way autograd saves tensors, so that activation checkpointing drops and
    recomputes it, and an input changed in place is noticed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        inputs: Tensor,
        anchor: Tensor,
        report: Callable[[Tensor, Tensor], None],
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.report = report
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,) = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            ctx.report(grad, inputs)
        return (grad if ctx.needs_input_grad[0] else None), None, None, None


def tap(
    record_pass: RecordPass, places: Mapping[str, Place], inputs: Tensor, output: Tensor
) -> Tensor:
    """Make an ``nn.Linear`` report in this pass.

    Parameters
    ----------
    record_pass : RecordPass
        Who is told.
    places : mapping of str to Place
        The layer's active tensors by name.
    inputs, output : Tensor
        What the layer took and gave, (..., q) and (..., p).

    Returns
    -------
    Tensor
        What to hand on instead of ``output``; the same values.
    """

    def report(grads: Tensor, inputs: Tensor) -> None:
        for name, place in places.items():
            if place.kind == "bias":
                record_pass.report_bias(name, grads)
            else:
                record_pass.report_weight(name, grads, inputs)

    apply: Callable[..., Tensor] = _Tap.apply
    return apply(output, inputs.detach(), record_pass.anchor, report)


def tapping_hook(
    record_pass: RecordPass, places: Mapping[str, Place]
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """Return a forward hook that taps the layer it is registered on."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return tap(record_pass, places, args[0], output)

    return hook
