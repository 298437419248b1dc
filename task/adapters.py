"""LoRA on a backbone by PEFT: which layers, the seeded start, and the adapter's tensors by name."""

from __future__ import annotations

import math
import warnings
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from .backbones.backbone import Backbone, seeded_generator
from .errors import ModelError
from .settings import LoRASettings, split_list

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peft import PeftModel

_PEFT_PREFIX = "base_model.model."
_LORA_SUFFIXES = (".lora_A.weight", ".lora_B.weight")

USUAL_TARGETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "timm": ("attn.qkv", "attn.proj"),
        "bert": ("query", "value"),
        "camembert": ("query", "value"),
        "electra": ("query", "value"),
        "roberta": ("query", "value"),
        "xlm-roberta": ("query", "value"),
        "distilbert": ("q_lin", "v_lin"),
        "gemma": ("q_proj", "v_proj"),
        "llama": ("q_proj", "v_proj"),
        "mistral": ("q_proj", "v_proj"),
        "qwen2": ("q_proj", "v_proj"),
        "qwen3": ("q_proj", "v_proj"),
    }
)
"""Name endings of the layers that ``lora.target-modules = auto`` means, per family."""


def wrap_with_lora(backbone: Backbone, settings: LoRASettings, *, seed: int) -> PeftModel:
    """Add adapters to a backbone and give them their start: A seeded and Kaiming uniform, B zero.

    The head is always in ``modules_to_save``, so that an exported adapter carries it. No
    parameter requires a gradient afterwards. Torch's global random state stays as it was.

    Raises
    ------
    ModelError
        If a target is missing, is not linear, or PEFT wraps other layers than asked for.
    """
    from peft import LoraConfig, get_peft_model

    targets, suffixes = find_targets(backbone, settings.target_modules)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(suffixes),
        modules_to_save=list(backbone.heads),
        revision=backbone.revision or None,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT remarks that it replaces base_model_name_or_path; the right one is set below.
        warnings.filterwarnings("ignore", message=".*base_model_name_or_path.*")
        model: Any = get_peft_model(backbone.module, config)
    config.base_model_name_or_path = backbone.origin
    _check_wrapped(model, targets, backbone.heads)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            generator = seeded_generator(seed, name)
            start = torch.empty(parameter.shape)  # drawn on the CPU: the same on every device
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
            with torch.no_grad():
                parameter.copy_(start)
        elif ".lora_B." in name:
            nn.init.zeros_(parameter)
    return cast("PeftModel", model)


def find_targets(backbone: Backbone, wanted: str) -> tuple[frozenset[str], tuple[str, ...]]:
    """Find the linear layers that ``lora.target-modules`` means, the head's left out.

    Parameters
    ----------
    backbone : Backbone
        Where to look.
    wanted : str
        ``"auto"`` or comma-separated name endings.

    Returns
    -------
    names : frozenset of str
        Full names of the layers.
    suffixes : tuple of str
        The endings, for PEFT.
    """
    modules = {name: m for name, m in backbone.module.named_modules() if not backbone.in_head(name)}
    linear = sorted({_ending(n) for n, m in modules.items() if isinstance(m, nn.Linear)})
    known = f"the linear layers here end in {', '.join(linear)}"
    auto = wanted.strip() == "auto"
    suffixes = USUAL_TARGETS.get(backbone.family, ()) if auto else split_list(wanted)
    names: set[str] = set()
    for suffix in suffixes:
        found = {n for n in modules if n == suffix or n.endswith(f".{suffix}")}
        if not found:
            raise ModelError(f"lora.target-modules: no layer's name ends in {suffix!r}; {known}")
        for name in sorted(found):
            if not isinstance(modules[name], nn.Linear):
                raise ModelError(
                    f"lora.target-modules: {suffix!r} also means {name}, a "
                    f"{type(modules[name]).__name__}; accepted are linear layers; {known}"
                )
        names |= found
    if not names:
        raise ModelError(
            f"lora.target-modules is 'auto', but nothing is known about the family "
            f"{backbone.family!r}; name them: {known}"
        )
    return frozenset(names), suffixes


def adapter_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """Map the names that PEFT saves to the live parameters, in PEFT's order.

    Raises
    ------
    ModelError
        If a saved tensor is not a parameter, or an adapter parameter would not be saved.
    """
    from peft import get_peft_model_state_dict

    by_address = {p.data_ptr(): (name, p) for name, p in model.named_parameters()}
    # Without this flag PEFT asks the hub whether the vocabulary was resized.
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    result: dict[str, nn.Parameter] = {}
    reached: set[str] = set()
    for name, tensor in saved.items():
        full, parameter = by_address.get(tensor.data_ptr(), ("", None))
        if parameter is None or parameter.shape != tensor.shape:
            raise ModelError(f"PEFT would save {name}, which is not a parameter of the model")
        if ".lora_" in full and not name.endswith(_LORA_SUFFIXES):
            raise ModelError(f"PEFT would save {name}; accepted are lora_A.weight, lora_B.weight")
        result[name] = parameter
        reached.add(full)
    lost = [
        name
        for name, _ in model.named_parameters()
        if (".lora_" in name or ".modules_to_save." in name) and name not in reached
    ]
    if lost:
        raise ModelError(f"PEFT would not save the adapter parameters {', '.join(lost[:5])}")
    return result


def is_lora(name: str) -> bool:
    """Tell a LoRA factor from a head's tensor by its saved name."""
    return name.endswith(_LORA_SUFFIXES)


def _check_wrapped(model: Any, targets: frozenset[str], heads: tuple[str, ...]) -> None:
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    for kind, wanted in ((LoraLayer, targets), (ModulesToSaveWrapper, frozenset(heads))):
        found = {
            name.removeprefix(_PEFT_PREFIX)
            for name, module in model.named_modules()
            if isinstance(module, kind)
        }
        if found != wanted:
            odd = ", ".join(sorted(found ^ wanted)[:5])
            raise ModelError(f"PEFT wrapped other layers than asked for; the difference: {odd}")


def _ending(name: str) -> str:
    """Return the last name, with its parent's unless that is a number: ``attn.qkv``."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return ".".join(parts[-2:])
