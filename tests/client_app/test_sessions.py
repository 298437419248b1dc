"""What a process builds: one backbone, the engine that the settings name, checked."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from client_app.round_handler import handle_train
from client_app.session import open_session
from federation.settings import Settings
from privacy import EngineError, FusedEngine, HookEngine
from privacy.opacus_engine import OpacusEngine
from task.backbones import backbone_loads
from tests import models
from tests.client_app.replies import update_of
from tests.federation.tiny import changed
from tests.privacy.test_hook_engine import active_names, relative_error

CPU = torch.device("cpu")
ENGINES = {"fused": FusedEngine, "hooks": HookEngine, "opacus": OpacusEngine}


@pytest.mark.parametrize("kind", ENGINES)
def test_the_engine_is_the_one_that_the_settings_name(site, kind):
    session = open_session(site.settings(privacy__engine=kind), CPU)
    assert type(session.engine) is ENGINES[kind]


def test_engines_give_the_same_round(site):
    changes = {"privacy__insecure_test_seed": 3}
    updates = {
        kind: update_of(
            handle_train(site.message(), site.context(1, privacy__engine=kind, **changes))
        )
        for kind in ENGINES
    }
    for kind in ("hooks", "opacus"):
        errors = [abs(updates[kind][n] - updates["fused"][n]).max() for n in updates["fused"]]
        assert max(errors) < 1e-5


def test_opacus_is_refused_on_windows_before_any_record_is_read(site, tmp_path):
    (tmp_path / "swin").mkdir()
    models.make_swin(tmp_path / "swin")
    config = changed(site.config, model__name=str(tmp_path / "swin"))
    fused = open_session(Settings.from_run_config(config), CPU)
    assert isinstance(fused.engine, FusedEngine)
    with pytest.raises(EngineError):
        open_session(Settings.from_run_config(changed(config, privacy__engine="opacus")), CPU)


def test_adapters_of_several_ranks_stand_on_one_backbone(site):
    settings = site.settings(strategy__method="flex-lora")
    before = backbone_loads()
    two, one = open_session(settings, CPU, 2), open_session(settings, CPU, 1)
    assert backbone_loads() == before + 1
    frozen = [
        {
            name: p.data_ptr()
            for name, p in session.task_model.model.named_parameters()
            if ".lora_" not in name and "modules_to_save" not in name
        }
        for session in (two, one)
    ]
    assert frozen[0] == frozen[1]
    assert two.task_model.fingerprint == one.task_model.fingerprint
    # What is trained is each session's own.
    trained = [{p.data_ptr() for p in s.task_model.adapter.values()} for s in (two, one)]
    assert trained[0].isdisjoint(trained[1])
    assert {p.shape[0] for n, p in one.task_model.adapter.items() if ".lora_A." in n} == {1}


def test_folds_of_one_session_are_not_seen_by_another(site):
    settings = site.settings(strategy__method="flex-lora")
    two, one = (open_session(settings, CPU, rank).task_model for rank in (2, 1))
    batch = one.made_up_batch(3)
    for model in (two, one):  # a head of zeros would hide what is below it
        model.adapter[model.head_names[0]].data.fill_(0.1)
        model.adapter[model.head_names[0]].data[0, :7] = -0.3
    before = two.logits(batch), one.logits(batch)
    name = next(n for n in two.adapter if ".lora_A." in n).removesuffix(".lora_A.weight")
    inputs = two.adapter[f"{name}.lora_A.weight"].shape[1]
    outputs = two.adapter[f"{name}.lora_B.weight"].shape[0]
    fold_a, fold_b = f"{name}.fold_A.000001.weight", f"{name}.fold_B.000001.weight"
    noise = torch.Generator().manual_seed(0)
    two.set_folds(
        {
            fold_a: torch.randn(1, inputs, generator=noise),
            fold_b: torch.randn(outputs, 1, generator=noise),
        }
    )
    assert not torch.allclose(two.logits(batch), before[0], atol=1e-3)
    assert torch.equal(one.logits(batch), before[1])
    two.set_folds({})
    assert torch.equal(two.logits(batch), before[0])


def gradients_of(session, records: int = 4):
    """Per-record gradients of a B-step, and the numbers that autograd kept for it."""
    model = session.task_model
    batch = model.made_up_batch(records)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        rows = session.engine.per_record_gradients(
            active_names(model, "B+head"), lambda: model.per_record_losses(batch), records
        )
    return rows, sum(kept)


@pytest.mark.parametrize("kind", ["fused", "hooks"])
def test_checkpointing_keeps_less_and_changes_nothing(site, kind):
    plain, plain_kept = gradients_of(open_session(site.settings(privacy__engine=kind), CPU))
    settings = site.settings(privacy__engine=kind, model__gradient_checkpointing=True)
    again, kept = gradients_of(open_session(settings, CPU))
    assert relative_error(again, plain) < 1e-6
    assert kept < plain_kept / 2


def test_half_precision_trains_close_to_full_and_clips_in_full(site):
    plain, _ = gradients_of(open_session(site.settings(), CPU))
    session = open_session(site.settings(model__precision="bfloat16"), CPU)
    rows, _ = gradients_of(session)
    assert all(row.dtype == torch.float32 for row in rows.values())
    assert 1e-6 < relative_error(rows, plain) < 0.05
    model = session.task_model
    batch = model.made_up_batch(4)
    sums = [
        session.engine.clipped_sum(
            active_names(model, "B+head"),
            lambda n=n: model.per_record_losses({k: v[:n] for k, v in batch.items()}),
            n,
            0.01,
        )
        for n in (4, 3)
    ]
    assert all(value.dtype == torch.float32 for value in sums[0].values())
    moved = sum(float((sums[0][n] - sums[1][n]).double().square().sum()) for n in sums[0])
    # The others' activations round otherwise in a smaller batch: not exactly C.
    assert math.sqrt(moved) == pytest.approx(0.01, rel=0.1)


def test_a_model_without_checkpointing_is_refused(site, monkeypatch):
    from timm.models import VisionTransformer

    from task.errors import ModelError

    monkeypatch.delattr(VisionTransformer, "set_grad_checkpointing")
    with pytest.raises(ModelError, match=r"model\.gradient-checkpointing: VisionTransformer"):
        open_session(site.settings(model__gradient_checkpointing=True), CPU)
