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
from typing import Any

import torch
from torch import Tensor, nn

# Pure functions of one tensor, whose autograd keeps their input (where that needs a gradient).
# These very classes: a subclass may do anything.
_KINDS = frozenset({nn.LayerNorm, nn.RMSNorm, nn.GELU, nn.SiLU})
_ACTIVATIONS_OF_TRANSFORMERS = "transformers.activations"
_NORMS_OF_TIMM = ("timm.layers.norm", frozenset({"LayerNorm", "RmsNorm"}))


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
        self._made: dict[int, tuple[weakref.ref[Tensor], tuple[int, int], Recipe]] = {}

    def recipe_of(self, x: Tensor) -> Recipe | None:
        """Return how to make a tensor again; ``None`` if it came from elsewhere."""
        made = self._made.get(id(x))
        # An id can be another tensor's by now, and a tensor can have been changed in place.
        if made is None or made[0]() is not x:
            return None
        _, versions, recipe = made
        return recipe if versions == (x._version, recipe.source._version) else None

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Watch the model's cheap modules in the ``with`` block."""
        with contextlib.ExitStack() as undo:
            for module in model.modules():
                if _is_cheap(module):
                    module.__dict__["forward"] = self._watched(module)
                    undo.callback(module.__dict__.pop, "forward", None)
            yield

    def _watched(self, module: nn.Module) -> Callable[..., Tensor]:
        forward = type(module).forward

        def watched(*args: Any, **kwargs: Any) -> Tensor:
            x: Tensor = forward(module, *args, **kwargs)
            if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
                self._note(module, args[0], x)
            return x

        return watched

    def _note(self, module: nn.Module, source: Tensor, x: Tensor) -> None:
        kind = source.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key, made = id(x), self._made

        def forget(_: weakref.ref[Tensor]) -> None:
            made.pop(key, None)  # with it goes the hold on the source

        versions = x._version, source._version
        made[key] = weakref.ref(x, forget), versions, Recipe(module, source, dtype)


def _is_cheap(module: nn.Module) -> bool:
    kind = type(module)
    home, name = kind.__module__, kind.__name__
    known = kind in _KINDS or home == _ACTIVATIONS_OF_TRANSFORMERS
    known |= home == _NORMS_OF_TIMM[0] and name in _NORMS_OF_TIMM[1]
    known |= home.startswith("transformers.models.") and name.endswith("RMSNorm")
    # Somebody else's forward on the instance, or one that works in place, is left alone.
    return known and "forward" not in module.__dict__ and not getattr(module, "inplace", False)
