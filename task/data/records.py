"""Encoded records: what a client or the server hands to the model, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..encoders import ImageEncoder, Pixels, TextEncoder, Tokens

Indices = Sequence[int] | npt.NDArray[np.integer]


class Inputs(Protocol):
    """Encoded inputs of many records, without their labels."""

    def __len__(self) -> int: ...

    def tensors(self, indices: npt.NDArray[np.int64]) -> dict[str, Tensor]:
        """Return the model's inputs for these records, as CPU tensors."""

    @property
    def digest(self) -> Callable[[int], bytes]:
        """SHA-256 of a record's raw content, the label left out: the same for every model."""


class PixelRows(Protocol):
    """Images in the encoder's size: an array, or files that are decoded when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Pixels: ...


class ImageInputs:
    """Images in the encoder's size.

    Parameters
    ----------
    encoder : ImageEncoder
        Makes tensors of pixels.
    rows : PixelRows
        The images.
    digest : callable
        SHA-256 of the raw content of image ``index``.
    """

    def __init__(
        self, encoder: ImageEncoder, rows: PixelRows, digest: Callable[[int], bytes]
    ) -> None:
        self._encoder = encoder
        self._rows = rows
        self.digest = digest

    def __len__(self) -> int:
        return len(self._rows)

    def tensors(self, indices: npt.NDArray[np.int64]) -> dict[str, Tensor]:
        """Return float32 ``pixel_values`` (n, channels, height, width)."""
        size = self._encoder.size
        pixels = np.empty((len(indices), self._encoder.channels, size, size), np.uint8)
        for place, index in enumerate(indices):
            pixels[place] = self._rows[int(index)]
        return self._encoder.tensors(pixels)


class TextInputs:
    """Texts as tokens."""

    def __init__(
        self, encoder: TextEncoder, rows: Sequence[Tokens], digests: Sequence[bytes]
    ) -> None:
        self._encoder = encoder
        self._rows = rows
        self.digest = digests.__getitem__

    def __len__(self) -> int:
        return len(self._rows)

    def tensors(self, indices: npt.NDArray[np.int64]) -> dict[str, Tensor]:
        """Return int64 tensors (n, longest of these texts)."""
        return self._encoder.tensors([self._rows[int(index)] for index in indices])


class Records:
    """The records of one client, or the public test split.

    Parameters
    ----------
    inputs : Inputs
        Encoded inputs; may be shared with other clients of a simulation.
    labels : numpy.ndarray
        int64, one per entry of ``inputs``.
    rows : numpy.ndarray, optional
        The entries of ``inputs`` that belong here; not given: all.
    """

    def __init__(
        self,
        inputs: Inputs,
        labels: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64] | None = None,
    ) -> None:
        if len(inputs) != len(labels):
            raise ValueError(f"{len(inputs)} inputs but {len(labels)} labels")
        self._inputs = inputs
        self._all_labels = labels
        self._rows = np.arange(len(labels)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """The classes of these records: int64, (n,)."""
        return self._all_labels[self._rows]

    def subset(self, indices: Indices) -> Records:
        """Return some of these records, in the order of ``indices``, without copying them."""
        return Records(self._inputs, self._all_labels, self._rows[_as_array(indices)])

    def digests(self) -> list[bytes]:
        """SHA-256 of the raw content of each record, its label left out, in order.

        Raises
        ------
        DataError
            If a file cannot be read.
        """
        return [self._inputs.digest(int(row)) for row in self._rows]

    def batch(self, indices: Indices) -> dict[str, Tensor]:
        """Return records as CPU tensors, ``labels`` (int64) among them; may be empty.

        Parameters
        ----------
        indices : sequence of int
            Positions in ``range(len(self))``.

        Raises
        ------
        DataError
            If an image that is decoded only now cannot be read.
        """
        rows = self._rows[_as_array(indices)]
        batch = self._inputs.tensors(rows)
        batch["labels"] = torch.from_numpy(self._all_labels[rows])
        return batch


def _as_array(indices: Indices) -> npt.NDArray[np.int64]:
    return np.asarray(indices, dtype=np.int64)
