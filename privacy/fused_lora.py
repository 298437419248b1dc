"""A LoRA layer as one operation: no autograd graph for the adapter, no stored temporaries.

PEFT computes ``x W' + s (x A') B'`` (a prime is a transpose) as five operations, each of which
reads and writes the activations.  Here the forward is one product with ``W + s B A`` and the
backward one product with the same matrix, plus the active factor's gradients in closed form: with
g the gradient of the layer's output, a record's is ``s g' (x A')`` for B and ``s (g B)' x`` for A.
A step on B therefore keeps ``x A'``, of width r, and not ``x``; one on A keeps x only where x is
not quickly made again (:mod:`privacy.cheap_inputs`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cheap_inputs import CheapInputs, Recipe
from .record_pass import RecordPass

_PEFT_LINEAR = ("peft.tuners.lora.layer", "Linear")


@dataclasses.dataclass(frozen=True)
class FusedLoRA:
    """A LoRA layer of PEFT that can be computed in one operation.

    Parameters
    ----------
    layer : nn.Module
        PEFT's ``lora.Linear``.
    adapter : str
        Its active adapter.
    name_a, name_b : str
        Names of the factors; empty for one that is never trained.
    """

    layer: Any
    adapter: str
    name_a: str
    name_b: str

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A (r, q) and B (p, r)."""
        lora = self.layer.lora_A[self.adapter], self.layer.lora_B[self.adapter]
        return lora[0].weight, lora[1].weight

    @property
    def a(self) -> Tensor:
        """A, (r, q)."""
        return self.factors[0].detach()

    @property
    def scaled_b(self) -> Tensor:
        """The factor s B, (p, r)."""
        return self.factors[1].detach() * self.scaling

    @property
    def base(self) -> nn.Linear:
        """The frozen layer: W (p, q) and perhaps a bias."""
        return self.layer.base_layer  # type: ignore[no-any-return]

    @property
    def scaling(self) -> float:
        """PEFT's factor s on B A."""
        return float(self.layer.scaling[self.adapter])

    def usable(self) -> bool:
        """Whether PEFT would compute this plain adapter now; models change between steps."""
        if self.layer.merged or self.layer.disable_adapters:
            return False
        return list(self.layer.active_adapters) == [self.adapter] and not why_not_fused(self.layer)

    def forward(self, record_pass: RecordPass, cheap: CheapInputs, x: Tensor) -> Tensor:
        """Compute the layer for inputs (..., q); report to the pass in the backward."""
        trains_a, trains_b = (n in record_pass.active for n in (self.name_a, self.name_b))
        anchor = record_pass.anchor if trains_a or trains_b else None
        recipe = cheap.recipe_of(x) if trains_a else None
        apply: Callable[..., Tensor] = _FusedLinear.apply
        return apply(x, anchor, self, record_pass, recipe, trains_a, trains_b)


def why_not_fused(layer: nn.Module) -> str:
    """Say why a layer cannot be computed in one operation; empty if it can.

    Parameters
    ----------
    layer : nn.Module
        A layer that owns factors of LoRA.
    """
    kind = type(layer)
    if (kind.__module__, kind.__qualname__) != _PEFT_LINEAR:
        return f"{kind.__qualname__} is not PEFT's plain LoRA linear layer"
    peft: Any = layer
    base, adapters = peft.base_layer, peft.active_adapters
    if type(base) is not nn.Linear:
        return f"its base layer is a {type(base).__qualname__}"
    if type(base.weight) is not nn.Parameter or base.weight.dtype != torch.float32:
        return f"its base weight is a {type(base.weight).__qualname__} of {base.weight.dtype}"
    if len(adapters) != 1 or adapters[0] not in peft.lora_A:
        return f"its active adapters are {list(adapters)}"
    adapter = adapters[0]
    if peft.lora_variant.get(adapter) is not None:
        return f"it is a variant of LoRA ({type(peft.lora_variant[adapter]).__qualname__})"
    dropout = peft.lora_dropout[adapter]
    if not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0) != 0:
        return "it has adapter dropout"
    factors = peft.lora_A[adapter], peft.lora_B[adapter]
    for factor in factors:
        if type(factor) is not nn.Linear or factor.bias is not None:
            return "its factors are not plain matrices"
        if factor.weight.dtype != torch.float32:
            return f"its factors are {factor.weight.dtype}"
    if any(_is_listened_to(module) for module in (base, *factors)):
        return "hooks are registered inside it"
    if any("forward" in vars(module) for module in (layer, base, *factors)):
        return "its forward was replaced on the instance"
    return ""


