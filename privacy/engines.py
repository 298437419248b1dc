"""Which engine computes clipped sums: ``privacy.engine``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

from torch import nn

from .guards import Engine
from .virtual_batches import ClippingEngine

EngineKind = Literal["fused", "hooks", "opacus"]


class GradientEngine(Engine, ClippingEngine, Protocol):
    """What every engine can do; see :class:`~privacy.hook_engine.HookEngine`."""


def make_engine(
    kind: EngineKind, model: nn.Module, adapter: Mapping[str, nn.Parameter]
) -> GradientEngine:
    """Make an engine for a model.

    Parameters
    ----------
    kind : {"fused", "hooks", "opacus"}
        ``fused``: LoRA layers as one operation, others by hooks.  ``hooks``: all by hooks.
        ``opacus``: Opacus's own hooks, which are refused where they would be wrong.
    model : nn.Module
        The model; no parameter may require a gradient.
    adapter : mapping of str to nn.Parameter
        The tensors that a step may train, by name.

    Raises
    ------
    EngineError
        If the model is not one for which per-record clipping would hold.
    """
    if kind == "opacus":
        from .opacus_engine import OpacusEngine

        return OpacusEngine(model, adapter)
    from .fused_engine import FusedEngine
    from .hook_engine import HookEngine

    return (FusedEngine if kind == "fused" else HookEngine)(model, adapter)
