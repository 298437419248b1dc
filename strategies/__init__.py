"""Flower strategies that federate LoRA adapters, one active set of factors per round.

Knows nothing of models, data or noise; any Flower app can use a strategy on its own.
"""

from .as_lora import ASLoRA
from .base import ROUND_PLAN_KEY, LoRAStrategy
from .checkpoint import Checkpoint, CheckpointError, read_checkpoint
from .client_level import ClientLevel, ReleasedMean
from .client_scores import SCORES_KEY, GradientEnergies
from .dp_lora import DPLoRA
from .fed_svd import FedSVD
from .fedex_lora import FedExLoRA
from .ffa_lora import FFALoRA
from .flex_lora import FlexLoRA
from .flora import FLoRA
from .la_lora import LALoRA
from .loop import EarlyStopping
from .mods import active_factors, freeze_inactive
from .node_state import (
    WIRE_KEY,
    NeedFull,
    UnusableMessage,
    ask_for_everything,
    receive_adapter,
    update_records,
)
from .nodes import NotEnoughNodes
from .norm_bound import UpdateBound
from .replies import InvalidReply
from .reply_gate import PRIVACY_KEY
from .report import RoundReport, payload_bytes
from .ro_lora import RoLoRA
from .round_plan import Mode, RoundPlan
from .secure_aggregation import (
    SECURE_KEY,
    MaskLimits,
    ProtocolError,
    SecureAggregation,
    answer_stage,
    masked_records,
)
from .settings import StrategySettings, WireSettings
from .tensor_names import kind_of, layer_of, layers_of

STRATEGIES: dict[str, type[LoRAStrategy]] = {
    strategy.name: strategy
    for strategy in (
        DPLoRA,
        FFALoRA,
        RoLoRA,
        LALoRA,
        ASLoRA,
        FedSVD,
        FedExLoRA,
        FLoRA,
        FlexLoRA,
    )
}

__all__ = [
    "PRIVACY_KEY",
    "ROUND_PLAN_KEY",
    "SCORES_KEY",
    "SECURE_KEY",
    "STRATEGIES",
    "WIRE_KEY",
    "ASLoRA",
    "Checkpoint",
    "CheckpointError",
    "ClientLevel",
    "DPLoRA",
    "EarlyStopping",
    "FFALoRA",
    "FLoRA",
    "FedExLoRA",
    "FedSVD",
    "FlexLoRA",
    "GradientEnergies",
    "InvalidReply",
    "LALoRA",
    "LoRAStrategy",
    "MaskLimits",
    "Mode",
    "NeedFull",
    "NotEnoughNodes",
    "ProtocolError",
    "ReleasedMean",
    "RoLoRA",
    "RoundPlan",
    "RoundReport",
    "SecureAggregation",
    "StrategySettings",
    "UnusableMessage",
    "UpdateBound",
    "WireSettings",
    "active_factors",
    "answer_stage",
    "ask_for_everything",
    "freeze_inactive",
    "kind_of",
    "layer_of",
    "layers_of",
    "masked_records",
    "payload_bytes",
    "read_checkpoint",
    "receive_adapter",
    "update_records",
]