def _is_listened_to(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks
    return any(hooks) or bool(module._backward_pre_hooks)


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor | None,
        fused: FusedLoRA,
        record_pass: RecordPass,
        recipe: Recipe | None,
        trains_a: bool,
        trains_b: bool,
    ) -> Tensor:
        dtype = _compute_dtype(x)
        base, a, scaled_b = fused.base, fused.a.to(dtype), fused.scaled_b.to(dtype)
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        bias = None if base.bias is None else base.bias.to(dtype)
        merged = _merging_pays(dtype, flat.shape[0], *base.weight.shape)
        with torch.autocast(x.device.type, enabled=False):
            thin = flat @ a.t() if not merged or (trains_b and not trains_a) else None
            if thin is None or merged:
                y = F.linear(flat, torch.addmm(base.weight, scaled_b, a), bias)
            else:
                y = F.linear(flat, base.weight.to(dtype), bias).addmm_(thin, scaled_b.t())
        # A step on B needs x A' only, one on A needs x, or what x is quickly made from.
        kept = None if not trains_a else flat if recipe is None else recipe.source.detach()
        ctx.save_for_backward(kept, thin if trains_b and not trains_a else None)
        ctx.make_x = None if recipe is None else recipe.without_source()
        ctx.fused, ctx.record_pass, ctx.merged = fused, record_pass, merged
        ctx.trains, ctx.x_shape, ctx.x_dtype = (trains_a, trains_b), x.shape, x.dtype
        # Not a view to autograd: a layer's output may be changed in place by what follows.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, thin = ctx.saved_tensors
        if ctx.make_x is not None:
            flat = ctx.make_x(flat).reshape(-1, ctx.x_shape[-1]).to(grad.dtype)
        fused: FusedLoRA = ctx.fused
        trains_a, trains_b = ctx.trains
        weight = fused.base.weight
        with torch.autocast(grad.device.type, enabled=False):
            g = grad.reshape(-1, grad.shape[-1])
            a, scaled_b = fused.a.to(g.dtype), fused.scaled_b.to(g.dtype)
            if trains_b:
                # s B A: the factor s of B's gradient is put on its thin side.
                thin = (flat @ a.t() if thin is None else thin) * fused.scaling
                _report(ctx, fused.name_b, g, thin)
            # Faster than g @ scaled_b.
            g_b = F.linear(g, scaled_b.t().contiguous()) if trains_a or not ctx.merged else None
            if trains_a and g_b is not None:
                _report(ctx, fused.name_a, g_b, flat)
            if not ctx.needs_input_grad[0]:
                return (None,) * 7
            if g_b is None or ctx.merged:
                dx = g @ torch.addmm(weight, scaled_b, a)
            else:
                dx = (g @ weight.to(g.dtype)).addmm_(g_b, a)
        return dx.view(ctx.x_shape).to(ctx.x_dtype), None, None, None, None, None, None


def _report(ctx: Any, name: str, grads: Tensor, inputs: Tensor) -> None:
    # The positions, flat here, are those of x: records are its slowest dimension.
    ctx.record_pass.report_weight(name, grads, inputs)


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32


def _merging_pays(dtype: torch.dtype, positions: int, p: int, q: int) -> bool:
    """Whether forming ``W + s B A`` twice moves less memory than two thin products more.

    Never in half precision: an adapter's small changes would be rounded away beside W.
    """
    return dtype == torch.float32 and positions * (p + q) >= 2 * p * q
