"""The model of a run: adapters by PEFT's names, seeded start, export, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from task.adapters import find_targets, is_lora, wrap_with_lora
from task.backbones.backbone import Backbone
from task.encoders import ImageEncoder
from task.errors import ModelError
from task.model import build_task_model
from task.settings import LoRASettings
from tests import models

KINDS = (*models.IMAGE_KINDS, *models.TEXT_KINDS, "distilbert", "llama")


def stir(task_model, seed=3):
    """Give every adapter tensor random values, so that nothing is hidden by zeros."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(tensor.shape, generator=generator) * 0.1
        for name, tensor in task_model.adapter_state().items()
    }
    task_model.load_adapter_state(state)
    return state


def fresh_base(kind, folder, num_labels):
    """Load the backbone as a stranger to this project would."""
    if kind in models.IMAGE_KINDS:
        import timm

        return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=num_labels)
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=num_labels)


@pytest.mark.parametrize("head", ["train", "frozen"])
@pytest.mark.parametrize("kind", KINDS)
def test_export_gives_the_same_logits_on_a_fresh_base(
    kind, head, settings_of, folder_of, lora, tmp_path
):
    from peft import PeftModel

    built = build_task_model(settings_of(kind, head=head), lora, 3, seed=5)
    if head == "train":
        stir(built)
    else:
        changed = built.adapter_state()
        changed = {k: v + 0.1 if is_lora(k) else v for k, v in changed.items()}
        built.load_adapter_state(changed)
    built.save_adapter(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(fresh_base(kind, folder_of(kind), 3), tmp_path / "adapter")

    batch = built.made_up_batch(4)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    built.model.eval()
    loaded.eval()
    with torch.no_grad():
        ours = built.logits(batch)
        theirs = (
            loaded(inputs["pixel_values"])
            if kind in models.IMAGE_KINDS
            else loaded(**inputs).logits
        )
    assert ours.shape == (4, 3)
    assert ours.std() > 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_tensors_are_those_that_peft_saves(kind, settings_of, lora):
    from peft import get_peft_model_state_dict

    built = build_task_model(settings_of(kind), lora, 3, seed=5)
    saved = get_peft_model_state_dict(built.model, save_embedding_layers=False)
    assert list(built.adapter) == list(saved)
    assert all(torch.equal(built.adapter[name], saved[name]) for name in saved)
    lora_names = [name for name in built.adapter if is_lora(name)]
    assert lora_names and len(lora_names) % 2 == 0
    assert built.head_names and not any(".lora_" in name for name in built.head_names)
    assert not any(p.requires_grad for p in built.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_two_builds_are_equal_and_leave_the_global_generator_alone(kind, settings_of, lora):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = build_task_model(settings_of(kind), lora, 3, seed=5)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(99)
    second = build_task_model(settings_of(kind), lora, 3, seed=5)
    other = build_task_model(settings_of(kind), lora, 3, seed=6)
    one, two, three = (m.adapter_state() for m in (first, second, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)
    assert first.fingerprint == second.fingerprint == other.fingerprint
    assert len(first.fingerprint) == 64


@pytest.mark.parametrize("kind", KINDS)
def test_start_of_the_factors_and_the_head(kind, settings_of, lora):
    built = build_task_model(settings_of(kind), lora, 3, seed=5)
    state = built.adapter_state()
    assert all(not t.any() for name, t in state.items() if ".lora_B." in name)
    for name, tensor in state.items():
        if ".lora_A." in name:
            bound = tensor.shape[1] ** -0.5
            assert tensor.abs().max() <= bound and tensor.std() > bound / 4
    weights = [state[name] for name in built.head_names if name.endswith(".weight")]
    biases = [state[name] for name in built.head_names if name.endswith(".bias")]
    assert all(bool(w.any()) == (len(weights) > 1) for w in weights)
    assert not any(b.any() for b in biases)


def test_a_frozen_head_is_not_zero(settings_of, lora):
    built = build_task_model(settings_of("vit", head="frozen"), lora, 3, seed=5)
    assert all(built.adapter[n].any() for n in built.head_names if n.endswith(".weight"))


@pytest.mark.parametrize("kind", KINDS)
def test_train_mode_is_deterministic_and_records_do_not_mix(kind, settings_of, lora):
    built = build_task_model(settings_of(kind), lora, 3, seed=5)
    stir(built)
    built.model.train()
    batch = built.made_up_batch(4)
    losses = built.per_record_losses(batch)
    assert losses.shape == (4,) and losses.dtype == torch.float32
    assert torch.equal(losses, built.per_record_losses(batch))
    alone = built.per_record_losses({k: v[1:2] for k, v in batch.items()})
    torch.testing.assert_close(alone, losses[1:2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_made_up_batches(kind, settings_of, lora):
    built = build_task_model(settings_of(kind), lora, 3, seed=5)
    one, two = built.made_up_batch(5, seed=1), built.made_up_batch(5, seed=1)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[n], t) for n, t in built.made_up_batch(5, seed=2).items())
    assert set(one["labels"].tolist()) <= {0, 1, 2}
    if "attention_mask" in one:
        assert ("token_type_ids" in one) == (kind == "bert")
        lengths = one["attention_mask"].sum(1)
        assert lengths.min() < lengths.max() == one["input_ids"].shape[1]
        pad = built.encoder.tokenizer.pad_token_id
        assert torch.equal(one["input_ids"] == pad, one["attention_mask"] == 0)
    assert len(built.made_up_batch(0)["labels"]) == 0


def test_state_round_trip_keeps_the_parameters_themselves(settings_of, lora):
    built = build_task_model(settings_of("vit"), lora, 3, seed=5)
    before = dict(built.adapter)
    state = stir(built)
    assert all(built.adapter[name] is before[name] for name in before)
    got = built.adapter_state()
    assert all(torch.equal(got[name], state[name]) for name in state)
    next(iter(got.values())).zero_()
    assert next(iter(built.adapter.values())).any()
    assert built.to("cpu") is built and built.device.type == "cpu"


def test_state_that_does_not_fit_changes_nothing(settings_of, lora):
    built = build_task_model(settings_of("vit"), lora, 3, seed=5)
    before = built.adapter_state()
    good = {name: tensor + 1 for name, tensor in before.items()}
    last = list(good)[-1]
    bad = [
        {k: v for k, v in good.items() if k != last},
        {**good, "extra": torch.zeros(1)},
        {**good, last: torch.zeros(1)},
        {**good, last: torch.zeros(good[last].shape, dtype=torch.int64)},
    ]
    for state in bad:
        with pytest.raises(ModelError, match="accepted"):
            built.load_adapter_state(state)
    after = built.adapter_state()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_export_names_its_base_and_replaces_an_older_export(settings_of, lora, tmp_path):
    settings = settings_of("vit")
    built = build_task_model(settings, lora, 3, seed=5)
    target = tmp_path / "runs" / "adapter"
    built.save_adapter(target)
    stir(built)
    built.save_adapter(target)
    assert sorted(p.name for p in target.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert [p.name for p in target.parent.iterdir()] == ["adapter"]
    config = json.loads((target / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == settings.name
    assert config["modules_to_save"] == ["head"] and config["inference_mode"] is True
    assert set(config["target_modules"]) == {"attn.qkv", "attn.proj"}

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    with pytest.raises(ModelError, match="not overwritten"):
        built.save_adapter(foreign)
    assert (foreign / "thesis.txt").exists()


def test_fingerprint_sees_one_changed_bit(settings_of, lora, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = models.make_vit(tmp_path)
    settings = settings_of("vit", name=str(folder))
    before = build_task_model(settings, lora, 3, seed=5).fingerprint
    assert build_task_model(settings, LoRASettings(r=4), 9, seed=1).fingerprint == before
    weights = load_file(folder / "model.safetensors")
    weights["norm.bias"][0] += 1e-7
    save_file(weights, folder / "model.safetensors")
    assert build_task_model(settings, lora, 3, seed=5).fingerprint != before


def test_chosen_targets(settings_of):
    lora = LoRASettings(r=2, target_modules="mlp.fc1, attn.qkv")
    built = build_task_model(settings_of("vit"), lora, 3, seed=5)
    assert sum(is_lora(name) for name in built.adapter) == 2 * 2 * 2


def test_a_target_that_also_names_the_head_leaves_the_head_alone(settings_of):
    # RoBERTa's head has a layer called dense, as its trunk has.
    lora = LoRASettings(r=2, target_modules="dense")
    built = build_task_model(settings_of("roberta"), lora, 3, seed=5)
    assert not any("classifier" in name for name in built.adapter if is_lora(name))
    assert any("output.dense" in name for name in built.adapter if is_lora(name))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("proj", r"patch_embed\.proj, a Conv2d"),
        ("query", r"no layer's name ends in 'query'.*attn\.proj, attn\.qkv"),
        ("head", r"no layer's name ends in 'head'"),
    ],
)
def test_refused_targets(targets, message, settings_of):
    with pytest.raises(ModelError, match=message):
        build_task_model(settings_of("vit"), LoRASettings(target_modules=targets), 3, seed=5)


class Tiny(nn.Module):
    """A module with what a backbone needs, and one layer to choose."""

    def __init__(self, extra: nn.Module) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.extra = extra
        self.head = nn.Linear(4, 2)


def tiny(extra: nn.Module, heads: tuple[str, ...] = ("head",)) -> Backbone:
    encoder = ImageEncoder(1, 2, "bicubic", (0.5,), (0.5,))
    return Backbone(Tiny(extra), heads, encoder, "unheard-of", "tiny", "")


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.LazyBatchNorm2d()])
def test_batch_norm_is_refused(norm):
    with pytest.raises(ModelError, match=r"BatchNorm layer \(extra\)"):
        tiny(norm).prepare(seed=0, trained_head=True)


def test_unknown_family_names_its_linear_layers():
    with pytest.raises(ModelError, match=r"unheard-of.*the linear layers here end in body"):
        find_targets(tiny(nn.Identity()), "auto")


def test_head_of_another_kind_is_refused():
    with pytest.raises(ModelError, match="extra is a Conv1d"):
        tiny(nn.Conv1d(4, 4, 1), ("head", "extra")).prepare(seed=0, trained_head=True)


def test_layers_that_peft_would_confuse_with_the_head_are_refused():
    # PEFT matches modules_to_save by the end of the name, without a dot.
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ahead = nn.Linear(4, 4)

    with pytest.raises(ModelError, match=r"other layers than asked for.*extra\.ahead"):
        wrap_with_lora(tiny(Inner()), LoRASettings(target_modules="body"), seed=0)


def test_embedded_backbone(monkeypatch, lora, folder_of, tmp_path):
    from task.backbones import images
    from task.settings import ModelSettings

    def ensure_backbone() -> Path:
        return folder_of("vit")

    monkeypatch.setattr("task.embedded.ensure_backbone", ensure_backbone, raising=False)
    built = build_task_model(ModelSettings(), lora, 10, seed=5)
    built.save_adapter(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == images.EMBEDDED_ORIGIN


def test_fewer_than_two_classes(settings_of, lora):
    with pytest.raises(ModelError, match="at least 2"):
        build_task_model(settings_of("vit"), lora, 1, seed=5)
