"""The private records of the embedded default: handwritten digits that scikit-learn carries."""

from __future__ import annotations

from typing import Literal

import numpy as np

from .pixels import counts_to_grey

NUM_LABELS = 10
"""The ten digits."""

# Part of the data's definition: another seed would move records between the sites' private part
# and the server's public part, and would make results of different versions incomparable.
_SPLIT_SEED = 20240607
_TEST_SHARE = 0.2


def load_digits_arrays(split: Literal["train", "test"]) -> tuple[np.ndarray, np.ndarray]:
    """Load one part of the 1797 handwritten digits.

    The split is stratified by label and never changes.  The train part is what sites share out
    among themselves; the test part is public and held by the server.

    Parameters
    ----------
    split : {"train", "test"}
        Which part.

    Returns
    -------
    images : numpy.ndarray
        uint8, shape (1437, 8, 8) or (360, 8, 8), greys 0..255; ``round(grey * 16 / 255)`` gives
        scikit-learn's values back.
    labels : numpy.ndarray
        int64, shape (1437,) or (360,), 0..9.

    Raises
    ------
    ValueError
        If ``split`` is neither name.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'test'")
    digits = load_digits()
    labels = digits.target.astype(np.int64)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=_TEST_SHARE, stratify=labels, random_state=_SPLIT_SEED
    )
    rows = np.sort(train if split == "train" else test)
    return counts_to_grey(digits.images[rows]), labels[rows]
