"""Checks on what a client sent, and the running sum that valid replies are folded into."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Message, MetricRecord

from .tensor_names import Kind, kind_of
from .wire_dtypes import WireDtype, WireError, unpack

Float64s = npt.NDArray[np.float64]


class InvalidReply(ValueError):
    """A reply that must not enter the mean; the text is ours and holds nothing of its values."""


def read_update(
    message: Message,
    expected: Mapping[str, tuple[int, ...]],
    key: str = "arrays",
    dtype: WireDtype = "float32",
) -> dict[str, npt.NDArray[np.float32]]:
    """Take a reply's update apart, refusing anything but finite values of the right shapes.

    Parameters
    ----------
    message : Message
        A reply without error.
    expected : mapping of str to tuple of int
        Names and shapes of the tensors that the round made active.
    key : str (default: "arrays")
        Name of the reply's ArrayRecord.
    dtype : str (default: "float32")
        How the round asked for updates to be written.

    Raises
    ------
    InvalidReply
        Naming the first thing wrong.
    """
    record = message.content.get(key)
    if not isinstance(record, ArrayRecord):
        raise InvalidReply(f"no ArrayRecord {key!r}")
    try:
        return unpack(record, expected, dtype)
    except WireError as error:
        raise InvalidReply(str(error)) from error


def check_norms(
    update: Mapping[str, npt.NDArray[np.float32]], limits: Mapping[Kind, float]
) -> None:
    """Refuse an update that is larger than any honest one.

    Parameters
    ----------
    update : mapping of str to array
        A client's change of the active tensors.
    limits : mapping of kind to float
        Largest L2 norm over all tensors of a kind jointly; see
        :class:`~strategies.norm_bound.UpdateBound`.

    Raises
    ------
    InvalidReply
        Naming the kind and its limit.
    """
    squares = dict.fromkeys(limits, 0.0)
    for name, value in update.items():
        kind = kind_of(name)
        if kind in squares:
            wide = value.ravel().astype(np.float64)  # a square could leave float32's range
            squares[kind] += float(np.dot(wide, wide))
    for kind, limit in limits.items():
        if squares[kind] > limit**2:
            raise InvalidReply(
                f"the update of the {kind} tensors is longer than {limit:.4g}, the most that the "
                "public plan allows"
            )


def read_weight(message: Message, key: str, metrics_key: str = "metrics") -> float:
    """Public record count of a reply, the weight of its update.

    Raises
    ------
    InvalidReply
        If it is missing or not a whole number of at least 1.
    """
    record = message.content.get(metrics_key)
    if not isinstance(record, MetricRecord) or key not in record:
        raise InvalidReply(f"no {key!r} to weight it by")
    value = record[key]
    if not isinstance(value, int | float) or not 1 <= value < 2**53 or value != int(value):
        raise InvalidReply(f"{key!r} must be a whole number of records, at least 1")
    return float(value)


class WeightedMean:
    """Running weighted mean of updates; memory does not grow with their number.

    Adds in float64, so that the order in which replies arrive shows only in bits that the
    final rounding to float32 nearly always drops.
    """

    def __init__(self) -> None:
        self.count = 0
        self._weight = 0.0
        self._sums: dict[str, Float64s] = {}

    def add(self, update: Mapping[str, npt.NDArray[np.float32]], weight: float) -> None:
        """Fold one update in."""
        for name, value in update.items():
            if name in self._sums:
                self._sums[name] += weight * value.astype(np.float64)
            else:
                self._sums[name] = weight * value.astype(np.float64)
        self._weight += weight
        self.count += 1

    def mean(self) -> dict[str, Float64s]:
        """``sum_k w_k D_k / sum_k w_k`` of what was added; empty if nothing was."""
        return {name: total / self._weight for name, total in self._sums.items()}
