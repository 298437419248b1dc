"""The bound against honest clients at their worst, and against exact tails."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from client_app.local_training import step_kind, train_round
from privacy import PrivacyPlan, SeededTestSource, binomial_low_pass, privatize
from strategies.norm_bound import UpdateBound
from strategies.round_plan import RoundPlan
from strategies.tensor_names import kind_of

SHAPES = {
    "blocks.0.qkv.lora_A.weight": (4, 40),
    "blocks.0.qkv.lora_B.weight": (60, 4),
    "blocks.1.qkv.lora_A.weight": (4, 7),
    "blocks.1.qkv.lora_B.weight": (1, 4),
    "head.weight": (5, 40),
    "head.bias": (5,),
}
CLIPS = {"max_grad_norm": 1.0, "max_grad_norm_a": 0.5, "max_grad_norm_b": 2.0}
EXCEPTIONS = {"blocks.1.qkv": "A"}


def make_plan(mode="both", *, layer_modes=None, **changes) -> RoundPlan:
    fields = {"server_round": 1, "local_steps": 6, "lr_a": 0.3, "lr_b": 0.7, "lr_head": 0.1}
    return RoundPlan(mode=mode, layer_modes=layer_modes or {}, **{**fields, **changes})


def privacy_plan(rate: float, records: int, sigma: float) -> PrivacyPlan:
    return PrivacyPlan(
        sample_rate=rate,
        expected_batch_size=rate * records,
        noise_multiplier=sigma,
        steps=1000,
        target_delta=1e-5,
        **CLIPS,
    )


def smooth(values: np.ndarray, name: str) -> np.ndarray:
    """The client's filter, on a stack of rounds: rows (A) and columns (B) never mix."""
    if kind_of(name) == "A":
        flat = values.reshape(-1, values.shape[2])
        return binomial_low_pass(torch.from_numpy(flat), "A").numpy().reshape(values.shape)
    columns = np.moveaxis(values, 1, 0)
    flat = columns.reshape(len(columns), -1)
    filtered = binomial_low_pass(torch.from_numpy(flat), "B").numpy()
    return np.moveaxis(filtered.reshape(columns.shape), 0, 1)


def worst_honest_norms(
    plan: RoundPlan, client: PrivacyPlan, target: str, rounds: int, shapes=SHAPES
) -> np.ndarray:
    """Norms of one kind's update if every record pulls that kind the same way with all of C.

    The common direction is constant along each tensor, which the filter leaves alone.
    """
    generator = np.random.default_rng(0)
    records = round(client.expected_batch_size / client.sample_rate)
    change = {n: np.zeros((rounds, *shapes[n])) for n in shapes if kind_of(n) == target}
    for step in range(1, plan.local_steps + 1):
        active = plan.active(step, shapes)
        kind = step_kind(active)
        own = [n for n in active if kind_of(n) == target]
        size = sum(math.prod(shapes[n]) for n in own)
        batch = generator.binomial(records, client.sample_rate, rounds)
        for name in own:
            each = (rounds, *[1] * len(shapes[name]))
            pull = batch.reshape(each) * client.clip_norm(kind) / math.sqrt(size)
            noise = client.noise_std(kind) * generator.standard_normal(change[name].shape)
            value = (pull + noise) / client.expected_batch_size
            if plan.low_pass and target != "head":
                value = smooth(value, name)
            change[name] -= plan.learning_rate(name) * value
    squares = [np.square(c).reshape(rounds, -1).sum(axis=1) for c in change.values()]
    return np.sqrt(sum(squares))


MODES = [
    ("A", {}), ("B", {}), ("both", {}), ("alternate", {}),
    ("B", EXCEPTIONS), ("alternate", EXCEPTIONS),
]  # fmt: skip


