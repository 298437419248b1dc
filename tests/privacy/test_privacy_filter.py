"""The filter's numbers against other implementations, exact integrals and adaptive adversaries."""

from __future__ import annotations

import decimal
import math
from decimal import Decimal

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent
from scipy.integrate import quad
from scipy.stats import norm

from privacy import BudgetLimit, Spending, composed_epsilon, pld_epsilon
from privacy.privacy_filter import _to_epsilon, rdp_of_step

RATES = (1e-3, 0.02, 0.3, 0.9, 1.0)
NOISES = (0.3, 0.8, 2.0, 20.0)
ORDERS = (2, 3, 7, 32, 129)


# --- one step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_a_steps_divergence_is_opacuss_and_googles(order):
    for rate in RATES:
        for noise in NOISES:
            ours = rdp_of_step(rate, noise, order)
            opacus = compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=[order])[0]
            accountant = RdpAccountant([order])
            accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)))
            assert ours == pytest.approx(opacus, rel=1e-6)
            assert ours == pytest.approx(accountant._rdp[0], rel=1e-6)


@pytest.mark.parametrize("order", [2, 5, 12])
@pytest.mark.parametrize(("rate", "noise"), [(0.01, 0.7), (0.3, 1.5), (0.9, 3.0)])
def test_a_steps_divergence_is_the_integral_and_the_other_direction_is_no_larger(
    rate, noise, order
):
    def log_ratio(x):  # of the mixture with the record to the Gaussian without it
        return np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * x - 1) / (2 * noise**2))

    def divergence(power):
        def integrand(x):
            return math.exp(power * log_ratio(x) + norm.logpdf(x, scale=noise))

        total = quad(integrand, -60 * noise, order + 60 * noise, points=[0, order], limit=500)[0]
        return math.log(total) / (order - 1)

    with_record = divergence(order)
    assert rdp_of_step(rate, noise, order) == pytest.approx(with_record, rel=1e-6)
    assert divergence(1 - order) <= with_record * (1 + 1e-9)


def exact_rdp(rate: float, noise: float, order: int) -> float:
    """The same sum with 60 digits."""
    with decimal.localcontext() as context:
        context.prec = 60
        q, variance = Decimal(rate), Decimal(noise) ** 2
        total = sum(
            math.comb(order, k) * (1 - q) ** (order - k) * q**k
            * (Decimal(k * k - k) / (2 * variance)).exp()
            for k in range(order + 1)
        )  # fmt: skip
        return float(total.ln() / (order - 1))


@pytest.mark.parametrize("order", [2, 16, 200])
@pytest.mark.parametrize("noise", [0.5, 30.0, 1e4, 1e5])
@pytest.mark.parametrize("rate", [1e-6, 1e-3, 0.5])
def test_a_step_with_much_noise_costs_what_it_costs(rate, noise, order):
    """Rounding must not make small steps free: a million of them are taken."""
    assert rdp_of_step(rate, noise, order) == pytest.approx(exact_rdp(rate, noise, order), rel=1e-9)


def test_orders_that_are_none_are_refused():
    with pytest.raises(ValueError, match="whole number >= 2, got 1"):
        rdp_of_step(0.1, 1.0, 1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-2])
def test_the_conversion_is_the_best_that_an_order_gives(order, delta):
    """Proposition 12 is where ``delta = e^((a - 1)(rdp - epsilon)) / (a - 1) (1 - 1/a)^a``."""
    for rdp in (0.01, 0.5, 4.0):
        epsilon = _to_epsilon(rdp, order, delta)
        back = math.exp((order - 1) * (rdp - epsilon)) / (order - 1) * (1 - 1 / order) ** order
        assert back == pytest.approx(delta, rel=1e-9)
        assert epsilon <= rdp + math.log(1 / delta) / (order - 1)  # Mironov, 2017, Proposition 3
        if epsilon > 0:
            opacus = get_privacy_spent(orders=[order], rdp=[rdp], delta=delta)[0]
            assert epsilon == pytest.approx(opacus, rel=1e-9)


