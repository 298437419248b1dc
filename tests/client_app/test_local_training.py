"""A client's round: what each step may move, and by how much."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from client_app import local_training
from client_app.local_training import TrainingError, step_kind, train_round
from privacy import HookEngine, PrivacyPlan, PrivateGradient, SecureSource
from strategies import RoundPlan, kind_of
from strategies.round_plan import Mode

RECORDS = 24
MODES: tuple[Mode, ...] = ("A", "B", "both", "alternate")
PRIVATE = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}
NOT_PRIVATE = {"noise_multiplier": 0.0, "max_grad_norm": math.inf}


def privacy_plan(numbers=PRIVATE) -> PrivacyPlan:
    return PrivacyPlan(
        sample_rate=0.5,
        expected_batch_size=0.5 * RECORDS,
        steps=100,
        target_delta=1e-5,
        **numbers,
    )


def round_plan(mode: Mode = "alternate", **changes) -> RoundPlan:
    numbers = {"server_round": 1, "local_steps": 4, "lr_a": 0.5, "lr_b": 0.25, "lr_head": 0.125}
    return RoundPlan(mode=mode, **{**numbers, **changes})


class Adapted(nn.Module):
    """A frozen linear layer with LoRA factors."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.lora_A = nn.Linear(inputs, rank, bias=False)
        self.lora_B = nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base(x) + self.lora_B(self.lora_A(x))


