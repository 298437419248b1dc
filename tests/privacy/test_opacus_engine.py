"""What only the Opacus engine has to refuse or to put right; the contract is in test_engines.py."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from privacy import EngineError, per_record_gradients_by_autograd
from privacy.opacus_engine import OpacusEngine
from tests.privacy.test_engine_positions import RECORDS, Sequence
from tests.privacy.test_engines import traces
from tests.privacy.test_hook_engine import Toy, active_names, toy_losses


def engine_of(model: nn.Module, *names: str) -> OpacusEngine:
    return OpacusEngine(model, {n: model.get_parameter(n) for n in names or ("layer.weight",)})


class Twisted(nn.Module):
    """One layer that sees (n, 3, 4) values in an odd way."""

    def __init__(self, twist: str) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.twist = twist
        self.requires_grad_(False)

    def forward(self, x):
        if self.twist == "positions first":
            return self.layer(x.transpose(0, 1)).transpose(0, 1)
        if self.twist == "flat":
            return self.layer(x.reshape(-1, 4)).view_as(x)
        if self.twist == "keyword":
            return self.layer(input=x)
        if self.twist == "in place":
            x = x.clone()
            y = self.layer(x)
            x.mul_(2.0)
            return y
        if self.twist == "twice":
            return self.layer(self.layer(x))
        if self.twist == "once in vain":
            self.layer(x)
            return self.layer(x)
        if self.twist == "reentrant":
            x = x.clone().requires_grad_(True)
            return checkpoint(self.layer, x, use_reentrant=True)
        if self.twist == "reentrant twice":
            x = x.clone().requires_grad_(True)
            y = checkpoint(self.layer, x, use_reentrant=True)
            return checkpoint(self.layer, y, use_reentrant=True)
        return self.layer(x)

    def losses(self, records: int):
        x = torch.randn(records, 3, 4, generator=torch.Generator().manual_seed(0))
        return lambda rows=slice(None): self(x[rows]).square().sum(dim=(1, 2))


@pytest.mark.parametrize(
    ("twist", "message"),
    [
        ("positions first", "Opacus gave 3 gradients for 5 records"),
        ("flat", "Opacus gave 15 gradients for 5 records"),
        ("keyword", "Opacus cannot give this model's per-record gradients"),
        ("in place", r"cannot give this model's per-record gradients \(RuntimeError\)"),
        ("twice", "ran twice"),
        ("once in vain", "ran twice"),
        ("reentrant twice", "ran again in the backward pass"),
    ],
)
def test_what_opacus_cannot_do_is_refused_and_leaves_no_trace(twist, message):
    model = Twisted(twist)
    with pytest.raises(EngineError, match=message):
        engine_of(model).clipped_sum(["layer.weight"], model.losses(5), 5, 1.0)
    assert traces(model) == []


@pytest.mark.parametrize("twist", ["", "reentrant"])
def test_rows_of_a_plain_layer_are_those_of_autograd(twist):
    model = Twisted(twist)
    names = ["layer.weight", "layer.bias"]
    losses = model.losses(5)
    got = engine_of(model, *names).per_record_gradients(names, losses, 5)
    model.twist = ""  # torch.autograd.grad cannot follow reentrant checkpointing
    expected = per_record_gradients_by_autograd(
        {n: model.get_parameter(n) for n in names}, lambda j: losses(slice(j, j + 1)), 5
    )
    for name in names:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-5)
        assert not got[name].requires_grad
    assert traces(model) == []


def test_training_batchnorm_is_refused_before_the_model_runs():
    model = Toy("batchnorm").train()
    before = model.norm.running_mean.clone()
    with pytest.raises(EngineError, match="norm is a BatchNorm1d in training mode"):
        engine_of(model).clipped_sum(["layer.weight"], toy_losses(model), 3, 1.0)
    assert torch.equal(model.norm.running_mean, before)
    model.eval()
    got = engine_of(model).clipped_sum(["layer.weight"], toy_losses(model), 3, 1.0)
    assert got["layer.weight"].any()


def test_a_layer_outside_the_loss_is_refused():
    model = Toy().eval()
    engine = engine_of(model, "layer.weight", "unused.weight")
    with pytest.raises(EngineError, match=r"unused\.weight: its layer took no part"):
        engine.clipped_sum(["layer.weight", "unused.weight"], toy_losses(model), 3, 1.0)
    with pytest.raises(EngineError, match="none of the layers"):
        engine.clipped_sum(["unused.weight"], toy_losses(model), 3, 1.0)
    assert traces(model) == []


@pytest.mark.parametrize("reduce", [torch.mean, torch.sum, lambda v: v[:2], lambda v: v.long()])
def test_losses_that_are_not_one_per_record_are_refused(reduce):
    model = Toy().eval()
    losses = toy_losses(model)
    with pytest.raises(EngineError, match="one per record"):
        engine_of(model).clipped_sum(["layer.weight"], lambda: reduce(losses()), 3, 1.0)
    assert traces(model) == []


def test_a_wrong_number_of_records_is_refused():
    model = Toy().eval()
    losses = toy_losses(model, records=4)
    with pytest.raises(EngineError, match="Opacus gave 4 gradients for 2 records"):
        engine_of(model).clipped_sum(["layer.weight"], lambda: losses().view(2, 2).sum(1), 2, 1.0)


def test_a_layer_that_is_not_called_as_a_module_is_refused():
    """nn.MultiheadAttention hands its out_proj's weight to a function: no hook sees it."""
    model = nn.MultiheadAttention(4, 2, batch_first=True).requires_grad_(False)
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    engine = OpacusEngine(model, {"out": model.out_proj.weight})
    with pytest.raises(EngineError, match="out: its layer took no part"):
        engine.clipped_sum(["out"], lambda: model(x, x, x)[0].square().sum(dim=(1, 2)), 3, 1.0)
    assert traces(model) == []


