"""Pretrained backbones with a new classification head: embedded, timm, transformers."""

from __future__ import annotations

import torch

from ..settings import ModelSettings
from ..torchvision_ops import declare_missing_torchvision_ops
from .backbone import Backbone

__all__ = ["Backbone", "backbone_loads", "load_backbone"]

# Before anything imports timm or PEFT: both reach torchvision, PEFT by way of transformers.
declare_missing_torchvision_ops()

_loads = 0


def backbone_loads() -> int:
    """How often this process has loaded a backbone: once, if nothing is wasted."""
    return _loads


def load_backbone(settings: ModelSettings, num_labels: int, *, seed: int) -> Backbone:
    """Load the backbone that the settings name, with a head for ``num_labels`` classes.

    The result is the same on every machine and leaves torch's global random state as it was.

    Parameters
    ----------
    settings : ModelSettings
        What to load.
    num_labels : int
        Classes of the new head.
    seed : int
        Seed of the head's start.

    Returns
    -------
    Backbone
        On the CPU, in float32, without dropout.

    Raises
    ------
    ModelError
        If it cannot be loaded, has pickled weights only, lacks weights, or mixes records.
    """
    global _loads
    _loads += 1
    with torch.random.fork_rng(devices=[]):
        if settings.source == "transformers":
            from .text import load_text_backbone

            backbone = load_text_backbone(settings, num_labels)
        else:
            from .images import load_image_backbone

            backbone = load_image_backbone(settings, num_labels)
    backbone.prepare(seed=seed, trained_head=settings.head == "train")
    if settings.gradient_checkpointing:
        backbone.checkpoint_gradients()
    return backbone
