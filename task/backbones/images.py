"""Image backbones: the embedded one and those of timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..encoders import ImageEncoder
from ..errors import ModelError
from ..settings import ModelSettings
from .backbone import Backbone
from .weights import check_safetensors, model_folder

EMBEDDED_ORIGIN = "flower-dp-lora/embedded"
"""``base_model_name_or_path`` of adapters for the embedded backbone."""


def load_image_backbone(settings: ModelSettings, num_labels: int) -> Backbone:
    """Load a timm model and replace its head; see :func:`task.backbones.load_backbone`."""
    embedded = settings.source == "embedded"
    folder = _embedded_folder() if embedded else model_folder(settings)
    module = _create(folder, settings.image_size)
    if not hasattr(module, "reset_classifier"):
        raise ModelError(f"{type(module).__name__} of timm has no classifier that can be replaced")
    # timm keeps its pooling and replaces the last linear layer only.
    module.reset_classifier(num_labels)
    return Backbone(
        module=module,
        heads=(_head_name(module),),
        encoder=_encoder(module, settings.image_size),
        family="timm",
        origin=EMBEDDED_ORIGIN if embedded else settings.name,
        revision=settings.revision,
    )


def _embedded_folder() -> Path:
    from ..embedded import ensure_backbone

    folder = Path(ensure_backbone())
    check_safetensors(folder)
    return folder


def _create(folder: Path, image_size: int) -> Any:
    import timm

    # The model is built with the classes of its checkpoint, for which timm loads strictly: a
    # missing tensor is an error instead of a silent random start.
    options: dict[str, Any] = {"drop_path_rate": 0.0}
    if image_size:
        options["img_size"] = image_size
    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True, **options)
    except (RuntimeError, TypeError, ValueError, KeyError, OSError, AssertionError) as error:
        hint = f" at model.image-size {image_size}" if image_size else ""
        raise ModelError(f"timm cannot load the model in {folder}{hint}: {error}") from error


def _head_name(module: Any) -> str:
    classifier = module.get_classifier()
    for name, child in module.named_modules():
        if child is classifier and isinstance(child, nn.Linear):
            return str(name)
    raise ModelError(
        f"the head of {type(module).__name__} is a {type(classifier).__name__}; accepted is one "
        "linear layer"
    )


def _encoder(module: nn.Module, image_size: int) -> ImageEncoder:
    from timm.data.config import resolve_model_data_config

    config = resolve_model_data_config(module)
    channels, height, width = config["input_size"]
    size = image_size or height
    if channels not in (1, 3) or height != width:
        raise ModelError(
            f"the backbone takes {channels} channels of {height} x {width} pixels; accepted are "
            "1 or 3 channels and square images"
        )
    return ImageEncoder(
        channels=channels,
        size=size,
        interpolation=str(config["interpolation"]),
        mean=tuple(float(value) for value in config["mean"]),
        std=tuple(float(value) for value in config["std"]),
    )
