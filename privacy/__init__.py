"""Record-level differential privacy for LoRA factors: plan, accountant, sampler, clipping, noise.

Knows nothing of Flower, of strategies or of tasks; usable on its own.
"""

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
from .clipping import clip_and_sum, joint_norms
from .guards import EngineError, check_engine
from .hook_engine import HookEngine
from .low_pass import binomial_low_pass
from .mechanism import PrivateGradient, privatize
from .plan import PrivacyPlan, StepKind
from .randomness import RandomSource, SecureSource, SeededTestSource, coins, standard_normal
from .sampling import PoissonSampler
from .settings import PrivacySettings

__all__ = [
    "AccountingError",
    "BudgetExhausted",
    "EngineError",
    "HookEngine",
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
    "clipped_sum_by_autograd",
    "coins",
    "cross_check",
    "joint_norms",
    "per_record_gradients_by_autograd",
    "pld_epsilon",
    "privatize",
    "prv_epsilon",
    "rdp_epsilon",
    "standard_normal",
]