# --- what a limit allows -------------------------------------------------------------------------

spendings = st.builds(
    Spending,
    st.floats(0.01, 1.0),
    st.floats(0.6, 20.0),
    st.integers(1, 60),
)
plans_of = st.lists(st.lists(spendings, min_size=1, max_size=2), min_size=1, max_size=3)


@settings(max_examples=12, deadline=None)
@given(plans=plans_of, exponent=st.floats(-8, -2))
def test_what_the_filter_shows_is_never_below_what_fixed_plans_cost(plans, exponent):
    delta = 10**exponent
    parts = tuple((s.sample_rate, s.noise_multiplier, s.steps) for plan in plans for s in plan)
    # An upper bound, but by far less than the filter's own distance.
    cost = composed_epsilon(parts, delta=delta, interval=1e-3)
    for limit in (BudgetLimit(1.0, delta), BudgetLimit(8.0, delta)):
        assert limit.spent(plans) >= cost - 0.02
        assert limit._by_filter(plans) >= cost - 0.02


@settings(max_examples=60, deadline=None)
@given(plans=st.lists(st.lists(spendings, min_size=1, max_size=2), min_size=2, max_size=3),
       limit=st.floats(0.1, 30))  # fmt: skip
def test_more_is_allowed_only_where_less_is(plans, limit):
    budget = BudgetLimit(limit, 1e-5)
    assert budget.allows(plans) == (budget.spent(plans) <= limit)
    fewer = [plans[0][:-1], *plans[1:]]
    less = [[Spending(s.sample_rate, s.noise_multiplier * 1.1, s.steps) for s in p] for p in plans]
    for smaller in (fewer, less, plans[1:] if len(plans) > 2 else plans):
        assert budget.spent(smaller) <= budget.spent(plans)
        assert budget.allows(smaller) or not budget.allows(plans)


@pytest.mark.parametrize(("rate", "noise"), [(0.1, 1.1), (0.02, 0.7), (1.0, 8.0)])
def test_a_single_plan_is_allowed_as_long_as_its_pld_says(rate, noise):
    limit = BudgetLimit(2.0, 1e-5)

    def cost(steps: int) -> float:
        return pld_epsilon(sample_rate=rate, noise_multiplier=noise, steps=steps, delta=5e-6)

    steps = 1
    while cost(steps + 1) <= 2.0:
        steps += max(1, steps // 50)
        while cost(steps) > 2.0:
            steps -= 1
    assert limit.allows([[Spending(rate, noise, steps)]])
    assert limit.spent([[Spending(rate, noise, steps)]]) == pytest.approx(cost(steps))
    # A plan's first steps and its last are one plan; a second plan is another matter.
    assert not limit.allows([[Spending(rate, noise, steps + 1)]])
    assert not limit.allows([[Spending(rate, noise, steps)], [Spending(rate, 1000 * noise, 1)]])


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 8.0])
def test_a_calibrated_plan_is_allowed_to_its_last_step(epsilon):
    """What a policy lets a run ask for, its ledger lets it spend."""
    from privacy import calibrate_noise_multiplier

    limit = BudgetLimit(epsilon, 1e-5)
    noise = calibrate_noise_multiplier(
        target_epsilon=epsilon, target_delta=limit.plan_delta, sample_rate=0.2, steps=60
    )
    assert limit.allows([[Spending(0.2, noise, 60)]])
    assert not limit.allows([[Spending(0.2, noise, 64)]])


def test_without_a_guarantee_nothing_is_allowed_but_by_a_limit_without_end():
    free = [[Spending(0.1, 0.0, 1)]]
    assert not BudgetLimit(1e9, 0.5).allows(free)
    assert BudgetLimit(math.inf, 1e-5).allows(free)
    assert BudgetLimit(8.0, 1e-5).spent(free) == math.inf
    assert BudgetLimit(8.0, 1e-5).left(free) == 0
    assert BudgetLimit(8.0, 1e-5).allows([]) and BudgetLimit(8.0, 1e-5).spent([]) == 0


