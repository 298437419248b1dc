"""The engine against one autograd pass per record, on every model family."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from privacy import (
    EngineError,
    HookEngine,
    check_engine,
    clipped_sum_by_autograd,
    per_record_gradients_by_autograd,
)

KINDS = ("vit", "swin", "roberta", "bert")
SETS = ("A", "B", "both", "A+head", "B+head", "both+head", "head")


def active_names(task_model, which: str) -> list[str]:
    factors = {"A": (".lora_A.",), "B": (".lora_B.",), "both": (".lora_A.", ".lora_B.")}
    marks = factors.get(which.split("+")[0], ())
    head = which.endswith("head")
    return [
        n
        for n in task_model.adapter
        if any(mark in n for mark in marks) or (head and ".lora_" not in n)
    ]


def rows_of(batch, rows):
    return {name: value[rows] for name, value in batch.items()}


def relative_error(one, other) -> float:
    difference = sum(float((one[n] - other[n]).double().square().sum()) for n in one)
    scale = sum(float(other[n].double().square().sum()) for n in other)
    return math.sqrt(difference / scale)


@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_clipped_sums_equal_the_autograd_loop(model_of, kind, which):
    task_model = model_of(kind)
    engine = HookEngine(task_model.model, task_model.adapter)
    active = active_names(task_model, which)
    assert active
    batch = task_model.made_up_batch(5)
    got = engine.clipped_sum(active, lambda: task_model.per_record_losses(batch), 5, 0.3)
    expected = clipped_sum_by_autograd(
        {name: task_model.adapter[name] for name in active},
        lambda j: task_model.per_record_losses(rows_of(batch, slice(j, j + 1))),
        5,
        0.3,
    )
    assert list(got) == active
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_one_record_moves_the_sum_by_at_most_the_clip_norm(model_of, kind):
    """Add-one sensitivity on the model, over adapters and head jointly, noise off.

    Mistake: on Swin, windows taken for records let one record contribute several times C.
    """
    task_model = model_of(kind)
    engine = HookEngine(task_model.model, task_model.adapter)
    batch = task_model.made_up_batch(4, seed=2)
    fewer = rows_of(batch, slice(0, 3))
    norm = 0.01  # far below every record's gradient, so that the bound is met exactly
    for which in ("A+head", "B+head", "both+head"):
        active = active_names(task_model, which)
        whole = engine.clipped_sum(active, lambda: task_model.per_record_losses(batch), 4, norm)
        part = engine.clipped_sum(active, lambda: task_model.per_record_losses(fewer), 3, norm)
        moved = math.sqrt(sum(float((whole[n] - part[n]).double().square().sum()) for n in active))
        assert moved == pytest.approx(norm, rel=1e-4)


def test_switching_factors_leaves_nothing_behind(model_of):
    task_model = model_of("vit")
    engine = HookEngine(task_model.model, task_model.adapter)
    batch = task_model.made_up_batch(3)
    sums = [
        engine.clipped_sum(
            active_names(task_model, which), lambda: task_model.per_record_losses(batch), 3, 1.0
        )
        for which in ("B+head", "A+head", "B+head")
    ]
    assert set(sums[0]).isdisjoint(n for n in task_model.adapter if ".lora_A." in n)
    assert all(torch.equal(sums[0][name], sums[2][name]) for name in sums[0])
    assert all(p.grad is None for p in task_model.model.parameters())  # no raw gradient anywhere
    assert not any(m._forward_hooks for m in task_model.model.modules())


def test_an_empty_batch_does_not_run_the_model(model_of):
    task_model = model_of("bert")
    engine = HookEngine(task_model.model, task_model.adapter)

    def never():
        raise AssertionError("the model ran")

    got = engine.clipped_sum(list(task_model.adapter), never, 0, 1.0)
    assert {n: v.shape for n, v in got.items()} == {
        n: p.shape for n, p in task_model.adapter.items()
    }
    assert all(not value.any() for value in got.values())


@pytest.mark.parametrize("kind", ["vit", "roberta"])
def test_a_poisoned_record_contributes_zero_through_the_model(model_of, kind):
    task_model = model_of(kind)
    engine = HookEngine(task_model.model, task_model.adapter)
    batch = task_model.made_up_batch(4)
    active = active_names(task_model, "B+head")

    def losses():
        values = task_model.per_record_losses(batch)
        return values * torch.tensor([1.0, math.nan, 1.0, 1.0])

    got = engine.clipped_sum(active, losses, 4, 1.0)
    others = rows_of(batch, [0, 2, 3])
    clean = engine.clipped_sum(active, lambda: task_model.per_record_losses(others), 3, 1.0)
    assert relative_error(got, clean) < 1e-5


def test_agrees_with_opacus_where_opacus_is_right(model_of):
    """ViT and BERT; Opacus takes Swin's windows for records, so it is no reference there."""
    from opacus import GradSampleModule

    for kind in ("vit", "bert"):
        task_model = model_of(kind)
        engine = HookEngine(task_model.model, task_model.adapter)
        active = active_names(task_model, "both+head")
        batch = task_model.made_up_batch(4)
        ours = engine.per_record_gradients(
            active, lambda b=batch, t=task_model: t.per_record_losses(b), 4
        )
        for name in active:
            task_model.adapter[name].requires_grad_(True)
        wrapped = GradSampleModule(task_model.model, loss_reduction="sum").train()  # it asks for it
        try:
            task_model.per_record_losses(batch).sum().backward()
            theirs = {n: task_model.adapter[n].grad_sample.clone() for n in active}
        finally:
            wrapped.remove_hooks()
            for p in task_model.adapter.values():
                p.requires_grad_(False)
                p.grad = None
        assert relative_error(ours, theirs) < 1e-5


