"""Tiny models and made-up pictures, for all tests of the room."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from task.backbones import load_backbone
from task.data import simulation_cache
from task.settings import LoRASettings, ModelSettings
from tests import models
from tests.task.records import SECRET, picture

MakeFolder = Callable[[str], Path]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """Give the folder of a tiny model by its kind: vit, swin, roberta, bert, distilbert, llama."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            place = tmp_path_factory.mktemp("models") / kind
            place.mkdir()
            if kind == "vit":
                models.make_vit(place)
            elif kind == "swin":
                models.make_swin(place)
            else:
                models.make_text(place, kind)
            made[kind] = place
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def settings_of(folder_of: MakeFolder) -> Callable[..., ModelSettings]:
    """Give the model settings for a tiny model by its kind."""

    def settings(kind: str, **changes: object) -> ModelSettings:
        source = "timm" if kind in models.IMAGE_KINDS else "transformers"
        length = {} if source == "timm" else {"max_length": 16}
        return ModelSettings(
            **{"source": source, "name": str(folder_of(kind)), **length, **changes}
        )

    return settings


@pytest.fixture(scope="module")
def roberta(settings_of):
    return load_backbone(settings_of("roberta"), 2, seed=0).encoder


@pytest.fixture(scope="module")
def bert(settings_of):
    return load_backbone(settings_of("bert"), 2, seed=0).encoder


@pytest.fixture
def folder(tmp_path):
    """Make an image folder with 10 pictures of two classes of three."""
    for name, value in (("cat", 30), ("dog", 200)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for index in range(10):
            picture(value + index).save(tmp_path / "pets" / name / f"{index}.png")
    (tmp_path / "pets" / "cat" / "notes.txt").write_text(SECRET)
    return tmp_path / "pets"


@pytest.fixture
def lora() -> LoRASettings:
    """Give small adapters whose scaling is not 1."""
    return LoRASettings(r=2, lora_alpha=6)


@pytest.fixture(autouse=True)
def _fresh_cache() -> None:
    simulation_cache.clear()
