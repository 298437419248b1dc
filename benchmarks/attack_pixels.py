"""Gradient inversion by search: pixels whose gradient looks like the update.

As Zhu et al. (2019) and Geiping et al. (2020): minimise one minus the cosine similarity between
the gradient of a trial image and the released one (here the mean over the tensors) plus a little
total variation, by Adam, with the label known.  The attacker knows the encoder, so the trial image
has the 8 x 8 pixels that the site's images have.  Several random starts; those that match best
after a while go on, and the best match at the end is the answer, chosen without the original.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from task.encoders import ImageEncoder

from .attack_bounds import Floats
from .attack_inversion import Inversion, ask, part_of, quartiles
from .attack_membership import read_adapter
from .attack_site import TRAINED, Server, read_records

_VARIATION = 1e-3
_SIDE = 8


@dataclass(frozen=True)
class Search:
    """How long to search: starts for each record, steps with all, starts kept, steps with these."""

    starts: int
    first_steps: int
    kept: int
    last_steps: int


class PixelSearch:
    """The search at one adapter for one set of trained tensors.

    Parameters
    ----------
    server : Server
        Whose model has the adapter loaded.
    trained : str
        Key of ``TRAINED``.
    """

    def __init__(self, server: Server, trained: str) -> None:
        model: Any = server.model.model
        for module in model.modules():
            if hasattr(module, "fused_attn"):  # the fused kernel has no second derivative
                module.fused_attn = False
        known = {id(p): name for name, p in model.named_parameters()}
        self._values = {name: p.detach() for name, p in model.named_parameters()}
        adapter = server.model.adapter
        self._active = [known[id(adapter[name])] for name in server.names(TRAINED[trained])]
        self._model = model
        self._encode = differentiable_encoder(server.model.encoder)

    def _loss(self, active: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(self._model, {**self._values, **active}, (image[None],))
        return F.cross_entropy(logits, label[None])

    def gradients(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Gradient of each record's own loss, per tensor (n, *shape); differentiable in pixels.

        ``images`` are (n, 8, 8) on the scale [0, 1].
        """
        active = {name: self._values[name] for name in self._active}
        each = vmap(lambda image, label: grad(self._loss)(active, image, label))
        found = each(self._encode(images), labels)
        return [found[name] for name in self._active]

    def run(self, released: list[Tensor], labels: Tensor, search: Search, seed: int) -> Tensor:
        """Images (n, 8, 8) on the scale [0, 1] for released gradients of n records."""
        count = len(labels)
        generator = torch.Generator().manual_seed(seed)
        shape = (count * search.starts, _SIDE, _SIDE)
        start = 1.5 * torch.randn(shape, generator=generator) - 1.0
        owner = torch.arange(count).repeat_interleave(search.starts)
        hidden, distance = self._descend(
            start, owner, released, labels, search.first_steps, (0.2, 0.1)
        )
        order = distance.view(count, -1).argsort(dim=1)[:, : search.kept]
        best = (torch.arange(count)[:, None] * search.starts + order).flatten()
        hidden, distance = self._descend(
            hidden[best], owner[best], released, labels, search.last_steps, (0.1, 0.005)
        )
        pick = distance.view(count, -1).argmin(dim=1) + torch.arange(count) * search.kept
        return torch.sigmoid(hidden[pick])

    def _descend(
        self,
        start: Tensor,
        owner: Tensor,
        released: list[Tensor],
        labels: Tensor,
        steps: int,
        rates: tuple[float, float],
    ) -> tuple[Tensor, Tensor]:
        hidden = start.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([hidden], lr=rates[0])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, rates[1])
        wanted = [tensor[owner] for tensor in released]
        for _ in range(steps):
            images = torch.sigmoid(hidden)
            distance = mean_cosine_distance(self.gradients(images, labels[owner]), wanted)
            loss = (distance + _VARIATION * total_variation(images)).sum()
            (slope,) = torch.autograd.grad(loss, hidden)
            hidden.grad = slope
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            found = self.gradients(torch.sigmoid(hidden), labels[owner])
            return hidden.detach(), mean_cosine_distance(found, wanted)


