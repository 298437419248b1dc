"""The norm bound that follows from a run's settings."""

from __future__ import annotations

import math

import pytest

from federation.settings import Settings
from privacy import PrivacyPlan
from server_app.planned_bound import PlannedBound
from strategies import InvalidReply, RoundPlan

SHAPES = {"m.lora_A.weight": (4, 64), "m.lora_B.weight": (64, 4), "head.weight": (10, 64)}
PLAN = RoundPlan(server_round=1, mode="B", local_steps=6, lr_a=0.5, lr_b=0.5, lr_head=0.5)


def settings(**privacy) -> Settings:
    changes = {f"privacy.{name}".replace("_", "-"): value for name, value in privacy.items()}
    return Settings.from_run_config(
        {"strategy.num-rounds": 10, "strategy.local-steps": 6, "data.min-records": 20, **changes}
    )


def spread(settings: Settings, count: int) -> float:
    """Length of the noise on B in a round, for a client with this many records."""
    plan = PrivacyPlan.for_client(settings.privacy, num_records=count, steps=60)
    each = plan.noise_std("B") / plan.expected_batch_size
    return 0.5 * each * math.sqrt(6 * 64 * 4)


@pytest.mark.parametrize("count", [20, 200, 5000])
def test_the_bound_is_of_the_clients_own_plan(count):
    run = settings(sample_rate=0.2)
    limits = PlannedBound(run).limits(PLAN, SHAPES, float(count))
    assert set(limits) == {"B", "head"}
    # Above the noise's own length, and no more than it, all gradients aligned, and the excess.
    assert spread(run, count) < limits["B"] < 1.6 * (spread(run, count) + 0.5 * 6 * 3)


def test_where_counts_are_private_the_fewest_records_have_the_most_noise():
    run = settings(sample_rate=0.2)
    bound = PlannedBound(run)
    assert bound.limits(PLAN, SHAPES, None)["B"] > spread(run, 20)
    assert bound.limits(PLAN, SHAPES, None)["B"] >= bound.limits(PLAN, SHAPES, 5000.0)["B"]


def test_with_a_common_batch_the_smallest_client_takes_all_its_records():
    run = settings(sample_rate=0.0, expected_batch_size=64)
    bound = PlannedBound(run)
    worst = bound.limits(PLAN, SHAPES, None)["B"]
    for count in (20, 64, 640, 6400):
        assert bound.limits(PLAN, SHAPES, float(count))["B"] <= worst
        assert spread(run, count) < worst


def test_more_noise_allows_longer_updates():
    loose, tight = (
        PlannedBound(settings(sample_rate=0.2, target_epsilon=epsilon)).limits(PLAN, SHAPES, 200.0)
        for epsilon in (1.0, 8.0)
    )
    assert loose["B"] > 1.5 * tight["B"]


def test_a_count_that_no_plan_allows_is_the_clients_own_failure():
    """delta = 1e-5 allows fewer than 100,000 records."""
    with pytest.raises(InvalidReply, match="so many records"):
        PlannedBound(settings(sample_rate=0.2)).limits(PLAN, SHAPES, 1e9)