@pytest.mark.parametrize("low_pass", [False, True])
@pytest.mark.parametrize(("mode", "layer_modes"), MODES)
@pytest.mark.parametrize("head", [False, True])
def test_no_honest_client_exceeds_the_bound(mode, layer_modes, head, low_pass):
    plan = make_plan(mode, layer_modes=layer_modes, train_head=head, low_pass=low_pass)
    for rate, records, sigma in [(0.2, 20, 0.8), (0.1, 1000, 1.0), (0.5, 400, 40.0), (1.0, 9, 0)]:
        limits = UpdateBound(**CLIPS, noise_multiplier=sigma, sample_rate=rate).limits(
            plan, SHAPES, records
        )
        assert set(limits) == {kind_of(name) for name in plan.uploaded(SHAPES)}
        by_size = UpdateBound(
            **CLIPS, noise_multiplier=sigma, expected_batch_size=rate * records
        ).limits(plan, SHAPES)
        for kind, limit in limits.items():
            worst = worst_honest_norms(plan, privacy_plan(rate, records, sigma), kind, 300)
            assert worst.max() <= limit <= by_size[kind] * (1 + 1e-12)


@pytest.mark.parametrize("low_pass", [False, True])
@pytest.mark.parametrize("mode", ["A", "B", "both", "alternate"])
@pytest.mark.parametrize(("sigma", "most"), [(0.05, 1.4), (200.0, 1.45)])
def test_the_bound_is_near_what_honest_clients_reach(mode, sigma, most, low_pass):
    """At b = 64, in the tensors of a small adapter: where records dominate, and where noise does.

    What remains is the distance between 300 rounds and failures once in 10^12.
    """
    shapes = {"x.lora_A.weight": (4, 192), "x.lora_B.weight": (192, 4), "head.weight": (10, 40)}
    plan = make_plan(mode, low_pass=low_pass)
    client = privacy_plan(0.1, 640, sigma)
    bound = UpdateBound(**CLIPS, noise_multiplier=sigma, sample_rate=0.1)
    for kind, limit in bound.limits(plan, shapes, 640).items():
        worst = worst_honest_norms(plan, client, kind, 300, shapes).max()
        assert worst <= limit <= most * worst, (kind, limit / worst)


def test_on_large_tensors_and_batches_the_bound_is_within_a_tenth():
    """Noise alone on 2 x 10^5 values; records alone at b = 4096: the slack is 10 % at most."""
    plan = make_plan("A", train_head=False)
    shapes = {"x.lora_A.weight": (8, 25000)}
    std = 0.3 * math.sqrt(6) * 10.0 * 1.0 / 64
    noisy = UpdateBound(max_grad_norm=1.0, noise_multiplier=10.0, expected_batch_size=64)
    assert noisy.limits(plan, shapes)["A"] <= 1.1 * std * math.sqrt(200_000)
    large = UpdateBound(max_grad_norm=1.0, noise_multiplier=0, expected_batch_size=4096)
    assert large.limits(plan, shapes)["A"] <= 1.1 * 0.3 * 6


class AlignedGradient:
    """Real releases of a client whose clipped sums are as long as its batch allows."""

    def __init__(self, plan: PrivacyPlan, target: str, seed: int) -> None:
        self.plan = plan
        self._target = target
        self._source = SeededTestSource([seed])
        self._batches = np.random.default_rng(seed)

    def step(self, active, kind):
        records = round(self.plan.expected_batch_size / self.plan.sample_rate)
        batch = self._batches.binomial(records, self.plan.sample_rate)
        own = [n for n in active if kind_of(n) == self._target]
        size = max(1, sum(math.prod(SHAPES[n]) for n in own))
        length = batch * self.plan.clip_norm(kind) / math.sqrt(size)
        sums = {n: torch.full(SHAPES[n], length * (n in own)) for n in active}
        return privatize(sums, self.plan, kind, self._source)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("mode", "layer_modes"), MODES)
def test_the_clients_own_training_code_stays_below(mode, layer_modes, optimizer):
    plan = make_plan(mode, layer_modes=layer_modes, optimizer=optimizer, low_pass=True)
    client = privacy_plan(0.1, 300, 1.0)
    bound = UpdateBound(**CLIPS, noise_multiplier=1.0, sample_rate=0.1)
    limits = bound.limits(plan, SHAPES, 300)
    for seed, target in enumerate(limits):
        generator = torch.Generator().manual_seed(seed)
        adapter = {
            n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in SHAPES.items()
        }
        update = train_round(plan, adapter, AlignedGradient(client, target, seed))
        for kind, limit in limits.items():
            norms = [float(v.double().norm()) for n, v in update.items() if kind_of(n) == kind]
            assert math.hypot(*norms) <= limit


