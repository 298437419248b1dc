"""From the digits' counts to grey images: one definition for glyphs and digits."""

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
