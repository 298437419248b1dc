"""How the embedded backbone is learned: the whole recipe, and the loop that follows it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import glyphs
from .pixels import counts_to_grey
from .progress import Report, silent

if TYPE_CHECKING:
    import numpy as np
    import torch

ARCHITECTURE = "vit_tiny_patch16_224"
"""timm's name of the family; the recipe's ``model_args`` override every size."""

HELD_OUT = 2000
"""Images kept aside, at most a tenth, to measure the pretraining's accuracy."""


@dataclass(frozen=True)
class Recipe:
    """Every number of the public pretraining.

    Two recipes that differ in any field never share a cached backbone.
    """

    version: int = 1
    seed: int = 20240607
    fonts: tuple[str, ...] = glyphs.FONT_FILES
    ranges: tuple[tuple[int, int], ...] = glyphs.LETTER_RANGES
    distortion: glyphs.Distortion = field(default_factory=glyphs.Distortion)
    images: int = 48_000
    epochs: int = 3
    batch_size: int = 64
    learning_rate: float = 2e-3
    warm_up: float = 0.1
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    gradient_norm: float = 1.0
    image_size: int = 16
    patch_size: int = 4
    width: int = 96
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 2.0
    interpolation: str = "bicubic"
    mean: float = 0.3
    std: float = 0.4
    feature_norm: float = 1.5

    def model_args(self) -> dict[str, Any]:
        """Arguments of ``timm.create_model`` that give this recipe's architecture."""
        return {
            "img_size": self.image_size,
            "patch_size": self.patch_size,
            "in_chans": 1,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            "mlp_ratio": self.mlp_ratio,
            "class_token": False,
            "global_pool": "avg",
        }


@dataclass(frozen=True)
class Pretrained:
    """What the pretraining leaves: weights without a classifier, and how good it was.

    Attributes
    ----------
    weights : dict of str to torch.Tensor
        timm's names; the glyph classifier is dropped.
    accuracy : float
        Share of held-out glyphs whose shape class was found.
    num_shapes : int
        Number of shape classes.
    """

    weights: dict[str, torch.Tensor]
    accuracy: float
    num_shapes: int


def pretrain(recipe: Recipe, report: Report = silent) -> Pretrained:
    """Learn the backbone from glyphs.

    Deterministic given the recipe, up to the order in which the machine adds floats.

    Parameters
    ----------
    recipe : Recipe
        All numbers.
    report : callable
        Told the stage, the units done and the units in all.

    Returns
    -------
    Pretrained
        The weights, on the CPU.
    """
    import torch

    bank = glyphs.draw_bank(recipe.fonts, recipe.ranges)
    counts, labels = glyphs.render_glyphs(
        bank,
        recipe.images,
        recipe.seed,
        recipe.distortion,
        lambda done, total: report("Drawing glyphs", done, total),
    )
    pixels = _as_backbone_sees(counts, recipe)
    held_out = min(HELD_OUT, recipe.images // 10)
    # The caller's random state must not depend on whether the backbone was cached.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = _fresh_model(recipe, bank.num_classes)
        _fit(model, pixels[held_out:], torch.from_numpy(labels[held_out:]), recipe, report)
    model.eval()
    with torch.inference_mode():
        features = model.forward_head(model.forward_features(pixels[:held_out]), pre_logits=True)
        guesses = model.get_classifier()(features).argmax(dim=1)
    accuracy = (guesses == torch.from_numpy(labels[:held_out])).float().mean().item()
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name in ("head.weight", "head.bias"):
        del weights[name]
    _standardise_features(weights, features, recipe.feature_norm)
    return Pretrained(weights, accuracy, bank.num_classes)


def _as_backbone_sees(counts: np.ndarray, recipe: Recipe) -> torch.Tensor:
    """Glyphs through the very encoder that the sites' records will go through."""
    import numpy as np

    from ..encoders import ImageEncoder

    encoder = ImageEncoder(
        channels=1,
        size=recipe.image_size,
        interpolation=recipe.interpolation,
        mean=(recipe.mean,),
        std=(recipe.std,),
    )
    pixels = np.stack([encoder.pixels(image) for image in counts_to_grey(counts)])
    return encoder.tensors(pixels)["pixel_values"]


def _fresh_model(recipe: Recipe, num_classes: int) -> Any:
    from ..torchvision_ops import declare_missing_torchvision_ops

    declare_missing_torchvision_ops()
    import timm

    return timm.create_model(
        ARCHITECTURE, pretrained=False, num_classes=num_classes, **recipe.model_args()
    )


def _fit(
    model: torch.nn.Module,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    recipe: Recipe,
    report: Report,
) -> None:
    import torch

    batch = min(recipe.batch_size, len(pixels))
    per_epoch = len(pixels) // batch
    total = per_epoch * recipe.epochs
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    warm = max(1, math.ceil(recipe.warm_up * total))

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    done = 0
    for _ in range(recipe.epochs):
        order = torch.randperm(len(pixels))
        for rows in order[: per_epoch * batch].view(per_epoch, batch):
            loss = torch.nn.functional.cross_entropy(
                model(pixels[rows]), labels[rows], label_smoothing=recipe.label_smoothing
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_norm)
            optimizer.step()
            schedule.step()
            done += 1
            report("Pretraining on glyphs", done, total)


def _standardise_features(
    weights: dict[str, torch.Tensor], features: torch.Tensor, norm: float
) -> None:
    """Centre the features of the glyphs and give them one mean length, inside the last norm.

    A private step clips adapter and head by one norm.  The head's gradient is as long as the
    feature, so long features would drown the adapters, and a common offset would spend the norm
    on what all classes share.
    """
    middle = features.mean(dim=0)
    scale = norm / (features - middle).norm(dim=1).mean()
    weights["fc_norm.weight"] *= scale
    weights["fc_norm.bias"] = (weights["fc_norm.bias"] - middle) * scale
