"""When a data set's budget is spent: within one plan, and over plans chosen after seeing outputs.

A plan is fixed before its first release, so its steps compose by privacy loss distributions.  The
next plan is chosen by somebody who has seen the first one's outputs; for such adaptively chosen
mechanisms sums of PLDs mean nothing, and a Rényi filter decides (Feldman and Zrnic, 2021).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
from scipy.special import gammaln, logsumexp

from .accounting import AccountingError, composed_epsilon

# Shares of the best order's distance from 1; the best is that of a plain Gaussian mechanism, and
# Poisson sampling moves it down.  With these three the filter shows at most 18 % more than the best
# order in hindsight would, and mostly less than 2 % (tests/privacy/test_privacy_filter.py); each
# further one takes its share of delta from all.
_ORDER_SHARES = (0.5, 0.75, 1.0)
# A higher order is of use for an epsilon below 1e-3 only, and a sum has as many terms as its order.
_HIGHEST_ORDER = 2**14
_COARSE_INTERVAL = 1e-3
_FINE_INTERVAL = 1e-4


@dataclasses.dataclass(frozen=True)
class Spending:
    """Steps of one Poisson-subsampled Gaussian that were taken.

    Parameters
    ----------
    sample_rate : float
        Poisson rate q in (0, 1].
    noise_multiplier : float
        Sigma; 0 for a release without a guarantee (no noise, or noise that can be reproduced).
    steps : int
        Times it was run, 1 or more.
    """

    sample_rate: float
    noise_multiplier: float
    steps: int


Plan = Sequence[Spending]
"""What one plan, fixed before its first release, has spent so far, if it is of one kind of release.

Of several kinds, how many of each were taken is itself chosen in view of outputs: then all that the
plan allows must be given here, as long as it is the only one.
"""


@dataclasses.dataclass(frozen=True)
class BudgetLimit:
    """The largest (epsilon, delta) that a data set may ever lose.

    Parameters
    ----------
    max_epsilon : float
        More than 0; infinite for no limit.
    max_delta : float
        In (0, 1).  Half of it is for a data set that only ever sees one plan, half for the filter.

    Notes
    -----
    Formal guarantee: if every release on a data set was first allowed by :meth:`allows`, given all
    that was charged before, then everything ever released is (``max_epsilon``,
    ``max_delta``)-DP per record, however the plans after the first were chosen.

    Proof.  Let F1 be the event that there is only one plan, F2 that there are more.  On F1 the
    transcript is that of the first plan alone, whose parameters do not depend on the data.  All
    its releases could be drawn beforehand, and shown one after the other in whatever order, up to
    whatever point, the interaction asks for: the PLD of all of them gives
    ``P(S and F1) <= e^epsilon Q(S and F1) + delta / 2``.  On F2, at the end some order ``a`` of the
    K fixed ones has ``sum of RDP(a) <= B(a)``, and as the sum only grows, it had so all along:
    there the transcript is that of an interaction which stops before the sum exceeds B(a), and
    which is ``(a, B(a))``-RDP by the fully adaptive composition of Feldman and Zrnic (2021,
    Theorem 4.3), hence (epsilon, delta / 2K)-DP by the choice of B(a) (Canonne, Kamath and
    Steinke, 2020, Proposition 12 in version 4).  Let F2(a) be the event that ``a`` is the
    smallest such order; which one it is may depend on outputs.  On F2(a) the two interactions are
    one, so ``P(S and F2(a)) <= e^epsilon Q(S and F2(a)) + delta / 2K``, and the sum over the K
    orders gives ``P(S and F2) <= e^epsilon Q(S and F2) + delta / 2``.  Rounds of several plans may
    be interleaved: each round's release is one mechanism of the interaction.

    Not covered: releases that were not charged; limits that are raised later, or changed in view of
    outputs; records that are changed in view of outputs.
    """

    max_epsilon: float
    max_delta: float

    def __post_init__(self) -> None:
        """Refuse limits that mean nothing."""
        if not self.max_epsilon > 0:
            raise ValueError(f"max_epsilon must be > 0, got {self.max_epsilon}")
        if not 0 < self.max_delta < 1:
            raise ValueError(f"max_delta must be in (0, 1), got {self.max_delta}")

    @property
    def plan_delta(self) -> float:
        """Delta of a plan that is the data set's only one; no plan may ask for more."""
        return self.max_delta / 2

    @property
    def orders(self) -> tuple[int, ...]:
        """Rényi orders of the filter: chosen by the limits alone, never by what was spent."""
        return _orders(self.max_epsilon, self.max_delta)

    def allows(self, plans: Sequence[Plan]) -> bool:
        """Whether this much may have been spent; each plan's part is what it has spent so far."""
        if math.isinf(self.max_epsilon) or not plans:
            return True
        if _without_guarantee(plans):
            return False
        # The filter also covers a single plan, and is much the cheaper one.
        if self._by_filter(plans) <= self.max_epsilon:
            return True
        if len(plans) > 1:
            return False
        return any(
            self._by_pld(plans[0], interval) <= self.max_epsilon
            for interval in (_COARSE_INTERVAL, _FINE_INTERVAL)
        )

    def spent(self, plans: Sequence[Plan]) -> float:
        """Epsilon, at ``max_delta``, of what was spent; infinite without a guarantee."""
        if not plans:
            return 0.0
        if _without_guarantee(plans):
            return math.inf
        by_filter = self._by_filter(plans)
        if len(plans) > 1:
            return by_filter
        return min(by_filter, self._by_pld(plans[0], _FINE_INTERVAL))

    def left(self, plans: Sequence[Plan]) -> float:
        """Epsilon, at ``plan_delta``, of the largest single Gaussian release still allowed.

        What a further training may cost, as one number; 0 if nothing more is allowed.
        """
        if math.isinf(self.max_epsilon):
            return math.inf
        if not plans:
            return self.max_epsilon
        if _without_guarantee(plans):
            return 0.0
        spare = [
            (self._allowance(a) - _rdp(plans, a)) / a for a in self.orders
        ]  # RDP of a Gaussian with q = 1 is a / (2 sigma^2)
        if max(spare) <= 0:
            return 0.0
        return _epsilon_of_gaussian(math.sqrt(2 * max(spare)), self.plan_delta)

    def _by_filter(self, plans: Sequence[Plan]) -> float:
        # At a delta close to 1 the bound may be below 0, which says no more than 0 does.
        lowest = min(_to_epsilon(_rdp(plans, a), a, self._order_delta) for a in self.orders)
        return max(0.0, lowest)

    def _by_pld(self, plan: Plan, interval: float) -> float:
        parts = tuple((one.sample_rate, one.noise_multiplier, one.steps) for one in plan)
        try:
            return composed_epsilon(parts, delta=self.plan_delta, interval=interval)
        except (ArithmeticError, ValueError, MemoryError) as error:
            raise AccountingError(f"the accountant cannot tell what {parts} cost") from error

    @property
    def _order_delta(self) -> float:
        return self.max_delta / 2 / len(self.orders)

    def _allowance(self, order: int) -> float:
        return self.max_epsilon - _to_epsilon(0.0, order, self._order_delta)


