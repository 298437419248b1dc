"""The private step as a whole: noise scale, sensitivity, empty batches, plain SGD as a limit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from privacy import (
    HookEngine,
    PrivacyPlan,
    PrivateGradient,
    SecureSource,
    SeededTestSource,
    privatize,
)


def plan_of(**changes) -> PrivacyPlan:
    numbers = {
        "sample_rate": 0.5,
        "expected_batch_size": 10.0,
        "max_grad_norm": 2.0,
        "noise_multiplier": 3.0,
        "steps": 1000,
        "target_delta": 1e-5,
    }
    return PrivacyPlan(**{**numbers, **changes})


class Problem:
    """A linear least-squares problem with 20 records."""

    def __init__(self, records: int = 20, bias: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Linear(3, 2, bias=bias)
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator)).requires_grad_(False)
                p.requires_grad_(False)
        self.x = torch.randn(records, 3, generator=generator)
        self.y = torch.randn(records, 2, generator=generator)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.batches: list[np.ndarray] = []

    def losses(self, indices: np.ndarray) -> torch.Tensor:
        self.batches.append(indices)
        return (self.model(self.x[indices]) - self.y[indices]).square().sum(dim=1)

    def gradient(self, plan: PrivacyPlan, source=None) -> PrivateGradient:
        engine = HookEngine(self.model, dict(self.model.named_parameters()))
        source = source or SecureSource()
        return PrivateGradient(plan, engine, len(self.x), self.losses, source, plan.steps)


def test_noise_has_the_plans_scale_on_every_tensor():
    """Chi-square on pooled noise of 400 releases, 3,200 values; false alarm 1e-3, seed fixed.

    Mistakes: noise divided by the drawn batch or by the number of clients, noise per tensor.
    """
    plan = plan_of()
    zeros = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    source = SeededTestSource((1,))
    draws = [privatize(zeros, plan, "mixed", source) for _ in range(400)]
    for name in zeros:
        values = torch.stack([draw[name] for draw in draws]).double().flatten()
        expected = plan.noise_multiplier * plan.max_grad_norm / plan.expected_batch_size
        chi2 = float((values / expected).square().sum())
        low, high = stats.chi2.ppf([5e-4, 1 - 5e-4], len(values))
        assert low < chi2 < high
    weight = torch.stack([draw["weight"].flatten() for draw in draws]).numpy()
    correlations = np.corrcoef(weight.T)[np.triu_indices(6, 1)]
    assert np.abs(correlations).max() * math.sqrt(400) < 4.5


def test_the_factors_own_clip_norm_scales_its_noise():
    plan = plan_of(max_grad_norm_a=0.5)
    zeros = {"w": torch.zeros(50_000)}
    std = {
        kind: privatize(zeros, plan, kind, SeededTestSource((2,)))["w"].std().item()
        for kind in ("A", "B")
    }
    assert std["A"] == pytest.approx(3.0 * 0.5 / 10, rel=0.02)
    assert std["B"] == pytest.approx(3.0 * 2.0 / 10, rel=0.02)


def test_clients_steps_and_tensors_get_independent_noise():
    plan = plan_of()
    zeros = {"a": torch.zeros(5000), "b": torch.zeros(5000)}
    first, second = (privatize(zeros, plan, "mixed", SecureSource()) for _ in range(2))
    draws = torch.stack([first["a"], first["b"], second["a"], second["b"]]).numpy()
    correlations = np.corrcoef(draws)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() * math.sqrt(5000) < 5.5  # false alarm 2e-7, secure noise


def test_divides_by_the_public_batch_size_not_the_drawn_one():
    """Mistake: the drawn batch's size as normaliser, which is private and breaks the bound."""
    problem = Problem()
    plan = plan_of(noise_multiplier=0.0, max_grad_norm=math.inf)
    gradient = problem.gradient(plan, SeededTestSource((4,)))
    sizes = set()
    for _ in range(5):
        got = gradient.step(problem.names, "mixed")
        indices = problem.batches[-1]
        sizes.add(len(indices))
        error = 2 * (problem.model(problem.x[indices]) - problem.y[indices])
        expected = (error.T @ problem.x[indices]) / 10.0
        assert torch.allclose(got["weight"], expected, atol=1e-5)
    assert len(sizes) > 1


def test_without_noise_and_clipping_it_is_plain_sgd():
    """sigma = 0, C = infinity, q = 1: the same weights as torch's own SGD on the mean loss."""
    problem, twin = Problem(), Problem()
    plan = plan_of(
        noise_multiplier=0.0, max_grad_norm=math.inf, sample_rate=1.0, expected_batch_size=20.0
    )
    gradient = problem.gradient(plan)
    for p in twin.model.parameters():
        p.requires_grad_(True)
    ours = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    reference = torch.optim.SGD(twin.model.parameters(), lr=0.1)
    for _ in range(10):
        for name, value in gradient.step(problem.names, "mixed").items():
            problem.model.get_parameter(name).grad = value
        ours.step()
        reference.zero_grad()
        twin.losses(np.arange(20)).mean().backward()
        reference.step()
    for name in problem.names:
        assert torch.allclose(
            problem.model.get_parameter(name), twin.model.get_parameter(name), atol=1e-6
        )


def test_a_neighbour_changes_the_released_sum_by_at_most_the_clip_norm():
    problem = Problem()
    plan = plan_of(
        noise_multiplier=0.0, max_grad_norm=0.7, sample_rate=1.0, expected_batch_size=20.0
    )
    whole = problem.gradient(plan).step(problem.names, "mixed")
    problem.y[7] = problem.model(problem.x[7])  # this record's gradient is zero now: zeroed out
    zeroed = problem.gradient(plan).step(problem.names, "mixed")
    moved = math.sqrt(sum(float((whole[n] - zeroed[n]).square().sum()) for n in whole)) * 20
    assert 0.1 < moved <= 0.7 * (1 + 1e-4)


def test_empty_batches_are_noised_and_counted():
    """Mistake: skipping empty batches, whose absence tells that nobody was drawn."""
    problem = Problem(records=3)
    plan = plan_of(sample_rate=0.05, expected_batch_size=0.15)
    gradient = problem.gradient(plan, SeededTestSource((9,)))
    releases = [gradient.step(problem.names, "mixed") for _ in range(30)]
    assert gradient.steps_taken == 30
    assert len(problem.batches) < 30  # the model ran only where somebody was drawn
    assert all(bool(value.ne(0).all()) for r in releases for value in r.values())


def test_only_active_tensors_are_released():
    problem = Problem()
    got = problem.gradient(plan_of()).step(["bias"], "B")
    assert list(got) == ["bias"]
    assert all(p.grad is None for p in problem.model.parameters())
