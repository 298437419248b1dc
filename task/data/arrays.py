"""Records that come as arrays: npz files and the embedded digits."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError


def read_npz(path: Path, split: str, where: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Read images and labels from an npz file; object arrays (pickles) are refused.

    Parameters
    ----------
    path : pathlib.Path
        The file.
    split : str
        ``"train"`` or ``"test"``: arrays ``x_train``, ``y_train`` or ``x_test``, ``y_test``; a
        file without these may have ``x`` and ``y``.
    where : str
        What messages call the file.

    Returns
    -------
    images, labels : numpy.ndarray
        As stored; of one length, labels one-dimensional and integer.
    """
    accepted = f"accepted: arrays x_{split} and y_{split}, or x and y"
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError(f"{where}: not an npz file; {accepted}")
            names = _names(file.files, split)
            if not names:
                raise DataError(f"{where}: found {', '.join(sorted(file.files))}; {accepted}")
            images, labels = file[names[0]], file[names[1]]
    except DataError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{where}: cannot be read ({type(error).__name__}); {accepted}") from None
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{where}: {names[1]} is {labels.dtype} with {labels.ndim} axes; accepted: whole "
            "numbers, one per image"
        )
    if images.ndim == 0 or len(images) != len(labels):
        raise DataError(f"{where}: {names[0]} and {names[1]} differ in length")
    return images, labels


def _names(found: list[str], split: str) -> tuple[str, str] | None:
    for names in ((f"x_{split}", f"y_{split}"), ("x", "y")):
        if set(names) <= set(found):
            return names
    return None