class Net(nn.Module):
    """Two adapted layers and a head, as small as the low-pass filter allows."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second = Adapted(6, 8, 2), Adapted(8, 5, 2)
            self.head = nn.Linear(5, 3)
            self.x, self.y = torch.randn(RECORDS, 6), torch.randint(0, 3, (RECORDS,))
        self.requires_grad_(False)
        self.adapter = {
            name: p for name, p in self.named_parameters() if "lora_" in name or "head" in name
        }

    def losses(self, indices):
        hidden = torch.tanh(self.first(self.x[indices]))
        logits = self.head(torch.tanh(self.second(hidden)))
        return nn.functional.cross_entropy(logits, self.y[indices], reduction="none")

    def gradient(self, numbers=PRIVATE) -> PrivateGradient:
        engine = HookEngine(self, self.adapter)
        plan = privacy_plan(numbers)
        return PrivateGradient(plan, engine, RECORDS, self.losses, SecureSource(), plan.steps)

    def snapshot(self):
        return {name: p.detach().clone() for name, p in self.named_parameters()}


class Scripted:
    """Stands for a PrivateGradient: releases random numbers and keeps a record of everything."""

    def __init__(self, adapter, numbers=PRIVATE, spoil=None) -> None:
        self.plan = privacy_plan(numbers)
        self.calls: list[tuple[tuple[str, ...], str]] = []
        self.released: list[dict[str, torch.Tensor]] = []
        self.values: list[dict[str, torch.Tensor]] = []
        self._adapter, self._spoil = adapter, spoil
        self._generator = torch.Generator().manual_seed(5)

    def step(self, active, kind):
        self.calls.append((tuple(active), kind))
        self.values.append({name: p.detach().clone() for name, p in self._adapter.items()})
        released = {
            name: torch.randn(self._adapter[name].shape, generator=self._generator)
            for name in active
        }
        if self._spoil is not None:
            self._spoil(len(self.calls), released, self._adapter)
        self.released.append({name: value.clone() for name, value in released.items()})
        return released

    def movements(self, after) -> list[set[str]]:
        """Names that moved in each step."""
        values = [*self.values, {name: p.detach() for name, p in after.items()}]
        return [
            {name for name in one if not torch.equal(one[name], two[name])}
            for one, two in itertools.pairwise(values)
        ]


layer_modes = st.dictionaries(st.sampled_from(["first", "second"]), st.sampled_from(MODES))


@settings(max_examples=40, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    layers=layer_modes,
    train_head=st.booleans(),
    optimizer=st.sampled_from(["sgd", "adamw"]),
    low_pass=st.booleans(),
)
def test_active_tensors_move_and_all_others_keep_every_bit(
    mode, layers, train_head, optimizer, low_pass
):
    net = Net()
    before = net.snapshot()
    plan = round_plan(mode, layer_modes=layers, train_head=train_head, optimizer=optimizer,
                      low_pass=low_pass)  # fmt: skip
    gradient = net.gradient()
    update = train_round(plan, net.adapter, gradient)
    after = net.snapshot()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(plan.uploaded(net.adapter)) == set(update)
    assert list(update) == list(plan.uploaded(net.adapter))
    assert gradient.steps_taken == plan.local_steps
    for name, change in update.items():
        assert change.dtype == torch.float32 and change.device.type == "cpu"
        assert torch.equal(change, after[name] - before[name])
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())


@settings(max_examples=40, deadline=None)
@given(mode=st.sampled_from(MODES), layers=layer_modes, steps=st.sampled_from([2, 4, 6]))
def test_each_step_moves_what_it_trains_and_nothing_else(mode, layers, steps):
    net = Net()
    plan = round_plan(mode, layer_modes=layers, local_steps=steps, optimizer="adamw")
    gradient = Scripted(net.adapter)
    train_round(plan, net.adapter, gradient)
    moved = gradient.movements(net.adapter)
    assert len(moved) == steps
    for step, (names, (active, kind)) in enumerate(zip(moved, gradient.calls, strict=True), 1):
        assert names == set(active) == set(plan.active(step, net.adapter))
        factors = {kind_of(name) for name in active} - {"head"}
        assert kind == (factors.pop() if len(factors) == 1 else "mixed")


def test_alternation_starts_at_b_in_every_round():
    """Mistake: an A-first step, which at B = 0 is noise alone."""
    for server_round in (1, 2):
        net = Net()
        gradient = Scripted(net.adapter)
        train_round(round_plan(server_round=server_round), net.adapter, gradient)
        assert [kind for _, kind in gradient.calls] == ["B", "A", "B", "A"]


def test_with_b_at_zero_a_step_on_a_alone_has_no_signal():
    net = Net()
    update = train_round(round_plan("A", local_steps=1), net.adapter, net.gradient(NOT_PRIVATE))
    assert all(not change.any() for name, change in update.items() if kind_of(name) == "A")
    assert update["head.weight"].any()
    b_first = train_round(round_plan("B", local_steps=1), net.adapter, net.gradient(NOT_PRIVATE))
    assert all(bool(change.any()) for name, change in b_first.items() if kind_of(name) == "B")
    then_a = train_round(round_plan("A", local_steps=1), net.adapter, net.gradient(NOT_PRIVATE))
    assert all(bool(change.any()) for name, change in then_a.items() if kind_of(name) == "A")


def test_each_factor_keeps_moments_of_its_own_under_adamw():
    """Under alternation A's steps are those of an optimizer that never heard of B's."""
    net = Net()
    start = {name: p.detach().clone() for name, p in net.adapter.items()}
    gradient = Scripted(net.adapter)
    train_round(round_plan(local_steps=6, optimizer="adamw"), net.adapter, gradient)
    rates = {"A": 0.5, "B": 0.25, "head": 0.125}
    for name, p in net.adapter.items():
        value = start[name].double()
        first, second = torch.zeros_like(value), torch.zeros_like(value)
        own = [released[name].double() for released in gradient.released if name in released]
        assert len(own) == (6 if kind_of(name) == "head" else 3)
        for count, g in enumerate(own, 1):
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            debiased = (second / (1 - 0.999**count)).sqrt() + 1e-8
            value = value - rates[kind_of(name)] * first / (1 - 0.9**count) / debiased
        torch.testing.assert_close(p.detach().double(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["A", "B"])
def test_frozen_factors_have_no_optimizer_state_and_no_gradient(monkeypatch, mode):
    made = []
    make = local_training._make_optimizer

    def noted(*arguments):
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(local_training, "_make_optimizer", noted)
    net = Net()
    train_round(round_plan(mode, optimizer="adamw"), net.adapter, Scripted(net.adapter))
    (optimizer,) = made
    trained = {id(p) for name, p in net.adapter.items() if kind_of(name) in (mode, "head")}
    assert {id(p) for p in optimizer.state} == trained
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())


def smooth(gradient: torch.Tensor, axis: int) -> np.ndarray:
    """Binomial filter by numpy's own symmetric padding and convolution."""

    def line(values):
        return np.convolve(np.pad(values, 2, mode="symmetric"), np.array([1, 4, 6, 4, 1]) / 16,
                           "valid")  # fmt: skip

    return np.apply_along_axis(line, axis, gradient.double().numpy())


