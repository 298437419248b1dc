"""Differential privacy for LoRA factors, of records and of clients: plans, accountants, noise.

Knows nothing of Flower, of strategies or of tasks; usable on its own. Public names are
imported when they are first asked for, so that settings can be checked without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .accounting import (
        AccountingError,
        calibrate_noise_multiplier,
        cross_check,
        pld_epsilon,
        prv_epsilon,
        rdp_epsilon,
    )
    from .autograd_reference import clipped_sum_by_autograd, per_record_gradients_by_autograd
    from .budget import BudgetExhausted, StepBudget
    from .client_level import ClientLevelMechanism, ClientLevelPlan, clip_update
    from .clipping import clip_and_sum, joint_norms
    from .discrete_gaussian import sample_discrete_gaussian
    from .distributed_noise import DistributedMechanism, DistributedPlan
    from .engines import GradientEngine, make_engine
    from .fused_engine import FusedEngine
    from .guards import EngineError, check_engine
    from .hook_engine import HookEngine
    from .low_pass import binomial_low_pass
    from .mechanism import PrivateGradient, privatize
    from .opacus_engine import OpacusEngine
    from .plan import PrivacyPlan, StepKind
    from .randomness import RandomSource, SecureSource, SeededTestSource, coins, standard_normal
    from .sampling import PoissonSampler
    from .settings import PrivacySettings
    from .zcdp import composed_epsilon, sampled_rdp, zcdp_epsilon

_HOMES = {
    "AccountingError": "accounting",
    "BudgetExhausted": "budget",
    "ClientLevelMechanism": "client_level",
    "ClientLevelPlan": "client_level",
    "DistributedMechanism": "distributed_noise",
    "DistributedPlan": "distributed_noise",
    "EngineError": "guards",
    "FusedEngine": "fused_engine",
    "GradientEngine": "engines",
    "HookEngine": "hook_engine",
    "OpacusEngine": "opacus_engine",
    "PoissonSampler": "sampling",
    "PrivacyPlan": "plan",
    "PrivacySettings": "settings",
    "PrivateGradient": "mechanism",
    "RandomSource": "randomness",
    "SecureSource": "randomness",
    "SeededTestSource": "randomness",
    "StepBudget": "budget",
    "StepKind": "plan",
    "binomial_low_pass": "low_pass",
    "calibrate_noise_multiplier": "accounting",
    "check_engine": "guards",
    "clip_and_sum": "clipping",
    "clip_update": "client_level",
    "clipped_sum_by_autograd": "autograd_reference",
    "coins": "randomness",
    "composed_epsilon": "zcdp",
    "cross_check": "accounting",
    "joint_norms": "clipping",
    "make_engine": "engines",
    "per_record_gradients_by_autograd": "autograd_reference",
    "pld_epsilon": "accounting",
    "privatize": "mechanism",
    "prv_epsilon": "accounting",
    "rdp_epsilon": "accounting",
    "sample_discrete_gaussian": "discrete_gaussian",
    "sampled_rdp": "zcdp",
    "standard_normal": "randomness",
    "zcdp_epsilon": "zcdp",
}

__all__ = [
    "AccountingError",
    "BudgetExhausted",
    "ClientLevelMechanism",
    "ClientLevelPlan",
    "DistributedMechanism",
    "DistributedPlan",
    "EngineError",
    "FusedEngine",
    "GradientEngine",
    "HookEngine",
    "OpacusEngine",
    "PoissonSampler",
    "PrivacyPlan",
    "PrivacySettings",
    "PrivateGradient",
    "RandomSource",
    "SecureSource",
    "SeededTestSource",
    "StepBudget",
    "StepKind",
    "binomial_low_pass",
    "calibrate_noise_multiplier",
    "check_engine",
    "clip_and_sum",
    "clip_update",
    "clipped_sum_by_autograd",
    "coins",
    "composed_epsilon",
    "cross_check",
    "joint_norms",
    "make_engine",
    "per_record_gradients_by_autograd",
    "pld_epsilon",
    "privatize",
    "prv_epsilon",
    "rdp_epsilon",
    "sample_discrete_gaussian",
    "sampled_rdp",
    "standard_normal",
    "zcdp_epsilon",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
