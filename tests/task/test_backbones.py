"""Loading backbones: safetensors only, pinned hub commits, complete weights, no dropout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from task.backbones import load_backbone
from task.errors import ModelError
from task.settings import ModelSettings
from tests import models

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch, folder_of):
    """Stand in for the hub; remembers what was asked for."""
    import huggingface_hub

    asked = []

    def download(name, *, revision, allow_patterns, local_files_only):
        asked.append((name, revision, allow_patterns))
        return str(folder_of(name.rpartition("/")[2]))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


@pytest.mark.parametrize(
    ("source", "name", "repository"),
    [
        ("timm", "someone/vit", "someone/vit"),
        ("timm", "vit", "timm/vit"),
        ("transformers", "someone/roberta", "someone/roberta"),
        ("transformers", "roberta", "roberta"),
    ],
)
def test_hub_names_are_fetched_at_their_commit_and_without_pickles(source, name, repository, hub):
    settings = ModelSettings(source=source, name=name, revision=COMMIT, max_length=16)
    backbone = load_backbone(settings, 3, seed=0)
    [(asked, revision, patterns)] = hub
    assert (asked, revision) == (repository, COMMIT)
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".py", "*")) for pattern in patterns)
    assert (backbone.origin, backbone.revision) == (name, COMMIT)


def test_without_a_network_only_a_cached_commit_can_be_used(monkeypatch, tmp_path, folder_of):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    settings = ModelSettings(source="timm", name="someone/vit", revision=COMMIT)
    with pytest.raises(ModelError, match=r"'someone/vit' at model\.revision .* not in its cache"):
        load_backbone(settings, 3, seed=0)
    cached = tmp_path / "models--someone--vit" / "snapshots" / COMMIT
    shutil.copytree(folder_of("vit"), cached)
    assert load_backbone(settings, 3, seed=0).origin == "someone/vit"


@pytest.mark.parametrize("kind", ["vit", "roberta"])
def test_a_folder_with_pickled_weights_only_is_refused(kind, folder_of, settings_of, tmp_path):
    folder = Path(shutil.copytree(folder_of(kind), tmp_path / "copy"))
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pytorch_model\.bin; accepted is model\.safeten"):
        load_backbone(settings_of(kind, name=str(folder)), 3, seed=0)


def test_a_folder_without_a_model_is_refused(settings_of, tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_backbone(settings_of("vit", name=str(tmp_path)), 3, seed=0)
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_backbone(settings_of("vit", name=str(tmp_path / "none")), 3, seed=0)


@pytest.mark.parametrize(
    ("kind", "lost"), [("vit", "norm.bias"), ("roberta", "roberta.embeddings.LayerNorm.weight")]
)
def test_incomplete_weights_are_refused(kind, lost, folder_of, settings_of, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(folder_of(kind), tmp_path / "copy"))
    weights = load_file(folder / "model.safetensors")
    del weights[lost]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=lost):
        load_backbone(settings_of(kind, name=str(folder)), 3, seed=0)


@pytest.mark.parametrize("kind", ["vit", "swin", "roberta", "bert", "distilbert", "llama"])
def test_no_dropout_and_float32(kind, settings_of):
    module = load_backbone(settings_of(kind), 3, seed=0).module
    for child in module.modules():
        assert getattr(child, "drop_prob", 0.0) in (0.0, None)
        if isinstance(child, nn.Dropout):
            assert child.p == 0.0
    assert all(p.dtype == torch.float32 for p in module.parameters())


def test_a_checkpoint_with_another_head_gets_a_new_one(settings_of, tmp_path):
    folder = models.make_vit(tmp_path, num_classes=5)
    for classes in (3, 5):
        backbone = load_backbone(settings_of("vit", name=str(folder)), classes, seed=0)
        assert backbone.module.head.out_features == classes
        assert not backbone.module.head.weight.any()


def test_image_size_and_channels(settings_of, tmp_path):
    grey = load_backbone(settings_of("vit", image_size=24), 3, seed=0)
    assert (grey.encoder.size, grey.encoder.channels) == (24, 1)
    assert grey.module(torch.zeros(2, 1, 24, 24)).shape == (2, 3)
    folder = models.make_vit(tmp_path, channels=3)
    colour = load_backbone(settings_of("vit", name=str(folder)), 3, seed=0)
    assert (colour.encoder.size, colour.encoder.channels) == (16, 3)
    assert len(colour.encoder.mean) == 3
    with pytest.raises(ModelError, match="image-size 1"):
        load_backbone(settings_of("swin", image_size=1), 3, seed=0)


@pytest.mark.parametrize(("kind", "longest"), [("roberta", 38), ("bert", 40)])
def test_texts_longer_than_the_position_table_are_refused(kind, longest, settings_of):
    load_backbone(settings_of(kind, max_length=longest), 3, seed=0)
    with pytest.raises(ModelError, match=f"at most {longest} tokens"):
        load_backbone(settings_of(kind, max_length=longest + 1), 3, seed=0)


def test_image_source_with_a_text_folder_and_the_reverse(folder_of):
    with pytest.raises(ModelError):
        load_backbone(ModelSettings(source="timm", name=str(folder_of("bert"))), 3, seed=0)
    with pytest.raises(ModelError):
        load_backbone(ModelSettings(source="transformers", name=str(folder_of("vit"))), 3, seed=0)


def test_loading_is_quiet(settings_of, capfd):
    load_backbone(settings_of("distilbert"), 3, seed=0)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
