"""Images from files, table cells and arrays, checked and brought to the encoder's size."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..encoders import ImageEncoder, Pixels
from ..errors import DataError
from .records import ImageInputs

HELD_BYTES = 256 * 1024**2
"""Up to this size resized images are held in memory; larger sets are decoded batch by batch."""

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""File names of images in an image folder."""

_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


class EncodedImages:
    """Images that are opened, decoded and resized when asked for.

    Parameters
    ----------
    encoder : ImageEncoder
        Size and channels.
    sources : sequence
        Per image a path, or a table's cell: a mapping with ``bytes`` and ``path``.
    folder : pathlib.Path
        What relative paths are relative to.
    where : str
        File and column, for messages.
    """

    def __init__(
        self, encoder: ImageEncoder, sources: Sequence[Any], folder: Path, where: str
    ) -> None:
        self._encoder = encoder
        self._sources = sources
        self._folder = folder
        self._where = where

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index: int, /) -> Pixels:
        with self._open(index) as image:
            try:
                return self._encoder.pixels(image)
            except _UNREADABLE:
                raise self._unreadable(index) from None

    def check(self) -> None:
        """Open every image without decoding it: missing files and foreign formats show up."""
        for index in range(len(self)):
            self._open(index).close()

    def digest(self, index: int) -> bytes:
        """SHA-256 of the encoded image, as it lies in its file or cell."""
        try:
            stream = _stream(self._sources[index], self._folder)
            content = stream.read_bytes() if isinstance(stream, Path) else stream.getvalue()
        except OSError:
            raise self._unreadable(index) from None
        return hashlib.sha256(content).digest()

    def _open(self, index: int) -> Image.Image:
        source = self._sources[index]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(_stream(source, self._folder))
        except (*_UNREADABLE, Image.DecompressionBombWarning):
            raise self._unreadable(index) from None
        if image.mode.startswith(("I", "F")):
            image.close()
            raise DataError(
                f"{self._where}, image {index + 1}: more than 8 bits per channel; accepted are "
                "images with 8 bits per channel"
            )
        return image

    def _unreadable(self, index: int) -> DataError:
        # The source and Pillow's own message may hold content, so neither is repeated.
        return DataError(
            f"{self._where}, image {index + 1}: missing or unreadable; accepted are image files "
            "that Pillow reads"
        )


def image_inputs(images: EncodedImages, encoder: ImageEncoder) -> ImageInputs:
    """Decode small sets at once, so that a bad image shows up before anything is spent."""
    if len(images) * encoder.channels * encoder.size**2 > HELD_BYTES:
        images.check()
        return ImageInputs(encoder, images, images.digest)
    shape = (len(images), encoder.channels, encoder.size, encoder.size)
    pixels = np.empty(shape, np.uint8)
    for index in range(len(images)):
        pixels[index] = images[index]
    return ImageInputs(encoder, pixels, images.digest)


def array_inputs(array: npt.NDArray[Any], encoder: ImageEncoder, where: str) -> ImageInputs:
    """Check and resize an array of images.

    Parameters
    ----------
    array : numpy.ndarray
        (n, height, width), or with a last axis of 1 or 3 channels; uint8, or floats in [0, 1].

    Raises
    ------
    DataError
        If the shape or the type is another, or a pixel is NaN or out of range.
    """
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim != 3 and not (array.ndim == 4 and array.shape[3] == 3):
        raise DataError(
            f"{where}: shape {array.shape[1:]} per record; accepted: (height, width), "
            "(height, width, 1) or (height, width, 3)"
        )
    if array.dtype != np.uint8:
        array = _to_bytes(array, where)
    size = encoder.size
    pixels = np.empty((len(array), encoder.channels, size, size), np.uint8)
    for index, image in enumerate(array):
        pixels[index] = encoder.pixels(np.ascontiguousarray(image))
    digests = [_digest(image) for image in array]
    return ImageInputs(encoder, pixels, digests.__getitem__)


def _digest(image: npt.NDArray[Any]) -> bytes:
    return hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).digest()


def _to_bytes(array: npt.NDArray[Any], where: str) -> npt.NDArray[np.uint8]:
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"{where}: type {array.dtype}; accepted: uint8, or floats in [0, 1]")
    good = (array >= 0) & (array <= 1)  # NaN is neither
    if not good.all():
        row = int(np.argmin(good.reshape(len(good), -1).all(axis=1)))
        raise DataError(
            f"{where}, row {row + 1}: a pixel is NaN or outside [0, 1]; accepted: uint8, or floats "
            "in [0, 1]"
        )
    pixels: npt.NDArray[np.uint8] = np.rint(array * 255).astype(np.uint8)
    return pixels


def _stream(source: Any, folder: Path) -> Path | io.BytesIO:
    if isinstance(source, Path):
        return source
    if source["bytes"] is not None:
        return io.BytesIO(source["bytes"])
    return folder / str(source["path"])