def test_swin_windows_are_grouped_by_record(model_of):
    """The layers inside Swin's windows see records x windows; norms must be per record."""
    task_model = model_of("swin")
    engine = HookEngine(task_model.model, task_model.adapter)
    batch = task_model.made_up_batch(2)
    active = active_names(task_model, "B")
    got = engine.per_record_gradients(active, lambda: task_model.per_record_losses(batch), 2)
    slow = per_record_gradients_by_autograd(
        {n: task_model.adapter[n] for n in active},
        lambda j: task_model.per_record_losses(rows_of(batch, slice(j, j + 1))),
        2,
    )
    assert all(got[name].shape[0] == 2 for name in active)
    assert relative_error(got, slow) < 1e-5


# --- guards ---------------------------------------------------------------------------------


class Toy(nn.Module):
    """One adapted layer, in the ways a model can go wrong."""

    def __init__(self, twist: str = "") -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.twist = twist
        for p in self.parameters():
            p.requires_grad_(False)

    def forward(self, x):
        if self.twist == "batchnorm":
            x = self.norm(x)
        if self.twist == "reshape":
            x = torch.cat([x, x[:1]])
        if self.twist == "mix":
            x = x + x.flip(0)
        y = self.layer(x)
        if self.twist == "twice":
            y = self.layer(y)
        return y[: len(x) - 1] if self.twist == "reshape" else y


def toy_engine(model: Toy, *names: str) -> HookEngine:
    return HookEngine(model, {n: model.get_parameter(n) for n in names or ("layer.weight",)})


def toy_losses(model: Toy, records: int = 3):
    x = torch.randn(records, 4, generator=torch.Generator().manual_seed(0))
    return lambda: model(x).square().sum(dim=1)


@pytest.mark.parametrize(
    ("twist", "message"),
    [
        ("twice", "ran twice"),
        ("reshape", "does not divide"),
        ("batchnorm", "norm is a BatchNorm1d in training mode"),
    ],
)
def test_models_that_break_the_bound_are_refused(twist, message):
    model = Toy(twist)
    model.norm.train(twist == "batchnorm")
    with pytest.raises(EngineError, match=message):
        toy_engine(model).clipped_sum(["layer.weight"], toy_losses(model), 3, 1.0)