@given(st.floats(1, 1e4), st.floats(1e-3, 1), st.integers(1, 20))
def test_batches_exceed_their_part_with_the_stated_probability(mean, rate, steps):
    """Exact binomial tails of all the round's batches, equal clip norms."""
    records = math.ceil(mean / rate)
    plan = make_plan("A", train_head=False, local_steps=steps, lr_a=1.0)
    bound = UpdateBound(max_grad_norm=1.0, noise_multiplier=0, sample_rate=rate)
    limit = bound.limits(plan, {"x.lora_A.weight": (1, 1)}, records)["A"] / 1.01
    drawn = limit * rate * records
    assert stats.binom.sf(drawn * (1 + 1e-12), records * steps, rate) <= 1e-12
    assert drawn <= records * steps * (1 + 1e-12)


@pytest.mark.parametrize("low_pass", [False, True])
@pytest.mark.parametrize("numel", [1, 2, 10, 1000, 100_000])
def test_noise_exceeds_its_part_with_the_stated_probability(numel, low_pass):
    """Exact chi tail; along an axis of length 1 the filter changes nothing."""
    plan = make_plan("A", train_head=False, local_steps=1, lr_a=1.0, low_pass=low_pass)
    bound = UpdateBound(max_grad_norm=1e-9, noise_multiplier=1e9, expected_batch_size=1)
    limit = bound.limits(plan, {"x.lora_A.weight": (numel, 1)}, 1)["A"] / 1.01
    assert stats.chi2.sf(limit**2, numel) <= 1e-12


def test_noise_of_tensors_trained_in_different_numbers_of_steps():
    """Traces add up; the operator norm is that of the tensor trained most."""
    plan = make_plan("alternate", layer_modes={"y": "A"}, train_head=False, lr_a=1.0)
    bound = UpdateBound(max_grad_norm=1e-9, noise_multiplier=1e9, expected_batch_size=1)
    shapes = {"x.lora_A.weight": (2, 1), "y.lora_A.weight": (1, 1)}
    expected = math.sqrt(2 * 3 + 6) + math.sqrt(2 * math.log(1e12) * 6)
    assert bound.limits(plan, shapes, 1)["A"] == pytest.approx(1.01 * expected)