@pytest.mark.parametrize(
    ("epsilon", "delta"),
    [(0, 1e-5), (-1, 1e-5), (math.nan, 1e-5), (1, 0), (1, 1), (1, -1e-5), (1, math.nan)],
)
def test_limits_that_mean_nothing_are_refused(epsilon, delta):
    with pytest.raises(ValueError, match=r"max_(epsilon|delta) must be"):
        BudgetLimit(epsilon, delta)


@pytest.mark.parametrize("epsilon", [1e-300, 1e-9, 1e-4, 1e-2, 1.0, 1e2, 1e6, 1e300])
@pytest.mark.parametrize("delta", [1e-300, 1e-12, 1e-5, 0.5])
def test_any_limit_has_orders_that_can_be_computed(epsilon, delta):
    limit = BudgetLimit(epsilon, delta)
    assert 1 <= len(limit.orders) <= 3
    assert all(2 <= order <= 2**14 for order in limit.orders)
    spent = limit.spent([[Spending(0.1, 2.0, 3)], [Spending(0.1, 2.0, 3)]])
    assert 0 <= spent < math.inf


@pytest.mark.parametrize("epsilon", [0.5, 3.0, 30.0])
def test_delta_is_shared_out_over_the_first_plan_and_all_orders(epsilon):
    """Which order is the best shows at the end only, so each needs a share of its own."""
    limit = BudgetLimit(epsilon, 1e-5)
    for order in limit.orders:
        rdp = limit._allowance(order)
        back = math.exp((order - 1) * (rdp - epsilon)) / (order - 1) * (1 - 1 / order) ** order
        assert back * len(limit.orders) == pytest.approx(1e-5 - limit.plan_delta)
    assert limit.plan_delta == 5e-6


@pytest.mark.parametrize("plans", [1, 3])
def test_what_is_left_is_what_one_more_release_may_cost(plans):
    limit = BudgetLimit(4.0, 1e-5)
    spent = [[Spending(0.1, 2.0, 40)]] * plans
    left = limit.left(spent)
    assert 0 < left < 4.0
    assert limit.left([]) == 4.0
    for share, allowed in ((0.999, True), (1.001, False)):
        noise = _noise_of_gaussian(share * left, limit.plan_delta)
        assert limit.allows([*spent, [Spending(1.0, noise, 1)]]) is allowed
    assert limit.left([*spent, [Spending(1.0, 0.2, 1)]]) == 0
    assert BudgetLimit(math.inf, 1e-5).left(spent) == math.inf


def _gaussian_delta(mu: float, epsilon: float) -> float:
    tail = norm.cdf(-mu / 2 - epsilon / mu)
    return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * tail)


def _noise_of_gaussian(epsilon: float, delta: float) -> float:
    low, high = 1e-2, 1e4
    for _ in range(200):
        middle = math.sqrt(low * high)
        if _gaussian_delta(1 / middle, epsilon) > delta:
            low = middle
        else:
            high = middle
    return high


