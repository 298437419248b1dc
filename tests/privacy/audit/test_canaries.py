"""Canaries enter before the clip, and all that follows is the production code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from privacy import HookEngine, PrivacyPlan, PrivateGradient, SeededTestSource, mechanism
from privacy.audit import Canaries, Silence, recorded

SHAPES = {"first": (6, 4), "second": (3,)}
NUM_RECORDS = 12


@pytest.fixture
def canaries():
    return Canaries.draw(SHAPES, np.array([7, 2, 5]), seed=0, norm=50.0)


def test_directions_that_fit_are_an_orthonormal_frame(canaries):
    flat = torch.cat([canaries.directions[n].flatten(1) for n in SHAPES], dim=1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(3), atol=1e-6, rtol=0)


def test_more_canaries_than_values_still_have_norm_one():
    many = Canaries.draw(SHAPES, np.arange(40), seed=0, norm=1.0)
    flat = torch.cat([many.directions[n].flatten(1) for n in SHAPES], dim=1)
    torch.testing.assert_close(flat.norm(dim=1), torch.ones(40))


def test_coins_are_fair_and_fixed_by_the_seed():
    """Of 4000 coins 2000 +- 3.9 x 31.6 show heads, but for a false alarm of 1e-4."""
    drawn = Canaries.draw({"w": (1,)}, np.arange(4000), seed=3, norm=1.0)
    assert abs(drawn.included.sum() - 2000) < 124
    again = Canaries.draw({"w": (1,)}, np.arange(4000), seed=3, norm=1.0)
    assert (drawn.included == again.included).all()


def test_only_canaries_rows_change(canaries):
    part = np.array([1, 2, 5, 11])
    rows = torch.randn(4, *SHAPES["first"])
    replaced = canaries.replace("first", part, rows)
    assert torch.equal(replaced[[0, 3]], rows[[0, 3]])
    for place, canary in ((1, 1), (2, 2)):
        wanted = canaries.directions["first"][canary] * 50.0 * float(canaries.included[canary])
        torch.testing.assert_close(replaced[place], wanted)


def test_scores_are_inner_products_over_all_tensors(canaries):
    rng = np.random.default_rng(0)
    released = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    slow = [
        sum(float((canaries.directions[n][i].numpy() * released[n]).sum()) for n in SHAPES)
        for i in range(3)
    ]
    np.testing.assert_allclose(canaries.scores(released), slow, rtol=1e-5)


def test_a_norm_must_be_positive():
    with pytest.raises(ValueError, match="norm"):
        Canaries.draw(SHAPES, np.arange(2), seed=0, norm=0.0)


class _Pair(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 6)
        self.head = torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x)))


@pytest.fixture
def step():
    """A private step of a tiny model, split into parts of at most 5 records."""
    model = _Pair().requires_grad_(False)
    adapter = {"first": model.layer.weight, "second": model.head.bias}
    data = torch.randn(NUM_RECORDS, 4, generator=torch.Generator().manual_seed(1))

    def losses(indices):
        return model(data[torch.from_numpy(indices)]).square().sum(dim=1)

    plan = PrivacyPlan(
        sample_rate=0.8, expected_batch_size=0.8 * NUM_RECORDS, max_grad_norm=0.5,
        noise_multiplier=1.0, steps=10, target_delta=1e-5,
    )  # fmt: skip

    def take(seed=0):
        engine = HookEngine(model, adapter)
        source = SeededTestSource((seed,))
        gradient = PrivateGradient(plan, engine, NUM_RECORDS, losses, source, 1, 5)
        return gradient.step(list(adapter), "mixed")

    return take


def flat(values):
    return torch.cat([value.flatten() for value in values.values()])


def test_an_included_canary_adds_its_direction_at_the_clip_norm_and_nothing_else(step, canaries):
    for canary, record in enumerate(canaries.records):
        sums = {}
        for present in (True, False):
            coins = np.zeros(3, dtype=bool)
            coins[canary] = present
            world = Canaries(canaries.records, coins, canaries.directions, 50.0)
            with recorded(world) as tape:
                step()
            sums[present] = tape.sums[0]
        moved = flat(sums[True]) - flat(sums[False])
        drawn = record in tape.batches[0]
        wanted = 0.5 * flat({n: canaries.directions[n][canary] for n in SHAPES}) * drawn
        torch.testing.assert_close(moved, wanted, atol=1e-5, rtol=0)


def test_watching_changes_nothing(step):
    alone = step()
    with recorded() as tape:
        watched = step()
    assert all(torch.equal(alone[name], watched[name]) for name in alone)
    assert tape.batches[0].dtype == np.int64 and len(tape.batches[0]) > 5  # several parts
    assert np.array_equal(tape.batches[0], np.unique(tape.batches[0]))


def test_silence_leaves_the_noise(step):
    with recorded(Silence()) as tape:
        released = step()
    assert not flat(tape.sums[0]).any()
    assert flat(released).all()


def test_an_engine_out_of_reach_is_refused_and_not_passed_over(canaries):
    class Other:
        def clipped_sum(self, active, losses, num_records, max_grad_norm):
            raise AssertionError("never asked")

    plan = PrivacyPlan(
        sample_rate=1.0, expected_batch_size=3.0, max_grad_norm=1.0,
        noise_multiplier=1.0, steps=1, target_delta=1e-5,
    )  # fmt: skip
    gradient = PrivateGradient(plan, Other(), 3, lambda part: None, SeededTestSource((0,)), 1)
    with recorded(canaries), pytest.raises(TypeError, match="not into a Other"):
        gradient.step(["first"], "mixed")


def test_the_production_code_is_put_back(step):
    before = vars(mechanism)["clipped_sum_in_parts"], HookEngine._run
    with pytest.raises(RuntimeError, match="inside"), recorded(Silence()):
        raise RuntimeError("inside")
    assert (vars(mechanism)["clipped_sum_in_parts"], HookEngine._run) == before
