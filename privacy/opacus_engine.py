"""Per-record gradients by Opacus: the library's way, with refusals where it would be wrong."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from .guards import EngineError, check_losses, refuse_trainable, refuse_training_batchnorm
from .hook_engine import HookEngine
from .record_gradients import Rows
from .record_pass import RecordPass

# What Opacus leaves on parameters and layers when a step fails between forward and backward.
_ON_PARAMETERS = ("grad_sample", "_current_grad_sample", "_forward_counter")
_ON_LAYERS = ("activations", "max_batch_len")
_CPU_MEMORY = "DefaultCPUAllocator"


class OpacusEngine(HookEngine):
    """As :class:`~privacy.hook_engine.HookEngine`, with Opacus computing the gradients.

    Opacus takes dimension 0 of a layer's input for the records.  Where that is not so (Swin's
    windows), and where a layer runs again (shared layers, activation checkpointing), this engine
    refuses: Opacus itself may give rows that are not per record, without an error.

    Parameters
    ----------
    model : nn.Module
        As for the hook engine.  Only within a step do the active tensors require gradients.
    adapter : mapping of str to nn.Parameter
        The tensors that a step may train, by name.

    Raises
    ------
    EngineError
        As for the hook engine.

    Notes
    -----
    Formal guarantee: that of :func:`~privacy.clipping.clip_and_sum`, over adapters and head
    jointly.  Assumes that records do not meet inside the model or the loss; see
    :func:`~privacy.guards.check_engine`, which tests it on made-up records.
    """

    def _run(
        self, active: Collection[str], losses: Callable[[], Tensor], num_records: int
    ) -> RecordPass:
        refuse_training_batchnorm(self._model)
        refuse_trainable(self._model)
        record_pass = RecordPass(active, num_records)
        parameters = {name: self._places[name].parameter for name in active}
        with self._wrapped(active), torch.enable_grad():
            values = losses()
            check_losses(values, num_records)
            if parameters and not values.requires_grad:
                raise EngineError(f"none of the layers of {sorted(active)} took part in the loss")
            for name, parameter in parameters.items():
                if _forward_runs(parameter) > 1:
                    raise EngineError(
                        f"{name}: its layer ran twice in one pass (it is shared), so Opacus would "
                        "add up what it cannot tell apart"
                    )
            _backward(values)
            for name, parameter in parameters.items():
                rows = _rows(name, parameter, num_records)
                record_pass.gradients[name] = Rows(rows)
        return record_pass

    @contextlib.contextmanager
    def _wrapped(self, active: Collection[str]) -> Iterator[None]:
        """Let Opacus hook the layers of the active tensors, and leave no trace of it.

        Anew for each step: Opacus fixes its hooks when it wraps, and fails when a hooked layer's
        tensors change between trained and frozen.
        """
        places = [self._places[name] for name in active]
        layers: dict[nn.Linear, bool] = {p.module: p.module.training for p in places}
        hooks = None
        try:
            for place in places:
                place.parameter.requires_grad_(True)
            for layer in layers:
                layer.training = True  # Opacus records no layer in eval mode; no other effect.
            with _refusing():
                hooks = _Float32Hooks(self._model, loss_reduction="sum")
            yield
        finally:
            if hooks is not None:
                hooks.remove_hooks()
            for layer, training in layers.items():
                layer.training = training
                for attribute in _ON_LAYERS:
                    layer.__dict__.pop(attribute, None)
            for place in places:
                place.parameter.requires_grad_(False)
                place.parameter.grad = None  # The raw sum over records: no one may step on it.
                for attribute in _ON_PARAMETERS:
                    place.parameter.__dict__.pop(attribute, None)


class _Float32Hooks(GradSampleHooks):  # type: ignore[misc]
    """Opacus's hooks, with products in float32: in half precision norms would be rounded."""

    def capture_backprops_hook(self, *args: Any, **kwargs: Any) -> None:
        with torch.autocast(next(self._module.parameters()).device.type, enabled=False):
            super().capture_backprops_hook(*args, **kwargs)

    def rearrange_grad_samples(self, **kwargs: Any) -> tuple[list[Tensor], Tensor]:
        activations, backprops = super().rearrange_grad_samples(**kwargs)
        return [value.float() for value in activations], backprops.float()


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Turn Opacus's own errors, of several kinds, into this room's."""
    try:
        yield
    except (torch.OutOfMemoryError, EngineError):
        raise
    except (RuntimeError, ValueError, IndexError, AttributeError) as error:
        if _CPU_MEMORY in str(error):  # on the CPU torch raises a plain RuntimeError
            raise
        # Its type only: a text of somebody else's may quote anything.
        raise EngineError(
            f"Opacus cannot give this model's per-record gradients ({type(error).__name__}); "
            "another privacy.engine may"
        ) from error


def _backward(values: Tensor) -> None:
    with _refusing(), warnings.catch_warnings():
        # Layers whose input needs no gradient are told by it, which is right for them.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        values.sum().backward()  # type: ignore[no-untyped-call]


def _forward_runs(parameter: nn.Parameter) -> int:
    return int(parameter._forward_counter)  # type: ignore[attr-defined]


def _rows(name: str, parameter: nn.Parameter, num_records: int) -> Tensor:
    """Return one tensor's gradients (n, *shape) after the backward, or refuse them."""
    rows = getattr(parameter, "grad_sample", None)
    if isinstance(rows, list) or (
        _forward_runs(parameter) and hasattr(parameter, "_current_grad_sample")
    ):
        raise EngineError(
            f"{name}: its layer ran again in the backward pass (activation checkpointing), which "
            "Opacus cannot follow; another privacy.engine can"
        )
    if not isinstance(rows, Tensor):
        raise EngineError(
            f"{name}: its layer took no part in the loss, so it would silently not train"
        )
    if rows.shape != (num_records, *parameter.shape):
        raise EngineError(
            f"{name}: Opacus gave {rows.shape[0]} gradients for {num_records} records; the model "
            "puts other things than records first (as Swin's windows), and each would be clipped "
            "as if it were a record; another privacy.engine groups them by record"
        )
    return rows.detach()
