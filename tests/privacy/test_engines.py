"""One contract for all engines: the autograd loop's sums, C per record, and no trace of a step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from privacy import EngineError, FusedEngine, HookEngine, clip_and_sum, clipped_sum_by_autograd
from privacy.opacus_engine import OpacusEngine
from tests.privacy.test_hook_engine import SETS, active_names, relative_error, rows_of

ENGINES = {"hooks": HookEngine, "fused": FusedEngine, "opacus": OpacusEngine}
TEXT_KINDS = ("roberta", "bert", "llama")
KINDS = ("vit", "swin", *TEXT_KINDS)
LEGAL = [(e, k) for e in ENGINES for k in KINDS if (e, k) != ("opacus", "swin")]
CLIP = 0.3
OPACUS_ATTRIBUTES = ("grad_sample", "_current_grad_sample", "_forward_counter")


@pytest.fixture(scope="module")
def shared(model_of):
    """One model per kind for the whole file: steps leave it as it was."""
    built = {}

    def get(kind):
        if kind not in built:
            built[kind] = model_of(kind)
        return built[kind]

    return get


@pytest.fixture(scope="module")
def reference(shared):
    """Clipped sums by one autograd pass per record, computed once for all engines."""
    known = {}

    def get(kind, which, rows=slice(None)):
        key = kind, which, str(rows)
        if key not in known:
            task_model, batch = shared(kind), batch_of(shared(kind), rows)
            known[key] = clipped_sum_by_autograd(
                {n: task_model.adapter[n] for n in active_names(task_model, which)},
                lambda j: task_model.per_record_losses(rows_of(batch, slice(j, j + 1))),
                len(batch["labels"]),
                CLIP,
            )
        return known[key]

    return get


def batch_of(task_model, rows=slice(None)):
    batch = task_model.made_up_batch(5)
    if "attention_mask" in batch:
        # Record 1 is padded; so it is when it is a batch of its own.
        assert not batch["attention_mask"][1].all() and batch["attention_mask"][0].all()
    return rows_of(batch, rows)


def sum_of(engine, task_model, which, batch, norm=CLIP):
    return engine.clipped_sum(
        active_names(task_model, which),
        lambda: task_model.per_record_losses(batch),
        len(batch["labels"]),
        norm,
    )


def length(tensors) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in tensors.values()))


def traces(model: nn.Module) -> list[str]:
    """Everything that a step might have left on a model."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    extras = ("forward", "activations", "max_batch_len", "autograd_grad_sample_hooks")
    left = []
    for path, module in model.named_modules():
        left += [f"{path}: {name}" for name in hooks if getattr(module, name)]
        left += [f"{path}: {name}" for name in extras if name in module.__dict__]
    for path, p in model.named_parameters():
        left += [f"{path}: {name}" for name in p.__dict__ if name in OPACUS_ATTRIBUTES]
        if p.grad is not None or p.requires_grad:
            left.append(f"{path}: trainable or with a gradient")
    return left


@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize(("engine", "kind"), LEGAL)
def test_clipped_sums_equal_the_autograd_loop(shared, reference, engine, kind, which):
    task_model = shared(kind)
    made = ENGINES[engine](task_model.model, task_model.adapter)
    got = sum_of(made, task_model, which, batch_of(task_model))
    assert list(got) == active_names(task_model, which)
    assert {value.dtype for value in got.values()} == {torch.float32}
    assert relative_error(got, reference(kind, which)) < 1e-5
    assert traces(task_model.model) == []


