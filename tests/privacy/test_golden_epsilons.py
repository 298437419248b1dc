"""Epsilon of known plans, written out, against references that share no code with ours.

Every number under ``epsilon`` is what ``pld_epsilon`` gave on 2026-11-21 with dp-accounting 0.6.0,
in full digits, so that a change of accountant shows. What makes it right is the reference beside
it: the closed form for full batches, the closed form for one sampled step, Opacus's PRV bounds,
a table made by Microsoft's prv_accountant, and figures of papers and tutorials.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis.rdp import compute_rdp
from scipy.optimize import brentq
from scipy.special import log_ndtr
from scipy.stats import norm

from privacy.accounting import pld_epsilon, prv_epsilon, rdp_epsilon

# The accountant of record may be this much above a reference that is exact.
_TOLERANCE = 0.01
# A grid point of the privacy loss or another machine's FFT may move digits beyond these.
_SAME_NUMBER = 1e-7


class Plan(NamedTuple):
    """Noise multiplier, sampling rate, steps, delta, and our epsilon for them."""

    sigma: float
    rate: float
    steps: int
    delta: float
    epsilon: float

    def ask(self, accountant, **options) -> float:
        return accountant(
            sample_rate=self.rate,
            noise_multiplier=self.sigma,
            steps=self.steps,
            delta=self.delta,
            **options,
        )


# Reference: Balle & Wang (2018), Theorem 8; see `full_batch_epsilon`.
FULL_BATCHES = [
    Plan(30.0, 1.0, 10, 1e-5, 0.36078919811373966),
    Plan(60.0, 1.0, 64, 1e-5, 0.4660735800620297),
    Plan(4.0, 1.0, 1, 1e-6, 1.0607018640548598),
    Plan(40.0, 1.0, 1000, 1e-5, 3.3414145691397765),
    Plan(20.0, 1.0, 500, 1e-4, 4.345585581239021),
    Plan(1.0, 1.0, 1, 1e-5, 4.3771781000517676),
    Plan(5.0, 1.0, 40, 1e-6, 6.399283246210978),
    Plan(6.0, 1.0, 300, 1e-5, 15.867260627209898),
    Plan(1.3, 1.0, 16, 1e-5, 17.231991032253728),
]

# Reference: the exact privacy curve of one sampled step; see `one_step_epsilon`.
ONE_STEP = [
    Plan(4.0, 0.5, 1, 1e-5, 0.5356519223411581),
    Plan(2.0, 0.3, 1, 1e-5, 0.954094358752032),
    Plan(0.8, 0.05, 1, 1e-6, 2.556055660794599),
]

# Reference: lower bound, estimate and upper bound of Opacus's PRV accountant.
SAMPLED = [
    Plan(30.0, 0.2, 60, 1e-5, 0.16680941239255168),
    Plan(8.0, 0.2, 60, 1e-5, 0.7199912296220204),
    Plan(20.0, 0.5, 100, 1e-6, 1.066772921536099),
    Plan(4.0, 0.1, 300, 1e-6, 2.0132201252987914),
    Plan(12.0, 0.3, 400, 1e-6, 2.271631117535449),
    Plan(2.5, 0.2, 60, 1e-5, 2.853790917817889),
    Plan(0.6, 0.001, 10_000, 1e-7, 3.8449559569709435),
    Plan(1.2, 32 / 1200, 1000, 1e-5, 3.8479303289045745),
    Plan(1.0, 0.02, 1000, 1e-5, 3.8990920960773736),
    Plan(0.7, 0.004, 15_000, 1e-5, 6.295711758897395),
    Plan(1.0, 0.5, 5, 1e-5, 7.422289698174302),
    Plan(1.5, 0.05, 2000, 1e-5, 8.231274511322338),
    Plan(1.1, 0.2, 60, 1e-5, 9.431279823823834),
    Plan(0.5, 0.01, 500, 1e-5, 10.283014331277768),
    Plan(1.2, 0.9, 10, 1e-5, 12.998060230976888),
    Plan(0.8, 0.1, 200, 1e-4, 13.455207606364155),
    Plan(1.3, 0.3, 100, 1e-5, 14.753145725802547),
]
# The same, where PRV takes three to nine seconds.
SAMPLED_LONG = [
    Plan(1.3, 0.001, 100_000, 1e-6, 1.22831659724024),
    Plan(3.0, 0.001, 20_000, 1e-5, 0.1565912736147283),
]

# Reference: the table in Opacus's repository, opacus/tests/prv_accountant.py, "computed from
# https://github.com/microsoft/prv_accountant": upper bounds at delta = 1e-6 that include that
# accountant's additive error of 0.01.
MICROSOFT = [
    (Plan(3.0, 0.001, 20_000, 1e-6, 0.18536102553595094), 0.194031030686054706),
    (Plan(3.0, 0.05, 100, 1e-6, 0.7578838671945977), 0.767933789666825572),
    (Plan(0.8, 0.001, 20_000, 1e-6, 1.2861516315148958), 1.29600925757016161),
    (Plan(1.5, 0.05, 100, 1e-6, 1.9437363459807078), 1.95385313568420015),
    (Plan(3.0, 0.2, 100, 1e-6, 3.371055414807449), 3.38122051022184422),
    (Plan(2.0, 0.05, 1000, 1e-6, 4.162611260561385), 4.17279986668931890),
    (Plan(1.5, 0.2, 100, 1e-6, 8.488586208174974), 8.49897785912163072),
    (Plan(3.0, 0.05, 20_000, 1e-6, 13.950658648890064), 13.9611146992367061),
    (Plan(0.8, 0.05, 1000, 1e-6, 19.515033110433833), 19.5258428053837356),
]
_MICROSOFTS_ERROR = 0.01

_MNIST = 256 / 60_000


def _epochs(number: int) -> int:
    return number * 60_000 // 256


_TF_PRIVACY = "TensorFlow Privacy, tutorials/README.md, table 'Select Parameters'"
_GDP_PAPER = "Bu, Dong, Long, Su: Deep Learning with Gaussian DP (HDSR 2020), caption of Figure 4"
_DP_SGD_PAPER = "Abadi et al.: Deep Learning with Differential Privacy (CCS 2016), section 5.1"

# Figures printed for the moments accountant, which is RDP with the first, looser conversion:
# plan, figure, how far our own evaluation of that accountant may be from the figure, source.
# Abadi et al. searched whole orders by numerical integration; Bu et al. print an epoch's epsilon.
MOMENTS = [
    (Plan(1.12, _MNIST, _epochs(60), 1e-5, 2.3101853238691277), 2.92, 0.01, _TF_PRIVACY),
    (Plan(0.6, _MNIST, _epochs(30), 1e-5, 7.690027038367377), 9.74, 0.02, _TF_PRIVACY),
    (Plan(1.2, _MNIST, _epochs(10), 1e-5, 0.7922886734085502), 1.20, 0.01, _TF_PRIVACY),
    (Plan(1.3, _MNIST, _epochs(20), 1e-5, 1.0073386213572348), 1.34, 0.02, _GDP_PAPER),
    (Plan(0.7, _MNIST, _epochs(70), 1e-5, 7.094810614202451), 8.68, 0.01, _GDP_PAPER),
    (Plan(4.0, 0.01, 10_000, 1e-5, 0.9469993059843788), 1.26, 0.01, _DP_SGD_PAPER),
    (Plan(4.0, 0.01, 40_000, 1e-5, 2.0333569208867046), 2.55, 0.03, _DP_SGD_PAPER),
]

ALL = [
    *FULL_BATCHES,
    *ONE_STEP,
    *SAMPLED,
    *SAMPLED_LONG,
    *(row[0] for row in MICROSOFT),
    *(row[0] for row in MOMENTS),
]


def full_batch_epsilon(sigma: float, steps: int, delta: float) -> float:
    """Exact epsilon of T full-batch Gaussian steps, to 1e-10.

    They are one Gaussian with ``mu = sqrt(T) / sigma`` (Dong, Roth & Su, 2019, Corollary 3.3),
    whose privacy curve is Theorem 8 of Balle & Wang (2018):
    ``delta = Phi(mu / 2 - eps / mu) - e^eps Phi(-mu / 2 - eps / mu)``.
    """
    mu = math.sqrt(steps) / sigma

    def excess(epsilon: float) -> float:
        tail = math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu))
        return float(norm.cdf(mu / 2 - epsilon / mu)) - tail - delta

    return float(brentq(excess, 0.0, 100.0, xtol=1e-10))


def one_step_epsilon(sigma: float, rate: float, delta: float) -> float:
    """Exact epsilon of one Poisson-subsampled Gaussian step, to 1e-10.

    With the record the release is ``P = (1 - q) N(0, s^2) + q N(1, s^2)``, without it
    ``Q = N(0, s^2)``. ``log(P / Q)`` rises with the release, so both hockey-stick divergences
    are differences of tails beyond one threshold.
    """

    def divergence(epsilon: float) -> float:
        def threshold(ratio: float) -> float:  # where P / Q is `ratio`
            return sigma**2 * math.log((ratio - (1 - rate)) / rate) + 0.5

        at = threshold(math.exp(epsilon))
        above = (1 - rate) * norm.sf(at / sigma) + rate * norm.sf((at - 1) / sigma)
        removed = above - math.exp(epsilon) * norm.sf(at / sigma)
        if math.exp(-epsilon) <= 1 - rate:  # P / Q is never as small
            return float(removed)
        at = threshold(math.exp(-epsilon))
        below = (1 - rate) * norm.cdf(at / sigma) + rate * norm.cdf((at - 1) / sigma)
        added = norm.cdf(at / sigma) - math.exp(epsilon) * below
        return float(max(removed, added))

    return float(brentq(lambda epsilon: divergence(epsilon) - delta, 1e-9, 50.0, xtol=1e-10))


def prv_bounds(plan: Plan, error: float) -> tuple[float, float, float]:
    """Lower bound, estimate and upper bound; ``PRVAccountant.get_epsilon`` gives the last only."""
    accountant = PRVAccountant()
    accountant.history = [(plan.sigma, plan.rate, plan.steps)]
    delta_error = plan.delta / 1000
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        composed = accountant._get_dprv(eps_error=error, delta_error=delta_error)
        lower, estimate, upper = composed.compute_epsilon(plan.delta, delta_error, error)
    return float(lower), float(estimate), float(upper)


def moments_epsilon(plan: Plan) -> float:
    """RDP with the conversion of Mironov (2017), Proposition 3, as the moments accountant has it.

    ``eps = min over orders a of RDP(a) + log(1 / delta) / (a - 1)``.
    """
    orders = np.array([1 + x / 10 for x in range(1, 100)] + list(range(11, 256)))
    rdp = compute_rdp(
        q=plan.rate, noise_multiplier=plan.sigma, steps=plan.steps, orders=orders.tolist()
    )
    return float(np.min(rdp + math.log(1 / plan.delta) / (orders - 1)))


def test_the_plans_are_spread_over_realistic_use():
    assert len(set(ALL)) == len(ALL) >= 20
    epsilons = [plan.epsilon for plan in ALL]
    assert min(epsilons) < 0.2 and 19 < max(epsilons) < 20
    for low, high in ((0, 0.5), (0.5, 1), (1, 3), (3, 8), (8, 12), (12, 20)):
        assert sum(low < epsilon <= high for epsilon in epsilons) >= 3, (low, high)
    assert sum(plan.steps <= 10 for plan in ALL) >= 5
    assert sum(plan.steps >= 10_000 for plan in ALL) >= 5
    assert {plan.delta for plan in ALL} >= {1e-4, 1e-5, 1e-6, 1e-7}


@pytest.mark.parametrize("plan", ALL, ids=str)
def test_the_accountant_gives_the_number_it_gave(plan):
    assert plan.ask(pld_epsilon) == pytest.approx(plan.epsilon, rel=_SAME_NUMBER)


@pytest.mark.parametrize("plan", FULL_BATCHES, ids=str)
def test_full_batches_against_the_closed_form(plan):
    exact = full_batch_epsilon(plan.sigma, plan.steps, plan.delta)
    assert exact * (1 - 1e-6) <= plan.epsilon <= exact * (1 + _TOLERANCE)


@pytest.mark.parametrize("plan", ONE_STEP, ids=str)
def test_one_sampled_step_against_the_closed_form(plan):
    exact = one_step_epsilon(plan.sigma, plan.rate, plan.delta)
    assert exact * (1 - 1e-6) <= plan.epsilon <= exact * (1 + _TOLERANCE)


def test_the_closed_forms_agree_where_both_hold():
    assert one_step_epsilon(2.0, 1.0, 1e-5) == pytest.approx(full_batch_epsilon(2.0, 1, 1e-5))


@pytest.mark.parametrize(
    "plan",
    [
        *SAMPLED,
        *ONE_STEP,
        *(pytest.param(plan, marks=pytest.mark.slow) for plan in SAMPLED_LONG),
    ],
    ids=str,
)
def test_sampled_batches_against_opacus_prv_bounds(plan):
    lower, estimate, upper = prv_bounds(plan, error=plan.epsilon / 500)
    assert upper - lower < _TOLERANCE * plan.epsilon  # else the bounds would not tell 1 %
    assert plan.epsilon >= lower, "below what is possible: not a bound"
    assert plan.epsilon == pytest.approx(estimate, rel=_TOLERANCE)
    assert plan.epsilon >= estimate * (1 - 1e-5)  # pessimistic, but for rounding


@pytest.mark.parametrize("plan", [FULL_BATCHES[5], *ONE_STEP[:1], *SAMPLED[:8:2]], ids=str)
def test_dp_accountings_own_events_say_the_same(plan):
    """Not another implementation, but another way in: no argument of ours is misread."""
    accountant = PLDAccountant()
    step = PoissonSampledDpEvent(plan.rate, GaussianDpEvent(plan.sigma))
    accountant.compose(SelfComposedDpEvent(step, plan.steps))
    assert plan.epsilon == pytest.approx(accountant.get_epsilon(plan.delta), rel=1e-6)


@pytest.mark.parametrize(("plan", "upper"), MICROSOFT, ids=str)
def test_against_the_table_of_microsofts_prv_accountant(plan, upper):
    assert upper - 2 * _MICROSOFTS_ERROR <= plan.epsilon <= upper
    assert plan.epsilon == pytest.approx(upper - _MICROSOFTS_ERROR, rel=_TOLERANCE)


@pytest.mark.parametrize(("plan", "figure", "rounding", "source"), MOMENTS, ids=str)
def test_against_published_moments_accountants(plan, figure, rounding, source):
    """The figure is the plan's (same accountant, same digits); ours is tighter by 15 to 35 %."""
    assert abs(moments_epsilon(plan) - figure) <= rounding, source
    assert 0.65 * figure <= plan.epsilon <= 0.85 * figure, source
    assert plan.epsilon < plan.ask(rdp_epsilon) < figure, source


@pytest.mark.parametrize("plan", [*SAMPLED[::3], *FULL_BATCHES[::3]], ids=str)
def test_the_second_accountant_bounds_each_plan_too(plan):
    """What the run is checked against is an upper bound within its own stated error."""
    error = plan.epsilon / 200
    second = plan.ask(prv_epsilon, error=error)
    assert plan.epsilon * (1 - 1e-3) <= second <= plan.epsilon * (1 + _TOLERANCE)
