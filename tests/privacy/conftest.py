"""Tiny models of every family, built as the product builds them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from task.model import TaskModel, build_task_model
from task.settings import LoRASettings, ModelSettings
from tests import models

ModelOf = Callable[..., TaskModel]


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> ModelOf:
    """Give a tiny model by kind (vit, swin, roberta, bert, llama), in eval mode.

    B is made non-zero unless ``fresh``: at B = 0 the gradients of A are zero and prove nothing.
    """
    folders = {}

    def build(kind: str, *, fresh: bool = False, **lora: object) -> TaskModel:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("models") / kind
            folders[kind].mkdir()
            if kind == "vit":
                models.make_vit(folders[kind])
            elif kind == "swin":
                models.make_swin(folders[kind])
            else:
                models.make_text(folders[kind], kind)
        image = kind in models.IMAGE_KINDS
        settings = ModelSettings(
            source="timm" if image else "transformers",
            name=str(folders[kind]),
            max_length=128 if image else 16,
        )
        task_model = build_task_model(
            settings, LoRASettings(**{"r": 2, "lora_alpha": 6, **lora}), 4, seed=0
        )
        if not fresh:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for p in task_model.adapter.values():
                    p.add_(0.1 * torch.randn(p.shape, generator=generator))
        task_model.model.eval()
        return task_model

    return build
