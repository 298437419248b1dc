"""Inputs that are made again instead of kept: the same gradients from less memory."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from privacy import FusedEngine
from privacy.cheap_inputs import CheapInputs
from tests.privacy.test_hook_engine import active_names, relative_error


def watch(module: nn.Module, source: torch.Tensor) -> tuple[CheapInputs, torch.Tensor]:
    cheap = CheapInputs()
    with cheap.watching(module):
        return cheap, module(source)


@pytest.mark.parametrize(
    "module",
    [nn.LayerNorm(6), nn.RMSNorm(6), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU()],
    ids=lambda m: type(m).__name__,
)
def test_what_a_cheap_module_made_is_made_again_bit_for_bit(module):
    source = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    cheap, x = watch(module, source)
    recipe = cheap.recipe_of(x)
    assert recipe is not None and recipe.source is source
    assert torch.equal(recipe.without_source()(source), x)
    assert "forward" not in module.__dict__


def test_under_autocast_it_is_made_as_it_was():
    norm, source = nn.LayerNorm(6), torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        cheap, x = watch(norm, source.bfloat16())
    recipe = cheap.recipe_of(x)
    assert recipe is not None and recipe.autocast == torch.bfloat16
    again = recipe.without_source()(source.bfloat16())
    assert again.dtype == x.dtype and torch.equal(again, x)


@pytest.mark.parametrize(
    "module", [nn.Linear(6, 6), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.SiLU(inplace=True)]
)
def test_other_modules_are_not_watched(module):
    cheap, x = watch(module, torch.randn(2, 6))
    assert cheap.recipe_of(x) is None


def test_somebodys_own_forward_on_the_instance_stays():
    norm = nn.LayerNorm(6)
    norm.forward = lambda source: source + 1
    cheap, x = watch(norm, torch.zeros(2, 6))
    assert cheap.recipe_of(x) is None
    assert torch.equal(norm(torch.zeros(1, 6)), torch.ones(1, 6))


def test_a_tensor_changed_in_place_or_replaced_is_not_made_again():
    cheap, x = watch(nn.GELU(), torch.randn(2, 6))
    assert cheap.recipe_of(x) is not None
    assert cheap.recipe_of(x.clone()) is None and cheap.recipe_of(x.view(2, 6)) is None
    x.add_(1)
    assert cheap.recipe_of(x) is None


def test_a_source_changed_in_place_is_not_made_from():
    """Where the source needs no gradient, autograd keeps no copy that would notice."""
    source = torch.randn(2, 6)
    cheap, x = watch(nn.LayerNorm(6), source)
    source.add_(1)
    assert cheap.recipe_of(x) is None


class OddNorm(nn.LayerNorm):
    def forward(self, source, shift=0.0):
        return super().forward(source) + shift


def test_a_subclass_is_not_taken_for_its_parent():
    cheap, x = watch(OddNorm(6), torch.randn(2, 6))
    assert cheap.recipe_of(x) is None


def test_other_ways_to_call_work_and_are_not_watched():
    norm, source = nn.LayerNorm(6), torch.randn(2, 6)
    cheap = CheapInputs()
    with cheap.watching(norm):
        x = norm(input=source)
    assert torch.equal(x, norm(source)) and cheap.recipe_of(x) is None


def test_a_tensor_that_is_gone_holds_nothing():
    source = torch.randn(2, 6)
    cheap, x = watch(nn.GELU(), source)
    del x
    gc.collect()
    assert not cheap._made


def kept_by(task_model, which: str) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of a step, and the bytes of distinct tensors that autograd kept for it."""
    engine = FusedEngine(task_model.model, task_model.adapter)
    batch = task_model.made_up_batch(4)
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        rows = engine.per_record_gradients(
            active_names(task_model, which), lambda: task_model.per_record_losses(batch), 4
        )
    return rows, sum(kept.values())


@pytest.mark.parametrize("kind", ["vit", "swin", "bert", "roberta", "llama"])
def test_a_step_on_a_keeps_less_and_finds_the_same(model_of, kind, monkeypatch):
    suffix = {"vit": "attn.qkv,attn.proj,mlp.fc1,mlp.fc2"}
    suffix["swin"] = suffix["vit"]
    targets = {"target_modules": suffix[kind]} if kind in suffix else {}
    task_model = model_of(kind, **targets)
    rows, kept = kept_by(task_model, "A+head")
    monkeypatch.setattr(CheapInputs, "recipe_of", lambda self, x: None)
    plain, plain_kept = kept_by(task_model, "A+head")
    _, on_b = kept_by(task_model, "B+head")
    assert relative_error(rows, plain) < 1e-6
    assert kept < plain_kept
    if kind in suffix:  # most of what A keeps on top of B
        assert kept - on_b < 0.4 * (plain_kept - on_b)


def test_nothing_stays_on_the_model(model_of):
    task_model = model_of("vit")
    kept_by(task_model, "both+head")
    assert not any("forward" in module.__dict__ for module in task_model.model.modules())
