"""Flower strategies that federate LoRA adapters, one active set of factors per round.

Knows nothing of models, data or noise; any Flower app can use a strategy on its own.
"""

from .as_lora import ASLoRA
from .base import PRIVACY_KEY, ROUND_PLAN_KEY, LoRAStrategy
from .dp_lora import DPLoRA
from .ffa_lora import FFALoRA
from .la_lora import LALoRA
from .nodes import NotEnoughNodes
from .replies import InvalidReply
from .report import RoundReport, payload_bytes
from .ro_lora import RoLoRA
from .round_plan import Mode, RoundPlan
from .settings import StrategySettings
from .tensor_names import kind_of, layer_of, layers_of

STRATEGIES: dict[str, type[LoRAStrategy]] = {
    strategy.name: strategy for strategy in (DPLoRA, FFALoRA, RoLoRA, LALoRA, ASLoRA)
}

__all__ = [
    "PRIVACY_KEY",
    "ROUND_PLAN_KEY",
    "STRATEGIES",
    "ASLoRA",
    "DPLoRA",
    "FFALoRA",
    "InvalidReply",
    "LALoRA",
    "LoRAStrategy",
    "Mode",
    "NotEnoughNodes",
    "RoLoRA",
    "RoundPlan",
    "RoundReport",
    "StrategySettings",
    "kind_of",
    "layer_of",
    "layers_of",
    "payload_bytes",
]
