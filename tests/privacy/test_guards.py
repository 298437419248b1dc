"""Refusals: normalisation layers that mix or remember records, and a self-check with teeth."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from privacy import EngineError, HookEngine, check_engine


class Normed(nn.Module):
    """A linear layer behind a normalisation."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.layer = norm, nn.Linear(4, 2)
        self.requires_grad_(False)

    def forward(self, x):
        return self.layer(self.norm(x).mean(dim=-1))

    def clipped_sum(self, x):
        engine = HookEngine(self, {"weight": self.layer.weight})
        return engine.clipped_sum(["weight"], lambda: self(x).square().sum(dim=1), len(x), 1.0)


def images(records: int = 3) -> torch.Tensor:
    return torch.randn(records, 4, 6, generator=torch.Generator().manual_seed(0))


def test_instance_norm_that_keeps_statistics_is_refused_in_training():
    """Mistake: running means of raw records stay in the model without noise."""
    model = Normed(nn.InstanceNorm1d(4, track_running_stats=True)).train()
    before = model.norm.running_mean.clone()
    with pytest.raises(EngineError, match="norm is a InstanceNorm1d in training mode"):
        model.clipped_sum(images())
    assert torch.equal(model.norm.running_mean, before)  # refused before a record was seen
    assert model.eval().clipped_sum(images())["weight"].any()


def test_instance_norm_of_each_record_alone_is_taken():
    model = Normed(nn.InstanceNorm1d(4)).train()
    assert model.clipped_sum(images() + 1)["weight"].shape == (2, 4)


class Factors(nn.Module):
    """LoRA factors at their start: B is zero."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a, self.b, self.base = (
                nn.Linear(4, 2, bias=False),
                nn.Linear(2, 3, bias=False),
                nn.Linear(4, 3),
            )
            self.x = torch.randn(3, 5, 4)
        nn.init.zeros_(self.b.weight)
        self.requires_grad_(False)
        self.adapter = {"a": self.a.weight, "b": self.b.weight}

    def losses(self, rows: slice) -> torch.Tensor:
        x = self.x[rows]
        return (self.base(x) + self.b(self.a(x))).square().sum(dim=(1, 2))


class WrongOnA:
    """An engine that is right about every factor but A."""

    def __init__(self, model: Factors) -> None:
        self._engine = HookEngine(model, model.adapter)

    def per_record_gradients(self, active, losses, num_records):
        rows = self._engine.per_record_gradients(active, losses, num_records)
        return {name: row * (3.0 if name == "a" else 1.0) for name, row in rows.items()}


def test_the_self_check_sees_a_although_b_starts_at_zero():
    """At B = 0 all gradients of A are zero: any engine would pass, were B not filled first."""
    model = Factors()
    check_engine(HookEngine(model, model.adapter), model.adapter, model.losses, 3)
    with pytest.raises(EngineError, match="a: gradients in a batch differ"):
        check_engine(WrongOnA(model), model.adapter, model.losses, 3)
    assert not model.b.weight.any()


def test_the_self_check_finds_one_wrong_record_among_right_ones():
    class WrongOnOne(WrongOnA):
        def per_record_gradients(self, active, losses, num_records):
            rows = self._engine.per_record_gradients(active, losses, num_records)
            return {name: row * torch.tensor([1.0, 1.02, 1.0])[:, None, None]
                    for name, row in rows.items()}  # fmt: skip

    model = Factors()
    with pytest.raises(EngineError, match=r"by 0\.02"):
        check_engine(WrongOnOne(model), model.adapter, model.losses, 3)


def test_the_self_check_tries_every_set_that_a_step_may_train():
    class WrongOnAAlone(WrongOnA):
        def per_record_gradients(self, active, losses, num_records):
            rows = self._engine.per_record_gradients(active, losses, num_records)
            return {name: row * (1.0 if len(active) > 1 else 1.1) for name, row in rows.items()}

    model = Factors()
    check_engine(WrongOnAAlone(model), model.adapter, model.losses, 3)
    with pytest.raises(EngineError, match=r"a: gradients .* by 0\.1"):
        check_engine(WrongOnAAlone(model), model.adapter, model.losses, 3, sets=[["a", "b"], ["a"]])
    assert not model.b.weight.any()
