"""The cached backbone: loads in timm, is made once, and never stays damaged or half-written."""

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from task.embedded import backbone, glyphs, pixels
from task.embedded.pretraining import Pretrained, Recipe, pretrain
from task.torchvision_ops import declare_missing_torchvision_ops

TINY = Recipe(
    fonts=glyphs.FONT_FILES[:1],
    ranges=((0x0041, 0x0045),),
    images=60,
    epochs=1,
    batch_size=16,
    width=16,
    depth=1,
    heads=2,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FLOWER_DP_LORA_CACHE", str(folder))
    return folder


@pytest.fixture
def runs(monkeypatch) -> list[Recipe]:
    """Record each pretraining instead of guessing from the clock."""
    seen = []

    def counted(recipe, report):
        seen.append(recipe)
        return pretrain(recipe, report)

    monkeypatch.setattr(backbone, "pretrain", counted)
    return seen


def make(recipe: Recipe = TINY) -> Path:
    return backbone.ensure_backbone(progress=False, recipe=recipe)


def test_timm_loads_the_folder_with_a_head_of_any_width():
    declare_missing_torchvision_ops()
    import timm

    folder = make()
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=10).eval()
    state = model.state_dict()
    saved = load_file(folder / "model.safetensors")
    assert set(state) - set(saved) == {"head.weight", "head.bias"}
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())
    assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 10)
    assert model.pretrained_cfg["interpolation"] == "bicubic"
    assert model.pretrained_cfg["input_size"] == (1, 16, 16)
    assert list(model.pretrained_cfg["mean"]) == [TINY.mean]
    assert {"blocks.0.attn.qkv", "blocks.0.attn.proj"} <= {
        name for name, _ in model.named_modules()
    }


def test_features_of_glyphs_are_centred_and_of_the_recipe_s_length():
    declare_missing_torchvision_ops()
    import timm

    recipe = Recipe(**{**vars(TINY), "images": 200})
    model = timm.create_model(f"local-dir:{make(recipe)}", pretrained=True, num_classes=0).eval()
    bank = glyphs.draw_bank(recipe.fonts, recipe.ranges)
    counts, _ = glyphs.render_glyphs(bank, recipe.images, recipe.seed, recipe.distortion)
    greys = pixels.counts_to_grey(counts[:20])
    resized = [Image.fromarray(grey).resize((16, 16), Image.Resampling.BICUBIC) for grey in greys]
    inputs = torch.from_numpy(np.stack([np.asarray(image) for image in resized]))[:, None]
    with torch.inference_mode():
        features = model((inputs / 255 - recipe.mean) / recipe.std)
    assert features.mean(dim=0).abs().max() < 1e-5
    assert features.norm(dim=1).mean().item() == pytest.approx(recipe.feature_norm, rel=1e-4)


def test_pretraining_repeats_and_leaves_the_caller_s_random_state_alone():
    before = torch.get_rng_state()
    first = pretrain(TINY).weights
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    second = pretrain(TINY).weights
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor)
    other = pretrain(Recipe(**{**vars(TINY), "seed": 1})).weights
    assert not torch.equal(other["patch_embed.proj.weight"], first["patch_embed.proj.weight"])


def test_pretraining_learns():
    long = Recipe(**{**vars(TINY), "images": 400, "epochs": 8, "width": 32})
    made = pretrain(long)
    assert made.num_shapes == 5
    assert made.accuracy > 0.4  # chance is 0.2


def test_second_call_reuses_the_cache(runs):
    assert make() == make()
    assert runs == [TINY]


def test_recipes_do_not_share_a_folder(runs):
    other = Recipe(**{**vars(TINY), "seed": 1})
    assert make() != make(other)
    assert f"-v{TINY.version}-" in make().name
    assert len(runs) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "SHA256SUMS"])
def test_damaged_file_is_reported_and_made_again(name, runs, caplog):
    folder = make()
    good = (folder / name).read_bytes()
    (folder / name).write_bytes(good[:-40] + b"\xff" + good[-39:])
    assert make() == folder
    assert "damaged" in caplog.text
    assert len(runs) == 2
    assert (folder / name).read_bytes() != good[:-40] + b"\xff" + good[-39:]
    assert make() == folder
    assert len(runs) == 2


def test_missing_weights_are_made_again(runs):
    (make() / "model.safetensors").unlink()
    assert (make() / "model.safetensors").is_file()
    assert len(runs) == 2


@pytest.mark.parametrize("failing", ["_write_durably", "_sync_folder"])
def test_interrupted_write_leaves_nothing(failing, cache, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(backbone, failing, interrupted)
        with pytest.raises(KeyboardInterrupt):
            make()
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    assert (make() / "model.safetensors").is_file()


def test_leftovers_of_a_killed_process_are_swept_away(cache):
    folder = make()
    leftover = cache / f"{folder.name}.partial-dead"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    (folder / "config.json").unlink()
    make()
    assert not leftover.exists()


def _make_in_a_process(log: str) -> None:
    def slow(recipe, report):
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)  # long enough for the other process to find the lock taken
        return Pretrained({"weight": torch.zeros(1)}, accuracy=0.0, num_shapes=1)

    backbone.pretrain = slow
    make()


def test_two_processes_train_once(tmp_path):
    log = tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_make_in_a_process, args=(str(log),)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(log.read_text().splitlines()) == 1


def test_progress_off_a_terminal_is_plain_lines(capsys):
    backbone.ensure_backbone(progress=True, recipe=TINY)
    lines = capsys.readouterr().err.splitlines()
    assert "Drawing glyphs: 60/60" in lines
    assert "Pretraining on glyphs: 3/3" in lines
    assert len(lines) < 8


def test_quiet_when_asked(capsys):
    make()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [
        ("{0}/own", "{0}/xdg", "{0}/own"),
        ("", "{0}/xdg", "{0}/xdg/flower-dp-lora"),
        ("", "relative", "{0}/home/.cache/flower-dp-lora"),
        ("", "", "{0}/home/.cache/flower-dp-lora"),
    ],
)
def test_cache_folder_follows_the_environment(own, shared, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FLOWER_DP_LORA_CACHE", own.format(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", shared.format(tmp_path))
    assert backbone.cache_folder() == Path(expected.format(tmp_path))


def test_the_image_task_encodes_digits_as_glyphs_were_encoded(monkeypatch):
    from task.backbones import load_backbone
    from task.settings import ModelSettings

    folder = make()
    monkeypatch.setattr("task.embedded.ensure_backbone", lambda: folder)
    encoder = load_backbone(ModelSettings(), 10, seed=0).encoder
    assert (encoder.channels, encoder.size, encoder.interpolation) == (1, 16, "bicubic")
    assert (encoder.mean, encoder.std) == ((TINY.mean,), (TINY.std,))