@functools.lru_cache(maxsize=65536)
def rdp_of_step(sample_rate: float, noise_multiplier: float, order: int) -> float:
    """Rényi divergence of one Poisson-subsampled Gaussian step, at an integer order.

    ``log(A) / (order - 1)`` with ``A = sum_k C(order, k) (1 - q)^(order - k) q^k
    exp((k^2 - k) / (2 sigma^2))`` (Mironov, Talwar and Zhang, 2019, Section 3.3; the divergence in
    the other direction is never larger, Section 3.1 there).  The weights add up to 1, and those of
    k = 0 and 1 are multiplied by 1, so ``A = 1 + sum_{k >= 2} ... (exp(...) - 1)``: without that
    the rounding of A would swallow what a step with much noise costs.

    Notes
    -----
    Formal guarantee: one step is (order, result)-RDP for two data sets that differ in one record
    being present or contributing zero.  Not covered: other orders than the one asked for.
    """
    if order < 2:
        raise ValueError(f"order must be a whole number >= 2, got {order}")
    if sample_rate >= 1:
        return order / (2 * noise_multiplier**2)
    k = np.arange(2, order + 1)
    growth = (k * k - k) / (2 * noise_multiplier**2)
    terms = (
        gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
        + (order - k) * math.log1p(-sample_rate) + k * math.log(sample_rate)
        + growth + np.log(-np.expm1(-growth))
    )  # fmt: skip
    return float(np.logaddexp(0.0, logsumexp(terms))) / (order - 1)


def _rdp(plans: Sequence[Plan], order: int) -> float:
    return math.fsum(
        one.steps * rdp_of_step(one.sample_rate, one.noise_multiplier, order)
        for plan in plans
        for one in plan
    )


def _to_epsilon(rdp: float, order: int, delta: float) -> float:
    """Canonne, Kamath and Steinke (2020), Proposition 12 in version 4."""
    return rdp + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


def _without_guarantee(plans: Sequence[Plan]) -> bool:
    return any(one.noise_multiplier <= 0 for plan in plans for one in plan)


@functools.lru_cache(maxsize=64)
def _orders(max_epsilon: float, max_delta: float) -> tuple[int, ...]:
    # Where rho * order + log(1 / delta) / (order - 1) is smallest, at the rho that it then allows.
    length = math.log(2 / max_delta)
    rho = (math.sqrt(length + max_epsilon) - math.sqrt(length)) ** 2
    best = math.sqrt(length / rho) if 0 < rho < math.inf else 1.0 if rho else math.inf
    best = min(best, _HIGHEST_ORDER - 1)
    return tuple(sorted({max(2, round(1 + share * best)) for share in _ORDER_SHARES}))


def _epsilon_of_gaussian(mu: float, delta: float) -> float:
    """Epsilon at delta of a Gaussian mechanism with sensitivity mu and unit noise.

    Balle and Wang (2018), Theorem 8: ``Phi(mu / 2 - e / mu) - exp(e) Phi(-mu / 2 - e / mu)``.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    def excess(epsilon: float) -> float:
        second = math.exp(epsilon + float(norm.logcdf(-mu / 2 - epsilon / mu)))
        return float(norm.cdf(mu / 2 - epsilon / mu)) - second - delta

    if excess(0.0) <= 0:
        return 0.0
    high = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta)) + 1
    return float(brentq(excess, 0.0, high, xtol=1e-9))