def test_batchnorm_in_eval_mode_is_fine():
    model = Toy("batchnorm").train()
    model.norm.eval()
    got = toy_engine(model).clipped_sum(["layer.weight"], toy_losses(model), 3, 1.0)
    assert got["layer.weight"].any()


def test_a_layer_outside_the_loss_is_refused():
    model = Toy()
    engine = toy_engine(model, "layer.weight", "unused.weight")
    model.norm.eval()
    with pytest.raises(EngineError, match=r"unused\.weight: its layer took no part"):
        engine.clipped_sum(["layer.weight", "unused.weight"], toy_losses(model), 3, 1.0)
    with pytest.raises(EngineError, match="none of the layers"):
        engine.clipped_sum(["unused.weight"], toy_losses(model), 3, 1.0)


@pytest.mark.parametrize("reduce", [torch.mean, torch.sum, lambda v: v[:2], lambda v: v.long()])
def test_losses_that_are_not_one_per_record_are_refused(reduce):
    model = Toy()
    model.norm.eval()
    losses = toy_losses(model)
    with pytest.raises(EngineError, match="one per record"):
        toy_engine(model).clipped_sum(["layer.weight"], lambda: reduce(losses()), 3, 1.0)


def test_only_tensors_of_one_linear_layer_are_taken():
    model = Toy()
    with pytest.raises(EngineError, match="BatchNorm1d; per-record gradients"):
        toy_engine(model, "norm.weight")
    model.unused = model.layer
    with pytest.raises(EngineError, match=r"norm\.weight"):
        toy_engine(model, "layer.weight", "norm.weight")
    stranger = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(EngineError, match="stranger: belongs to 0 layers"):
        HookEngine(model, {"stranger": stranger})


def test_a_weight_tied_between_two_layers_is_refused():
    model = Toy()
    model.unused.weight = model.layer.weight
    with pytest.raises(EngineError, match="belongs to 2 layers"):
        toy_engine(model)


def test_trainable_parameters_are_refused():
    model = Toy()
    model.layer.weight.requires_grad_(True)
    with pytest.raises(EngineError, match="must not require gradients"):
        toy_engine(model)


def check(model: Toy, losses) -> None:
    engine = toy_engine(model, "layer.weight", "layer.bias")
    adapter = {n: model.get_parameter(n) for n in ("layer.weight", "layer.bias")}
    check_engine(engine, adapter, losses, 3)


def test_the_self_check_passes_on_independent_records_and_restores_the_model(model_of):
    for kind in KINDS:
        task_model = model_of(kind, fresh=True)
        before = task_model.adapter_state()
        batch = task_model.made_up_batch(3)
        engine = HookEngine(task_model.model, task_model.adapter)
        check_engine(
            engine,
            task_model.adapter,
            lambda rows, b=batch, t=task_model: t.per_record_losses(rows_of(b, rows)),
            3,
        )
        after = task_model.adapter_state()
        assert all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("case", ["mix", "weighted mean", "order"])
def test_the_self_check_finds_coupled_records(case):
    """Mistakes that no shape shows: mixed records, class-weighted means, reordered batches."""
    model = Toy("mix" if case == "mix" else "").eval()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 5.0, 2.0])

    def losses(rows: slice):
        values = model(x[rows]).square().sum(dim=1)
        if case == "weighted mean":
            return values * weights[rows] / weights[rows].sum()
        return values.flip(0) * weights[rows] if case == "order" else values

    with pytest.raises(EngineError, match="couples records"):
        check(model, losses)


def test_the_self_check_needs_two_records():
    model = Toy().eval()
    with pytest.raises(ValueError, match="2 or more"):
        check_engine(toy_engine(model), {"w": model.layer.weight}, lambda rows: model(rows), 1)
