"""Which engine computes clipped sums: ``privacy.engine``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, Protocol

from torch import Tensor, nn

EngineKind = Literal["fused", "hooks", "opacus"]


class GradientEngine(Protocol):
    """What every engine can do; see :class:`~privacy.hook_engine.HookEngine`."""

    def per_record_gradients(
        self, active: Collection[str], losses: Callable[[], Tensor], num_records: int
    ) -> dict[str, Tensor]:
        """Gradients (n, *shape) of each record's own loss."""
        ...

    def clipped_sum(
        self,
        active: Sequence[str],
        losses: Callable[[], Tensor],
        num_records: int,
        max_grad_norm: float,
    ) -> dict[str, Tensor]:
        """Sum of per-record gradients, each clipped to ``max_grad_norm``."""
        ...


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