@pytest.mark.parametrize("epsilon", [1.0, 3.0, 8.0])
def test_three_orders_are_close_to_the_best_one_in_hindsight(epsilon):
    """At the same delta per order, for noise with which so many steps just fill the limit."""
    limit = BudgetLimit(epsilon, 1e-5)
    delta = 1e-5 / 2 / len(limit.orders)
    ratios = []
    for rate in (0.001, 0.01, 0.1, 0.3, 1.0):
        for steps in (10, 100, 1000):
            low, high = 0.2, 3000.0
            for _ in range(22):
                noise = math.sqrt(low * high)
                if limit._by_filter([[Spending(rate, noise, steps)]]) > epsilon:
                    low = noise
                else:
                    high = noise
            orders = [*range(2, 64), *range(64, 256, 16)]
            best = min(_to_epsilon(steps * rdp_of_step(rate, high, a), a, delta) for a in orders)
            ratios.append(limit._by_filter([[Spending(rate, high, steps)]]) / best)
    assert sorted(ratios)[len(ratios) // 2] < 1.02
    assert max(ratios) < 1.18


# --- an adversary who chooses after seeing -------------------------------------------------------


def _largest(allowed) -> float:
    """The largest variance of the privacy loss that is allowed."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        if allowed(middle):
            low = middle
        else:
            high = middle
    return low


@pytest.mark.parametrize(("epsilon", "delta"), [(1.0, 1e-3), (3.0, 1e-5), (0.5, 1e-2)])
def test_an_adaptive_adversary_gets_no_more_than_the_limit(epsilon, delta):
    """Plans of Gaussians on a mean of 0 or 1, the second chosen by the first one's output.

    The privacy loss of a release with noise s is N(+-m / 2, m) with m = 1 / s^2, and losses add
    up, so the exact delta of a strategy is one integral over the loss after the first part: no
    sample is drawn.  The adversary stops the first plan at any point, and then goes on with it to
    its end by PLD, or begins a second one and takes all that the filter leaves, whichever the
    loss so far makes the better choice.
    """
    limit = BudgetLimit(epsilon, delta)
    steps = 1000  # of the first plan: its noise is fixed before

    def first(m: float, end: float) -> list[Spending]:
        return [Spending(1.0, math.sqrt(steps / end), max(1, round(steps * m / end)))]

    # Gaussians at q = 1 are exact: by PLD a plan of total m is allowed while its delta is half.
    end = _largest(lambda m: m == 0 or _gaussian_delta(math.sqrt(m), epsilon) <= delta / 2)
    assert limit.allows([first(0.995 * end, end)]) and not limit.allows([first(1.02 * end, end)])
    by_filter = _largest(
        lambda m: m == 0 or limit._by_filter([[Spending(1.0, m**-0.5, 1)]]) <= epsilon
    )
    assert by_filter < end
    worst = 0.0
    for share in (0.1, 0.3, 0.6, 0.9, 0.99):
        taken = share * by_filter
        second = [Spending(1.0, (by_filter - taken) ** -0.5 * 1.001, 1)]
        assert limit.allows([first(taken * 0.999, end), second])
        too_much = [Spending(1.0, (by_filter - taken) ** -0.5 * 0.98, 1)]
        assert not limit.allows([first(taken, end), too_much])
        worst = max(worst, _best_strategy(epsilon, taken, (end - taken, by_filter - taken)))
    assert 0.05 * delta < worst <= delta


def _best_strategy(epsilon: float, taken: float, choices: tuple[float, ...]) -> float:
    """Exact delta at epsilon when the rest is chosen by the loss after ``taken``."""

    def after(loss: float, rest: float) -> float:
        """``P(loss + rest > epsilon) - e^(epsilon - loss) Q(...)``, the first part given."""
        high = norm.cdf((loss + rest / 2 - epsilon) / math.sqrt(rest))
        low = norm.cdf((loss - rest / 2 - epsilon) / math.sqrt(rest))
        return float(high - math.exp(epsilon - loss) * low)

    def integrand(loss: float) -> float:
        best = max(0.0, 1 - math.exp(epsilon - loss), *(after(loss, rest) for rest in choices))
        return best * norm.pdf(loss, taken / 2, math.sqrt(taken))

    spread = 12 * math.sqrt(taken)
    bounds = (taken / 2 - spread, taken / 2 + spread)
    inner = [epsilon] if bounds[0] < epsilon < bounds[1] else None
    return float(quad(integrand, *bounds, points=inner, limit=500)[0])


def test_the_check_of_the_adversary_finds_a_limit_that_is_too_wide():
    """Two plans that each spent all by PLD: the same integral shows that it is too much."""
    epsilon, delta = 1.0, 1e-3
    end = _largest(lambda m: m == 0 or _gaussian_delta(math.sqrt(m), epsilon) <= delta / 2)
    assert _best_strategy(epsilon, end / 2, (end / 2,)) == pytest.approx(delta / 2, rel=1e-3)
    assert _best_strategy(epsilon, end, (end,)) > 5 * delta
