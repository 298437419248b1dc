"""What a step clips to and what it noises at must be one number, for every kind of step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from privacy import (
    HookEngine,
    PrivacyPlan,
    PrivateGradient,
    SecureSource,
    SeededTestSource,
    privatize,
    standard_normal,
)

OWN = {"A": 0.25, "B": 0.5, "mixed": 2.0}


def plan_of(noise_multiplier: float = 3.0) -> PrivacyPlan:
    return PrivacyPlan(
        sample_rate=1.0, expected_batch_size=1.0, max_grad_norm=OWN["mixed"],
        max_grad_norm_a=OWN["A"], max_grad_norm_b=OWN["B"],
        noise_multiplier=noise_multiplier, steps=10_000, target_delta=1e-5,
    )  # fmt: skip


class OneRecord:
    """A model with one record of a large gradient, and all of its parameters."""

    def __init__(self) -> None:
        self.model = nn.Linear(3, 2).requires_grad_(False)
        self.names = [name for name, _ in self.model.named_parameters()]

    def losses(self, indices) -> torch.Tensor:
        return (self.model(100 * torch.ones(len(indices), 3)) - 1e4).square().sum(dim=1)

    def release(self, kind: str, *, noise_multiplier: float) -> torch.Tensor:
        engine = HookEngine(self.model, dict(self.model.named_parameters()))
        plan = plan_of(noise_multiplier)
        gradient = PrivateGradient(plan, engine, 1, self.losses, SecureSource(), plan.steps)
        released = gradient.step(self.names, kind)
        return torch.cat([value.flatten() for value in released.values()])


@pytest.mark.parametrize("kind", OWN)
def test_a_step_clips_to_the_norm_of_its_own_kind(kind):
    """Mistake: clipping to the common norm but noising at the smaller one of A."""
    clipped = OneRecord().release(kind, noise_multiplier=0.0)
    assert clipped.norm().item() == pytest.approx(OWN[kind], rel=1e-5)


@pytest.mark.parametrize("kind", OWN)
def test_a_step_noises_at_the_norm_it_clips_to(kind):
    """8,000 draws: 5 % is beyond 6 sigma."""
    problem = OneRecord()
    clipped = problem.release(kind, noise_multiplier=0.0)
    draws = torch.stack([problem.release(kind, noise_multiplier=3.0) for _ in range(1000)])
    assert (draws - clipped).std().item() == pytest.approx(3.0 * OWN[kind], rel=0.05)


class Counted:
    """The operating system's words, counted."""

    secure = True

    def __init__(self) -> None:
        self.asked: list[int] = []

    def words(self, count: int):
        self.asked.append(count)
        return SecureSource().words(count)


def test_noise_is_the_sources_normals_and_every_value_has_a_word_of_its_own():
    """Mistakes: torch's seedable generator, uniform noise of the right scale, noise used twice."""
    sums = {"weight": torch.ones(4, 5), "bias": torch.ones(7)}
    counted = Counted()
    privatize(sums, plan_of(), "B", counted)
    assert counted.asked == [20, 7]
    released = privatize(sums, plan_of(), "B", SeededTestSource((1,)))
    twin = SeededTestSource((1,))
    for name, total in sums.items():
        expected = total + 3.0 * OWN["B"] * standard_normal(twin, total.shape)
        torch.testing.assert_close(released[name], expected.float(), rtol=0, atol=0)