def mean_cosine_distance(found: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """One minus the cosine similarity, the mean over tensors, for each record (n,)."""
    pairs = zip(found, wanted, strict=True)
    likeness = [F.cosine_similarity(f.flatten(1), w.flatten(1), dim=1) for f, w in pairs]
    return 1 - torch.stack(likeness).mean(dim=0)


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, along both axes together, (n,)."""
    return images.diff(dim=1).abs().mean(dim=(1, 2)) + images.diff(dim=2).abs().mean(dim=(1, 2))


def differentiable_encoder(encoder: Any) -> Any:
    """The site's encoder as a function of pixels (n, 8, 8) in [0, 1], to a grey level's rounding.

    Pillow's resize is linear in the pixels but for the clip after each of its two passes; the
    matrix of a pass is read off unit vectors.
    """
    if not isinstance(encoder, ImageEncoder) or encoder.channels != 1:
        raise TypeError("the search is for grey images")
    unit = Image.fromarray(np.eye(_SIDE, dtype=np.float32))
    wide = unit.resize((encoder.size, _SIDE), Image.Resampling[encoder.interpolation.upper()])
    matrix = torch.from_numpy(np.array(wide).T.copy())

    def encode(images: Tensor) -> Tensor:
        across = (images @ matrix.T).clamp(0, 1)
        pixels = (matrix @ across).clamp(0, 1)
        return ((pixels - encoder.mean[0]) / encoder.std[0])[:, None]

    return encode


def reconstruct(arm: Inversion, records: int, search: Search, seed: int) -> dict[str, Any]:
    """Attack the first few candidates' own updates and compare with the originals.

    Returns
    -------
    dict
        A row: quartiles of PSNR and SSIM, how many reconstructions are nearest to their original
        among all candidates, and under ``images`` the reconstructions (n, 8, 8).
    """
    trained = TRAINED[arm.trained]
    server = Server(arm.config)
    adapter = read_adapter(arm.folder, 1)
    images, labels = read_records(Path(arm.folder) / "candidates.npz")
    server.load(adapter)
    sums = [ask(arm, server, adapter, record) for record in range(records)]
    names = server.names(trained)
    parts = [np.stack([part_of(server, trained, total, name) for total in sums]) for name in names]
    released = [torch.from_numpy(part).float() for part in parts]
    found = PixelSearch(server, arm.trained).run(
        released, torch.from_numpy(labels[:records]), search, seed
    )
    return {
        "attack": "pixels",
        "trained": arm.trained,
        "level": arm.level,
        **quality(found.double().numpy(), as_unit(images), range(records)),
        "images": np.round(found.numpy(), 3).tolist(),
    }


def references(
    folder: Path, records: int, own: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]
) -> list[dict[str, Any]]:
    """The originals, and the guess without any update: the mean of other records of the class."""
    images, labels = read_records(folder / "candidates.npz")
    guesses = [as_unit(own[0][own[1] == label]).mean(axis=0) for label in labels[:records]]
    shown = {"original": as_unit(images[:records]), "the label alone": np.stack(guesses)}
    rows = [
        {
            "attack": "pixels",
            "trained": "nothing",
            "level": level,
            "images": np.round(found, 3).tolist(),
        }
        for level, found in shown.items()
    ]
    rows[1] |= quality(shown["the label alone"], as_unit(images), range(records))
    return rows


def quality(found: Floats, candidates: Floats, originals: range) -> dict[str, Any]:
    """Compare reconstructions with their originals, and with all candidates."""
    errors = ((found[:, None] - candidates[None]) ** 2).mean(axis=(2, 3))
    own = [errors[row, record] for row, record in enumerate(originals)]
    pairs = [(found[row], candidates[record]) for row, record in enumerate(originals)]
    nearest = errors.argmin(axis=1) == np.array(originals)
    return {
        "records": len(originals),
        "psnr": quartiles(np.array([psnr(value) for value in own])),
        "ssim": quartiles(np.array([global_ssim(*pair) for pair in pairs])),
        "nearest": int(nearest.sum()),
    }


def as_unit(images: npt.NDArray[np.uint8]) -> Floats:
    """Greys 0..255 on the scale [0, 1]."""
    return images.astype(np.float64) / 255


def psnr(squared_error: float) -> float:
    """Peak signal to noise ratio in dB of a mean squared error on the scale [0, 1]."""
    return float(-10 * np.log10(max(squared_error, 1e-6)))


def global_ssim(first: Floats, second: Floats) -> float:
    """SSIM with one window, the whole image (Wang et al., 2004, equation 13)."""
    c1, c2 = 0.01**2, 0.03**2
    covariance = ((first - first.mean()) * (second - second.mean())).mean()
    likeness = (2 * first.mean() * second.mean() + c1) * (2 * covariance + c2)
    scale = (first.mean() ** 2 + second.mean() ** 2 + c1) * (first.var() + second.var() + c2)
    return float(likeness / scale)
