"""Layer inputs that need not be kept, since what they were made from is kept anyway.

A step on A needs each layer's input x in the backward pass.  Where x came out of a LayerNorm or
an activation, autograd keeps that module's own input for *its* backward, and x follows from it at
the cost of one pass over the numbers: next to the layer's products that is little, and most of
what a step on A would keep on top of the frozen backbone goes away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

# Pure functions of one tensor, whose autograd keeps their input.
_KINDS: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.RMSNorm, nn.GELU, nn.SiLU)
_ACTIVATIONS_OF_TRANSFORMERS = "transformers.activations"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to make a tensor again.

    Parameters
    ----------
    module : nn.Module
        What made it.
    source : Tensor
        Of what.
    autocast : torch.dtype, optional
        Of the autocast that it was made under, if any.
    """

    module: nn.Module
    source: Tensor
    autocast: torch.dtype | None

    def without_source(self) -> Callable[[Tensor], Tensor]:
        """Return the function alone, so that autograd can keep the source its own way."""
        module, dtype = self.module, self.autocast

        def make(source: Tensor) -> Tensor:
            kind = source.device.type
            with torch.no_grad(), torch.autocast(kind, dtype, enabled=dtype is not None):
                made: Tensor = type(module).forward(module, source)
            return made

        return make


class CheapInputs:
    """Remembers, during one forward pass, which tensors came from which cheap module."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[weakref.ref[Tensor], int, Recipe]] = {}

    def recipe_of(self, x: Tensor) -> Recipe | None:
        """Return how to make a tensor again; ``None`` if it came from elsewhere."""
        made = self._made.get(id(x))
        # An id can be another tensor's by now, and a tensor can have been changed in place.
        if made is None or made[0]() is not x or made[1] != x._version:
            return None
        return made[2]

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Watch the model's cheap modules in the ``with`` block."""
        with contextlib.ExitStack() as undo:
            for module in model.modules():
                if _is_cheap(module):
                    module.__dict__["forward"] = self._watched(module)
                    undo.callback(module.__dict__.pop, "forward", None)
            yield

    def _watched(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        forward = type(module).forward

        def watched(source: Tensor) -> Tensor:
            x: Tensor = forward(module, source)
            kind = source.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            key, made = id(x), self._made

            def forget(_: weakref.ref[Tensor]) -> None:
                made.pop(key, None)  # with it goes the hold on the source

            made[key] = weakref.ref(x, forget), x._version, Recipe(module, source, dtype)
            return x

        return watched


def _is_cheap(module: nn.Module) -> bool:
    kind = type(module)
    known = isinstance(module, _KINDS) or kind.__module__ == _ACTIVATIONS_OF_TRANSFORMERS
    if not known and kind.__name__.endswith("RMSNorm"):
        known = kind.__module__.startswith("transformers.")
    # Somebody else's forward on the instance, or one that works in place, is left alone.
    return known and "forward" not in module.__dict__ and not getattr(module, "inplace", False)
