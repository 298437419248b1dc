"""Folders with tiny models, made once for all tests of the room."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from task.data import simulation_cache
from task.settings import LoRASettings, ModelSettings
from tests import models

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


@pytest.fixture
def lora() -> LoRASettings:
    """Give small adapters whose scaling is not 1."""
    return LoRASettings(r=2, lora_alpha=6)


@pytest.fixture(autouse=True)
def _fresh_cache() -> None:
    simulation_cache.clear()
