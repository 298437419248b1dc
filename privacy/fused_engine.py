"""The engine that computes LoRA layers as one operation each; other layers by hooks."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from .cheap_inputs import CheapInputs
from .fused_lora import FusedLoRA, why_not_fused
from .hook_engine import HookEngine
from .record_pass import RecordPass

_LOGGER = logging.getLogger(__name__)
_FACTORS = ("lora_A", "lora_B")


class FusedEngine(HookEngine):
    """As :class:`~privacy.hook_engine.HookEngine`, with PEFT's LoRA layers fused.

    A layer that cannot be fused (adapter dropout, DoRA, quantised weights, another kind) is
    computed by PEFT and reports by hooks; this is logged once.  Heads report by hooks.

    Parameters
    ----------
    model : nn.Module
        As for the hook engine.  Between steps it is as it was: layers are fused while a step
        runs, by an attribute on each, and no parameter or hook is touched.
    adapter : mapping of str to nn.Parameter
        The tensors that a step may train, by name.

    Raises
    ------
    EngineError
        As for the hook engine.
    """

    def __init__(self, model: nn.Module, adapter: Mapping[str, nn.Parameter]) -> None:
        super().__init__(model, adapter)
        self._fused, self.not_fused = _find(model, adapter)
        if self.not_fused:
            name, reason = next(iter(self.not_fused.items()))
            _LOGGER.warning(
                "%d of %d LoRA layers take the general path, which is slower: %s (%s)",
                len(self.not_fused),
                len(self.not_fused) + len(self._fused),
                name,
                reason,
            )

    @property
    def num_fused(self) -> int:
        """How many LoRA layers are fused."""
        return len(self._fused)

    @contextlib.contextmanager
    def _listening(self, record_pass: RecordPass) -> Iterator[None]:
        fused = [layer for layer in self._fused if layer.usable()]
        theirs = {name for layer in fused for name in (layer.name_a, layer.name_b)}
        cheap = CheapInputs()
        with contextlib.ExitStack() as undo:
            if any(layer.name_a in record_pass.active for layer in fused):
                undo.enter_context(cheap.watching(self._model))
            undo.enter_context(self._hooks(record_pass, record_pass.active - theirs))
            for layer in fused:
                # An instance's attribute comes before its class's method: this is all it takes.
                layer.layer.__dict__["forward"] = _bind(layer, record_pass, cheap)
                undo.callback(layer.layer.__dict__.pop, "forward", None)
            yield


def _bind(
    layer: FusedLoRA, record_pass: RecordPass, cheap: CheapInputs
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return layer.forward(record_pass, cheap, x)

    return forward


def _find(
    model: nn.Module, adapter: Mapping[str, nn.Parameter]
) -> tuple[list[FusedLoRA], dict[str, str]]:
    """Find the layers that own LoRA factors: those to fuse, and why each other is not."""
    names = {id(parameter): name for name, parameter in adapter.items()}
    fused, others = [], {}
    for path, module in model.named_modules():
        if not all(isinstance(getattr(module, f, None), nn.ModuleDict) for f in _FACTORS):
            continue
        if reason := why_not_fused(module):
            others[path] = reason
            continue
        layer = FusedLoRA(module, module.active_adapters[0], "", "")
        name_a, name_b = (names.get(id(each), "") for each in layer.factors)
        if name_a or name_b:
            fused.append(dataclasses.replace(layer, name_a=name_a, name_b=name_b))
    return fused, others
