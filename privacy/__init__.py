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
        composed_epsilon,
        cross_check,
        pld_epsilon,
        prv_epsilon,
        rdp_epsilon,
    )
    from .asked_for import AskedFor
    from .autograd_reference import clipped_sum_by_autograd, per_record_gradients_by_autograd
    from .client_level import ClientLevelMechanism, ClientLevelPlan, clip_update
    from .clipping import clip_and_sum, joint_norms
    from .discrete_gaussian import sample_discrete_gaussian
    from .distributed_noise import DistributedMechanism, DistributedPlan
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
    from .zcdp import concentrated_epsilon, sampled_rdp, zcdp_epsilon

_HOMES = {
    "AccountingError": "accounting",
    "AskedFor": "asked_for",
    "BudgetExhausted": "ledger",
    "BudgetLimit": "privacy_filter",
    "Charge": "ledger",
    "ClientLevelMechanism": "client_level",
    "ClientLevelPlan": "client_level",
    "DataChanged": "ledger",
    "DatasetRules": "policy",
    "DistributedMechanism": "distributed_noise",
    "DistributedPlan": "distributed_noise",
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
    "clip_update": "client_level",
    "clipped_sum_by_autograd": "autograd_reference",
    "coins": "randomness",
    "composed_epsilon": "accounting",
    "concentrated_epsilon": "zcdp",
    "cross_check": "accounting",
    "joint_norms": "clipping",
    "make_engine": "engines",
    "noised_count": "mechanism",
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
    "AskedFor",
    "BudgetExhausted",
    "BudgetLimit",
    "Charge",
    "ClientLevelMechanism",
    "ClientLevelPlan",
    "DataChanged",
    "DatasetRules",
    "DistributedMechanism",
    "DistributedPlan",
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
    "clip_update",
    "clipped_sum_by_autograd",
    "coins",
    "composed_epsilon",
    "concentrated_epsilon",
    "cross_check",
    "joint_norms",
    "make_engine",
    "noised_count",
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