@pytest.mark.parametrize("low_pass", [False, True])
@pytest.mark.parametrize("mode", ["both", "alternate"])
def test_sgd_with_a_rate_per_factor_and_the_filter_on_factors_only(low_pass, mode):
    net = Net()
    gradient = Scripted(net.adapter)
    update = train_round(round_plan(mode, low_pass=low_pass), net.adapter, gradient)
    rates = {"A": 0.5, "B": 0.25, "head": 0.125}
    for name, change in update.items():
        kind = kind_of(name)
        total = np.zeros(change.shape)
        for released in gradient.released:
            if name in released:
                value = released[name]
                filtered = low_pass and kind != "head"
                total += smooth(value, 1 if kind == "A" else 0) if filtered else value.numpy()
        np.testing.assert_allclose(change.numpy(), -rates[kind] * total, rtol=1e-4, atol=1e-5)


def test_optimizer_state_starts_afresh_every_round():
    """Two rounds from the same start with the same releases are the same round."""
    updates = []
    net = Net()
    start = {name: p.detach().clone() for name, p in net.adapter.items()}
    for _ in range(2):
        with torch.no_grad():
            for name, p in net.adapter.items():
                p.copy_(start[name])
        updates.append(train_round(round_plan(optimizer="adamw"), net.adapter,
                                   Scripted(net.adapter)))  # fmt: skip
    assert all(torch.equal(updates[0][name], updates[1][name]) for name in updates[0])


def nudge(step, name):
    """Move a tensor behind the optimizer's back during one step."""

    def spoil(count, _released, adapter):
        if count == step:
            with torch.no_grad():
                adapter[name][0, 0] += 1.0

    return spoil


def zero(step, name):
    """Release nothing but zeros for one tensor, at one step."""

    def spoil(count, released, _adapter):
        if count == step and name in released:
            released[name].zero_()

    return spoil


A, B = "first.lora_A.weight", "second.lora_B.weight"
UNCHECKED = "local_training checks step by step only at step 1, and movement under noise only there"


@pytest.mark.parametrize(
    ("mode", "step", "name"),
    [("B", 1, A), ("B", 3, A), ("A", 1, B), ("A", 4, B), ("alternate", 1, A)],
)
def test_a_frozen_tensor_that_moves_stops_the_client(mode, step, name):
    net = Net()
    with pytest.raises(TrainingError, match=f"{name} moved"):
        train_round(round_plan(mode), net.adapter, Scripted(net.adapter, spoil=nudge(step, name)))


def test_a_factor_that_moves_in_the_other_ones_step_stops_the_client():
    net = Net()
    with pytest.raises(TrainingError, match=f"{B} moved"):
        train_round(round_plan(), net.adapter, Scripted(net.adapter, spoil=nudge(2, B)))


@pytest.mark.parametrize(
    ("mode", "name"), [("B", B), ("A", A), ("both", A), ("alternate", B), ("B", "head.weight")]
)
def test_training_nothing_in_silence_is_noticed(mode, name):
    """Opacus #820: after the active factor is switched, gradients of the new one stay away."""
    net = Net()
    with pytest.raises(TrainingError, match=f"{name} did not move"):
        train_round(round_plan(mode), net.adapter, Scripted(net.adapter, spoil=zero(1, name)))


@pytest.mark.parametrize("missing", [B, "head.weight"])
def test_a_release_that_lacks_an_active_tensor_is_noticed(missing):
    net = Net()

    def drop(_count, released, _adapter):
        released.pop(missing, None)

    with pytest.raises(TrainingError, match=f"{missing} did not move"):
        train_round(round_plan("B"), net.adapter, Scripted(net.adapter, spoil=drop))


def test_training_nothing_in_silence_is_noticed_after_the_switch():
    """The second step of LA-LoRA is where opacus #820 strikes: A would stay at its start."""
    net = Net()

    def never_a(_count, released, _adapter):
        for name in released:
            if kind_of(name) == "A":
                released[name].zero_()

    with pytest.raises(TrainingError, match="did not move"):
        train_round(round_plan(), net.adapter, Scripted(net.adapter, spoil=never_a))


def test_without_noise_a_tensor_may_stay_where_it_is():
    """An empty batch without noise moves nothing, and that is right."""
    net = Net()
    gradient = Scripted(net.adapter, NOT_PRIVATE, spoil=zero(1, B))
    update = train_round(round_plan("B", local_steps=1), net.adapter, gradient)
    assert not update[B].any()


def test_kind_of_a_step_chooses_its_clip_norm():
    assert step_kind([A, "head.weight"]) == "A"
    assert step_kind([B, "head.weight"]) == "B"
    assert step_kind([A, B]) == step_kind([A, B, "head.bias"]) == "mixed"
    assert step_kind(["head.weight"]) == "mixed"
