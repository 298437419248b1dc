"""From the digits' counts to what a backbone sees: one definition for glyphs and digits."""

from __future__ import annotations

import numpy as np

from .glyphs import LEVELS


def counts_to_grey(counts: np.ndarray) -> np.ndarray:
    """Spread block counts 0..16 over the greys 0..255.

    Parameters
    ----------
    counts : numpy.ndarray
        Whole numbers 0..16, of any shape and real type.

    Returns
    -------
    numpy.ndarray
        uint8 of the same shape; ``round(grey * 16 / 255)`` gives the counts back.
    """
    return np.rint(np.asarray(counts, dtype=np.float64) * 255 / LEVELS).astype(np.uint8)


def resize_greys(images: np.ndarray, side: int, interpolation: str) -> np.ndarray:
    """Enlarge grey images exactly as the image task does: by Pillow, one image at a time.

    Parameters
    ----------
    images : numpy.ndarray
        uint8, shape (n, height, width).
    side : int
        New height and width, in pixels.
    interpolation : str
        timm's name for the method, for instance ``"bicubic"``.

    Returns
    -------
    numpy.ndarray
        uint8, shape (n, side, side).
    """
    from PIL import Image

    method = Image.Resampling[interpolation.upper()]
    enlarged = np.empty((len(images), side, side), dtype=np.uint8)
    for row, image in enumerate(images):
        enlarged[row] = np.asarray(Image.fromarray(image).resize((side, side), method))
    return enlarged
