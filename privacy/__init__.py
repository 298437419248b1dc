"""Record-level differential privacy for LoRA factors: plan, accountant, sampler, clipping, noise.

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
        composed_epsilon,
        cross_check,
        pld_epsilon,
        prv_epsilon,
        rdp_epsilon,
    )
    from .asked_for import AskedFor
    from .autograd_reference import clipped_sum_by_autograd, per_record_gradients_by_autograd
    from .clipping import clip_and_sum, joint_norms
    from .engines import GradientEngine, make_engine
    from .fused_engine import FusedEngine
    from .guards import EngineError, check_engine
    from .hook_engine import HookEngine
    from .ledger import (
        BudgetExhausted,
        Charge,
        DataChanged,
        Ledger,
        LedgerError,
        LedgerRolledBack,
        PlanChanged,
        Request,
    )
    from .low_pass import binomial_low_pass
    from .mechanism import PrivateGradient, noised_count, privatize
    from .opacus_engine import OpacusEngine
    from .plan import PrivacyPlan, StepKind
    from .policy import DatasetRules, PolicyError, PolicyRefusal, SitePolicy
    from .privacy_filter import BudgetLimit, Spending
    from .randomness import RandomSource, SecureSource, SeededTestSource, coins, standard_normal
    from .sampling import PoissonSampler
    from .settings import PrivacySettings

_HOMES = {
    "AccountingError": "accounting",
    "AskedFor": "asked_for",
    "BudgetExhausted": "ledger",
    "BudgetLimit": "privacy_filter",
    "Charge": "ledger",
    "DataChanged": "ledger",
    "DatasetRules": "policy",
    "EngineError": "guards",
    "FusedEngine": "fused_engine",
    "GradientEngine": "engines",
    "HookEngine": "hook_engine",
    "Ledger": "ledger",
    "LedgerError": "ledger",
    "LedgerRolledBack": "ledger",
    "OpacusEngine": "opacus_engine",
    "PlanChanged": "ledger",
    "PoissonSampler": "sampling",
    "PolicyError": "policy",
    "PolicyRefusal": "policy",
    "PrivacyPlan": "plan",
    "PrivacySettings": "settings",
    "PrivateGradient": "mechanism",
    "RandomSource": "randomness",
    "Request": "ledger",
    "SecureSource": "randomness",
    "SeededTestSource": "randomness",
    "SitePolicy": "policy",
    "Spending": "privacy_filter",
    "StepKind": "plan",
    "binomial_low_pass": "low_pass",
    "calibrate_noise_multiplier": "accounting",
    "check_engine": "guards",
    "clip_and_sum": "clipping",
    "clipped_sum_by_autograd": "autograd_reference",
    "coins": "randomness",
    "composed_epsilon": "accounting",
    "cross_check": "accounting",
    "joint_norms": "clipping",
    "make_engine": "engines",
    "noised_count": "mechanism",
    "per_record_gradients_by_autograd": "autograd_reference",
    "pld_epsilon": "accounting",
    "privatize": "mechanism",
    "prv_epsilon": "accounting",
    "rdp_epsilon": "accounting",
    "standard_normal": "randomness",
}

__all__ = [
    "AccountingError",
    "AskedFor",
    "BudgetExhausted",
    "BudgetLimit",
    "Charge",
    "DataChanged",
    "DatasetRules",
    "EngineError",
    "FusedEngine",
    "GradientEngine",
    "HookEngine",
    "Ledger",
    "LedgerError",
    "LedgerRolledBack",
    "OpacusEngine",
    "PlanChanged",
    "PoissonSampler",
    "PolicyError",
    "PolicyRefusal",
    "PrivacyPlan",
    "PrivacySettings",
    "PrivateGradient",
    "RandomSource",
    "Request",
    "SecureSource",
    "SeededTestSource",
    "SitePolicy",
    "Spending",
    "StepKind",
    "binomial_low_pass",
    "calibrate_noise_multiplier",
    "check_engine",
    "clip_and_sum",
    "clipped_sum_by_autograd",
    "coins",
    "composed_epsilon",
    "cross_check",
    "joint_norms",
    "make_engine",
    "noised_count",
    "per_record_gradients_by_autograd",
    "pld_epsilon",
    "privatize",
    "prv_epsilon",
    "rdp_epsilon",
    "standard_normal",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