def test_a_model_that_opacus_already_wraps_is_refused():
    from opacus.grad_sample import GradSampleHooks

    model = Toy().eval()
    theirs = GradSampleHooks(model, loss_reduction="sum")
    with pytest.raises(EngineError, match=r"per-record gradients \(ValueError\)"):
        engine_of(model).clipped_sum(["layer.weight"], toy_losses(model), 3, 1.0)
    theirs.remove_hooks()
    got = engine_of(model).clipped_sum(["layer.weight"], toy_losses(model), 3, 1.0)
    assert got["layer.weight"].any() and traces(model) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_a_model_in_half_precision_are_float32(dtype):
    model = Sequence(dtype)
    engine = OpacusEngine(model, model.adapter)
    rows = engine.per_record_gradients(list(model.adapter), model.losses, RECORDS)
    expected = model.rows_by_autograd()
    for name, row in rows.items():
        assert row.dtype == torch.float32
        assert not torch.equal(row, row.to(dtype).float())  # products, too, were in float32
        torch.testing.assert_close(row, expected[name], rtol=3e-2, atol=3e-2)
    sums = engine.clipped_sum(list(model.adapter), model.losses, RECORDS, 1e-3)
    moved = sum(float(value.double().square().sum()) for value in sums.values()) ** 0.5
    assert 0 < moved <= RECORDS * 1e-3 * (1 + 1e-5)


def test_products_are_in_float32_under_an_autocast_around_the_whole_step():
    model = Sequence()
    engine = OpacusEngine(model, model.adapter)

    def losses():
        with torch.autocast("cpu", enabled=False):
            return model.losses()

    plain = engine.per_record_gradients(list(model.adapter), losses, RECORDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = engine.per_record_gradients(list(model.adapter), losses, RECORDS)
    for name in plain:
        torch.testing.assert_close(inside[name], plain[name], rtol=1e-5, atol=1e-5)


def test_the_model_can_be_copied_after_steps_and_no_warning_is_raised():
    model = Toy().train()
    model.norm.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine_of(model).clipped_sum(["layer.weight"], toy_losses(model), 3, 1.0)
    twin = copy.deepcopy(model)
    one, other = (
        engine_of(m).clipped_sum(["layer.weight"], toy_losses(m), 3, 1.0) for m in (model, twin)
    )
    assert torch.equal(one["layer.weight"], other["layer.weight"])
    assert model.layer.training and not model.norm.training


@pytest.mark.parametrize("text", ["a record's own words", "DefaultCPUAllocator: can't allocate"])
def test_a_foreign_error_is_told_by_its_type_and_want_of_memory_stays_itself(model_of, text):
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError(text)

    task_model = model_of("vit")
    engine = OpacusEngine(task_model.model, task_model.adapter)
    batch = task_model.made_up_batch(2)
    wanted = RuntimeError if "Allocator" in text else EngineError
    with pytest.raises(wanted) as failed:
        engine.clipped_sum(
            active_names(task_model, "B"),
            lambda: Failing.apply(task_model.per_record_losses(batch)),
            2,
            1.0,
        )
    assert (text in str(failed.value)) == (wanted is RuntimeError)
