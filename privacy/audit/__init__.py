"""Audit of a private client: lower bounds on epsilon, and tests of its contract.

A lower bound above the claimed epsilon proves a fault; one below it proves nothing.  Estimators
work on scores alone; :func:`recorded` and :class:`Canaries` bring canary gradients into the
production code of :mod:`privacy`.  ``python -m benchmarks.audit`` runs all of it against the
client.
"""

from __future__ import annotations

from .canaries import Canaries
from .contracts import (
    RISK,
    Finding,
    lower_bounds,
    noise_scale,
    sampling,
    sensitivity,
    unrelated,
)
from .one_run import (
    Guesses,
    accounted_epsilon_bound,
    best_bound,
    epsilon_bound,
    gaussian_epsilon_bound,
    guess,
    is_refuted,
    mu_bound,
    p_value_approximate_dp,
)
from .score_gap import epsilon_from_score_gap, mu_from_score_gap
from .tape import Injector, Silence, Tape, recorded
from .trade_off import (
    GaussianTradeOff,
    PrivacyProfile,
    TradeOff,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
)
from .two_world import clopper_pearson, epsilon_from_rates, threshold_bound

__all__ = [
    "RISK",
    "Canaries",
    "Finding",
    "GaussianTradeOff",
    "Guesses",
    "Injector",
    "PrivacyProfile",
    "Silence",
    "Tape",
    "TradeOff",
    "accounted_epsilon_bound",
    "best_bound",
    "clopper_pearson",
    "epsilon_bound",
    "epsilon_from_rates",
    "epsilon_from_score_gap",
    "gaussian_delta",
    "gaussian_epsilon",
    "gaussian_epsilon_bound",
    "gaussian_mu",
    "guess",
    "is_refuted",
    "lower_bounds",
    "mu_bound",
    "mu_from_score_gap",
    "noise_scale",
    "p_value_approximate_dp",
    "recorded",
    "sampling",
    "sensitivity",
    "threshold_bound",
    "unrelated",
]
