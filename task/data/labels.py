"""The public label space, and a column's values brought into it.

The number and names of the classes are declared, never read from private records: which classes
exist at a site would itself tell something about its records.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..settings import EMBEDDED_LABELS, DataSettings, split_list


def class_names(settings: DataSettings) -> tuple[str, ...]:
    """Return the declared class names in their order; empty if only their number is declared.

    Raises
    ------
    DataError
        If ``data.label-names`` names a file that cannot be read, fewer than two classes, a class
        twice, or another number than ``data.num-labels``.
    """
    text = settings.label_names.strip()
    if not text:
        return ()
    names = _names_in_file(Path(text)) if text.endswith((".json", ".txt")) else split_list(text)
    if len(names) < 2 or len(set(names)) < len(names):
        raise DataError(
            f"data.label-names: found {len(names)} names, {len(set(names))} of them different; "
            "accepted are at least 2 different names"
        )
    if settings.num_labels not in (0, len(names)):
        raise DataError(
            f"data.label-names has {len(names)} names but data.num-labels is "
            f"{settings.num_labels}; accepted is the same number, or 0 for data.num-labels"
        )
    return names


def num_labels(settings: DataSettings) -> int:
    """Return the number of declared classes; see :func:`class_names` for its errors."""
    if settings.source == "embedded":
        return EMBEDDED_LABELS
    return len(class_names(settings)) or settings.num_labels


def encode_labels(
    values: Sequence[Any],
    settings: DataSettings,
    where: str,
    feature_names: Sequence[str] = (),
) -> npt.NDArray[np.int64]:
    """Turn a label column into numbers from 0.

    Parameters
    ----------
    values : sequence
        Class names, or whole numbers (also written as text).
    settings : DataSettings
        Declares the classes.
    where : str
        File and column, for messages.
    feature_names : sequence of str
        Names that the file itself gives to its numbers. If names are declared too, they count.

    Returns
    -------
    numpy.ndarray
        int64, (n,).

    Raises
    ------
    DataError
        If a value is not among the declared classes; names the row, not the value.
    """
    names = class_names(settings)
    count = num_labels(settings)
    by_name = {name: index for index, name in enumerate(names)}
    # If a class is called "1", then "0" cannot safely be read as the first class.
    numbers_allowed = not any(_as_number(name) is not None for name in names)
    result = np.empty(len(values), np.int64)
    for row, value in enumerate(values):
        if feature_names and names and isinstance(value, int) and 0 <= value < len(feature_names):
            value = feature_names[value]
        number = by_name.get(value.strip()) if isinstance(value, str) else None
        if number is None and (numbers_allowed or isinstance(value, int)):
            number = _as_number(value)
        if number is None or not 0 <= number < count:
            accepted = f"a whole number from 0 to {count - 1}"
            if names:
                shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
                accepted = f"one of the {count} declared classes ({shown}) or {accepted}"
            raise DataError(f"{where}, row {row + 1}: not a declared class; accepted: {accepted}")
        result[row] = number
    return result


def _as_number(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value.strip())
    return None


def _names_in_file(path: Path) -> tuple[str, ...]:
    accepted = "accepted: a .json list of strings or a .txt file with one name a line, in UTF-8"
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        names = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.label-names {path}: cannot be read ({type(error).__name__}); {accepted}"
        ) from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"data.label-names {path}: not a list of strings; {accepted}")
    return tuple(name.strip() for name in names if name.strip())