def adam_distance(gradients: np.ndarray) -> float:
    """Where torch's AdamW ends, in learning rates; NaN marks a step without gradient."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1.0, weight_decay=0.0)
    for value in gradients:
        parameter.grad = None if np.isnan(value) else torch.tensor([value], dtype=torch.float32)
        optimizer.step()
    return float(parameter.detach().abs())


def adam_limit(steps: int) -> float:
    plan = make_plan("A", train_head=False, local_steps=steps, lr_a=1.0, optimizer="adamw")
    bound = UpdateBound(max_grad_norm=1.0, noise_multiplier=1.0, sample_rate=0.1)
    return bound.limits(plan, {"x.lora_A.weight": (1, 1)})["A"]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from([-1, 1, 1, 1]), st.floats(-12, 12)).map(
            lambda pair: pair[0] * 10.0 ** pair[1]
        ),
        min_size=1,
        max_size=25,
    )
)
def test_adamw_never_exceeds_its_bound(gradients):
    assert adam_distance(np.array(gradients)) <= adam_limit(len(gradients))


@pytest.mark.parametrize("steps", [1, 2, 6, 30, 200])
def test_growing_gradients_reach_the_bound_of_adamw(steps):
    """Gradients in proportion to w_i / u_i are the equality case of every step at once."""
    growth = 0.999 / 0.9
    worst = adam_distance(growth ** np.arange(steps))
    assert adam_limit(steps) == pytest.approx(1.01 * worst, rel=1e-5)


def test_adamw_counts_only_the_steps_that_train_a_tensor():
    plan = make_plan("alternate", local_steps=12, optimizer="adamw")
    limits = UpdateBound(**CLIPS, noise_multiplier=1.0, sample_rate=0.1).limits(plan, SHAPES)
    sizes = {k: sum(math.prod(s) for n, s in SHAPES.items() if kind_of(n) == k) for k in limits}
    for kind, lr, steps in [("A", 0.3, 6), ("B", 0.7, 6), ("head", 0.1, 12)]:
        expected = lr * math.sqrt(sizes[kind]) * adam_limit(steps)
        assert limits[kind] == pytest.approx(expected)
    idle = np.where(np.arange(12) % 2, 1.11 ** np.arange(12), np.nan)
    assert adam_distance(idle) <= adam_limit(6)


def test_records_alone_full_batches_and_clip_norms():
    """Without noise at q = 1 all is certain: lr times the sum of clip norms."""
    bound = UpdateBound(**CLIPS, noise_multiplier=0, sample_rate=1.0)
    for mode, sums in {
        "A": {"A": 6 * 0.5, "head": 6 * 0.5},
        "B": {"B": 6 * 2.0, "head": 6 * 2.0},
        "both": {"A": 6.0, "B": 6.0, "head": 6.0},
        "alternate": {"A": 3 * 0.5, "B": 3 * 2.0, "head": 3 * 0.5 + 3 * 2.0},
    }.items():
        plan = make_plan(mode)
        rates = {"A": 0.3, "B": 0.7, "head": 0.1}
        expected = {kind: 1.01 * rates[kind] * total for kind, total in sums.items()}
        assert bound.limits(plan, SHAPES, 50) == pytest.approx(expected)


def test_own_clip_norms_default_to_the_common_one():
    bound = UpdateBound(max_grad_norm=3.0, noise_multiplier=1.0, expected_batch_size=8)
    given = dataclasses.replace(bound, max_grad_norm_a=3.0, max_grad_norm_b=3.0)
    plan = make_plan("alternate")
    assert bound.limits(plan, SHAPES) == given.limits(plan, SHAPES)


def test_a_false_count_gains_no_weight_for_noise():
    """Weight times the noise part is the same for every count."""
    plan = make_plan("both")
    noisy = UpdateBound(max_grad_norm=1.0, noise_multiplier=2.0, sample_rate=0.1)
    quiet = dataclasses.replace(noisy, noise_multiplier=0)

    def weighted(count: int) -> float:
        return count * (
            noisy.limits(plan, SHAPES, count)["A"] - quiet.limits(plan, SHAPES, count)["A"]
        )

    assert weighted(10) == pytest.approx(weighted(100_000))


def test_a_client_below_the_batch_size_takes_all_its_records():
    """As PrivacyPlan.for_client has it: q = 1 and b = count."""
    by_size = UpdateBound(max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=64)
    by_rate = UpdateBound(max_grad_norm=1.0, noise_multiplier=1.0, sample_rate=1.0)
    plan = make_plan("both")
    assert by_size.limits(plan, SHAPES, 20) == by_rate.limits(plan, SHAPES, 20)
    known, unknown = by_size.limits(plan, SHAPES, 128), by_size.limits(plan, SHAPES)
    assert all(known[kind] < unknown[kind] for kind in known)


def test_a_missing_or_impossible_count_is_named():
    bound = UpdateBound(max_grad_norm=1.0, noise_multiplier=1.0, sample_rate=0.1)
    with pytest.raises(ValueError, match="count is missing"):
        bound.limits(make_plan(), SHAPES)
    for count in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="count must be > 0"):
            bound.limits(make_plan(), SHAPES, count)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm must be > 0"),
        ({"max_grad_norm": math.inf}, "max_grad_norm must be > 0 and finite"),
        ({"max_grad_norm_a": -1.0}, "max_grad_norm_a must be > 0"),
        ({"max_grad_norm_b": math.nan}, "max_grad_norm_b must be > 0"),
        ({"noise_multiplier": -0.1}, "noise_multiplier must be >= 0"),
        ({"noise_multiplier": math.inf}, "noise_multiplier must be >= 0 and finite"),
        ({"sample_rate": 0.0}, "sample_rate must be > 0"),
        ({"sample_rate": 1.5}, r"sample_rate must be in \(0, 1\]"),
        ({"sample_rate": None, "expected_batch_size": 0}, "expected_batch_size must be > 0"),
        ({"sample_rate": None}, "exactly one"),
        ({"expected_batch_size": 8}, "exactly one"),
    ],
)
def test_numbers_that_give_no_bound_are_refused(changes, message):
    numbers = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "sample_rate": 0.1}
    with pytest.raises(ValueError, match=message):
        UpdateBound(**{**numbers, **changes})