@pytest.mark.parametrize(("engine", "kind"), LEGAL)
def test_a_batch_of_one_record_is_clipped_like_any_other(shared, reference, engine, kind):
    task_model = shared(kind)
    made = ENGINES[engine](task_model.model, task_model.adapter)
    for row in (slice(0, 1), slice(1, 2)):  # a whole text, and one that is half padding
        got = sum_of(made, task_model, "both+head", batch_of(task_model, row))
        assert relative_error(got, reference(kind, "both+head", row)) < 1e-5
        assert length(got) == pytest.approx(CLIP, rel=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_empty_batch_gives_zeros_and_does_not_run_the_model(shared, engine):
    def never():
        raise AssertionError("the model ran")

    for kind in ("swin", "llama"):  # of Opacus, too: nothing is run that could be wrong
        task_model = shared(kind)
        made = ENGINES[engine](task_model.model, task_model.adapter)
        active = active_names(task_model, "B+head")
        got = made.clipped_sum(active, never, 0, CLIP)
        assert {n: v.shape for n, v in got.items()} == {
            n: task_model.adapter[n].shape for n in active
        }
        assert not any(value.any() or value.requires_grad for value in got.values())


@pytest.mark.parametrize(("engine", "kind"), LEGAL)
def test_one_record_moves_the_sum_by_exactly_the_clip_norm(shared, engine, kind):
    task_model = shared(kind)
    made = ENGINES[engine](task_model.model, task_model.adapter)
    batch = batch_of(task_model)
    norm = 0.01  # far below every record's gradient, so that the bound is met exactly
    for which in ("A+head", "B+head", "both+head"):
        whole = sum_of(made, task_model, which, batch, norm)
        for rows in ([0, 2, 3, 4], [0, 1, 2, 3]):
            part = sum_of(made, task_model, which, rows_of(batch, rows), norm)
            moved = length({n: whole[n] - part[n] for n in whole})
            assert moved == pytest.approx(norm, rel=1e-4)


# --- Opacus where records are not dimension 0 -------------------------------------------------


def stage_names(task_model, stage: int) -> list[str]:
    return [n for n in task_model.adapter if f"layers.{stage}." in n and ".lora_A." in n]


@pytest.mark.parametrize("which", ["A", "B", "both+head"])
def test_opacus_refuses_swin(shared, which):
    task_model = shared("swin")
    made = OpacusEngine(task_model.model, task_model.adapter)
    with pytest.raises(EngineError, match=r"Opacus gave \d+ gradients for 5 records"):
        sum_of(made, task_model, which, batch_of(task_model))
    assert traces(task_model.model) == []


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("stage", [0, 1])
def test_opacus_refuses_swin_in_the_silent_case(shared, stage):
    """LoRA on one stage only: every layer has equally many windows, so nothing fails in Opacus.

    Without the refusal windows are clipped as records: one record would move the sum by more
    than C.
    """
    from opacus.grad_sample import GradSampleHooks

    task_model = shared("swin")
    names = stage_names(task_model, stage)
    adapter = {n: task_model.adapter[n] for n in names}
    one = batch_of(task_model, slice(0, 1))
    try:
        for p in adapter.values():
            p.requires_grad_(True)
        task_model.model.train()
        hooks = GradSampleHooks(task_model.model, loss_reduction="sum")
        task_model.per_record_losses(one).sum().backward()
        windows = {n: p.grad_sample.clone() for n, p in adapter.items()}
    finally:
        hooks.cleanup()
        for p in adapter.values():
            p.requires_grad_(False)
            p.grad = None
        for module in task_model.model.modules():
            module.__dict__.pop("activations", None)
        task_model.model.eval()
    assert len({len(rows) for rows in windows.values()}) == 1
    assert length(clip_and_sum(windows, 0.001)) > 1.5 * 0.001

    made = OpacusEngine(task_model.model, adapter)
    for records in (one, batch_of(task_model)):
        with pytest.raises(EngineError, match="as if it were a record"):
            made.clipped_sum(
                names,
                lambda b=records: task_model.per_record_losses(b),
                len(records["labels"]),
                0.001,
            )
    assert traces(task_model.model) == []


def test_opacus_is_right_where_swin_does_not_cut_windows(model_of):
    task_model = model_of("swin", target_modules="mlp.fc1,mlp.fc2")
    batch = batch_of(task_model)
    theirs = OpacusEngine(task_model.model, task_model.adapter)
    ours = HookEngine(task_model.model, task_model.adapter)
    for which in ("A", "both+head"):
        got = sum_of(theirs, task_model, which, batch)
        assert relative_error(got, sum_of(ours, task_model, which, batch)) < 1e-5


# --- nothing stays behind ---------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "kind"), [(e, "vit") for e in ENGINES] + [("fused", "swin")])
def test_switching_factors_leaves_nothing_behind(shared, engine, kind):
    task_model = shared(kind)
    made = ENGINES[engine](task_model.model, task_model.adapter)
    batch = batch_of(task_model)
    before = {n: p.detach().clone() for n, p in task_model.model.named_parameters()}
    sums = {}
    for which in ("B+head", "A+head", "head", "both", "A", "B+head", "A+head", "head"):
        got = sum_of(made, task_model, which, batch)
        assert traces(task_model.model) == []
        first = sums.setdefault(which, got)
        assert all(torch.equal(first[name], got[name]) for name in first)
    assert all(torch.equal(before[n], p) for n, p in task_model.model.named_parameters())
    assert not any(module.training for module in task_model.model.modules())  # as it was


@pytest.mark.parametrize("when", ["before", "after", "backward", "shape"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_failed_step_leaves_nothing_behind(shared, reference, engine, when):
    """Mistake: hooks or gradients of a failed step, met by the next one."""
    task_model = shared("vit")
    made = ENGINES[engine](task_model.model, task_model.adapter)
    batch = batch_of(task_model)

    def fail(*args):
        raise KeyError("made to fail")

    def losses():
        if when == "before":
            fail()
        values = task_model.per_record_losses(batch)
        if when == "after":
            fail()
        if when == "backward":
            values.register_hook(fail)
        return values.mean() if when == "shape" else values

    with pytest.raises(EngineError if when == "shape" else KeyError):
        made.clipped_sum(active_names(task_model, "both+head"), losses, 5, CLIP)
    assert traces(task_model.model) == []
    assert not any(module.training for module in task_model.model.modules())  # as it was
    got = sum_of(made, task_model, "B+head", batch)
    assert relative_error(got, reference("vit", "B+head")) < 1e-5


# --- activation checkpointing and autocast ------------------------------------------------------


def checkpointed(model_of, kind):
    """A model in training mode without dropout, and a function that turns checkpointing on."""
    task_model = model_of(kind)
    inner = task_model.model.base_model.model
    for module in inner.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    task_model.model.train()

    def turn_on():
        if kind in ("vit", "swin"):
            inner.set_grad_checkpointing(True)
        else:
            inner.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )

    return task_model, turn_on


def count_runs(model: nn.Module) -> list[int]:
    """Count forward runs of the first normalisation inside a block."""
    runs = [0]

    def hook(*_):
        runs[0] += 1

    norms = [m for n, m in model.named_modules() if "norm" in n.lower() and ".0." in n]
    norms[0].register_forward_hook(hook)
    return runs


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["vit", "swin", "bert", "llama"])
def test_activation_checkpointing_changes_nothing(model_of, engine, kind):
    task_model, turn_on = checkpointed(model_of, kind)
    batch = batch_of(task_model)
    sets = ("A", "B+head", "both+head")
    plain_engine = HookEngine(task_model.model, task_model.adapter)
    plain = {which: sum_of(plain_engine, task_model, which, batch) for which in sets}
    turn_on()
    runs = count_runs(task_model.model)
    made = ENGINES[engine](task_model.model, task_model.adapter)
    if engine == "opacus":
        with pytest.raises(EngineError, match="activation checkpointing"):
            sum_of(made, task_model, "both", batch)
        return
    for which in sets:
        runs[0] = 0
        got = sum_of(made, task_model, which, batch)
        assert runs[0] == 2  # once more in the backward: checkpointing was at work
        assert relative_error(got, plain[which]) < 1e-5


@pytest.mark.parametrize(("engine", "kind"), LEGAL)
def test_under_autocast_sums_are_float32_and_the_bound_holds(shared, reference, engine, kind):
    """Half precision makes the gradients rough, and must not make the bound so."""
    task_model = shared(kind)
    made = ENGINES[engine](task_model.model, task_model.adapter)

    def half_sum(batch, which, norm):
        def losses():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = task_model.logits(batch)
            return F.cross_entropy(logits.float(), batch["labels"], reduction="none")

        active = active_names(task_model, which)
        return made.clipped_sum(active, losses, len(batch["labels"]), norm)

    for which in ("A+head", "B+head", "both"):
        got = half_sum(batch_of(task_model), which, CLIP)
        assert {value.dtype for value in got.values()} == {torch.float32}
        error = relative_error(got, reference(kind, which))
        assert 1e-5 < error < 0.05  # rough, so it was half precision
        for row in range(3):
            alone = half_sum(batch_of(task_model, slice(row, row + 1)), which, 0.01)
            assert length(alone) == pytest.approx(0.01, rel=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_parameters_that_come_to_require_gradients_are_refused(model_of, engine):
    """PEFT's switches set the flag; autograd would then leave the raw, unclipped sum in .grad."""
    task_model = model_of("vit")
    made = ENGINES[engine](task_model.model, task_model.adapter)
    batch = batch_of(task_model)
    with task_model.model.disable_adapter():
        pass
    assert any(p.requires_grad for p in task_model.model.parameters())
    with pytest.raises(EngineError, match=r"must not require gradients .* would stay in \.grad"):
        sum_of(made, task_model, "B+head", batch)
    assert all(p.grad is None for p in task_model.model.parameters())
