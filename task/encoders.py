"""From raw columns to tensors: one encoder per backbone, the same on every machine.

Nothing here is learned from data: sizes, means and vocabulary come with the public backbone, so
encoding a record tells nothing about the other records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}

Pixels = npt.NDArray[np.uint8]
Tokens = Mapping[str, npt.NDArray[np.int32]]


class Encoder(Protocol):
    """What every encoder offers; see :class:`ImageEncoder` and :class:`TextEncoder`."""

    @property
    def key(self) -> str:
        """Two encoders with equal keys encode every record equally."""

    def made_up(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return ``n`` public random inputs of the right shapes, without labels."""


@dataclass(frozen=True)
class ImageEncoder:
    """Images to ``pixel_values``: square resize, scale to [0, 1], normalise.

    Parameters
    ----------
    channels : int
        1 (grey) or 3 (red, green, blue).
    size : int
        Height and width in pixels.
    interpolation : str
        Name of PIL's filter, in lower case.
    mean, std : tuple of float
        Per channel, on the scale [0, 1].
    """

    channels: int
    size: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def key(self) -> str:
        """Identity of the transform."""
        return f"image:{self.channels}:{self.size}:{self.interpolation}:{self.mean}:{self.std}"

    def pixels(self, image: Image.Image | npt.NDArray[np.uint8]) -> Pixels:
        """Bring one image to this size and these channels: uint8, (channels, size, size)."""
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        picture = picture.convert("L" if self.channels == 1 else "RGB")
        if picture.size != (self.size, self.size):
            picture = picture.resize((self.size, self.size), self._filter)
        array = np.asarray(picture, dtype=np.uint8)
        return array[None] if self.channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))

    @property
    def _filter(self) -> Image.Resampling:
        return _RESAMPLING.get(self.interpolation, Image.Resampling.BICUBIC)

    def tensors(self, pixels: Pixels) -> dict[str, Tensor]:
        """Normalise pixels (n, channels, size, size) to float32 ``pixel_values``."""
        shape = (1, self.channels, 1, 1)
        mean = torch.tensor(self.mean, dtype=torch.float32).view(shape)
        std = torch.tensor(self.std, dtype=torch.float32).view(shape)
        values = torch.from_numpy(pixels).to(torch.float32).div_(255.0)
        return {"pixel_values": values.sub_(mean).div_(std)}

    def made_up(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return standard normal ``pixel_values`` (n, channels, size, size)."""
        shape = (n, self.channels, self.size, self.size)
        return {"pixel_values": torch.randn(shape, generator=generator)}


@dataclass(frozen=True)
class TextEncoder:
    """Texts to ``input_ids``, ``attention_mask`` and, for some families, ``token_type_ids``.

    Parameters
    ----------
    tokenizer : object
        A transformers tokenizer that has a padding token.
    max_length : int
        Longest text in tokens, special tokens included.
    vocab_size : int
        Rows of the backbone's embedding; made-up tokens stay below it.
    name : str
        What the tokenizer was loaded from, for :attr:`key`.
    """

    tokenizer: Any = field(repr=False, compare=False)
    max_length: int
    vocab_size: int
    name: str

    @property
    def key(self) -> str:
        """Identity of the tokenisation."""
        return f"text:{self.max_length}:{self.name}"

    @property
    def _has_types(self) -> bool:
        return "token_type_ids" in self.tokenizer.model_input_names

    def tokens(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Tokens]:
        """Tokenise without padding; a text that gives no token at all becomes one padding token.

        Parameters
        ----------
        texts : sequence of str
            The texts, or the first ones of pairs.
        pairs : sequence of str, optional
            The second ones of pairs.

        Returns
        -------
        list of mapping
            Per text ``input_ids`` and, if the family uses them, ``token_type_ids``: int32, (t,).
        """
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            list(pairs) if pairs is not None else None,
            truncation=True,
            max_length=self.max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=self._has_types,
        )
        empty = {"input_ids": [self.tokenizer.pad_token_id], "token_type_ids": [0]}
        names = ("input_ids", "token_type_ids") if self._has_types else ("input_ids",)
        return [
            {name: np.asarray(encoded[name][i] or empty[name], np.int32) for name in names}
            for i in range(len(texts))
        ]

    def tensors(self, tokens: Sequence[Tokens]) -> dict[str, Tensor]:
        """Pad on the right to the longest of the batch: int64 tensors (n, t)."""
        lengths = [len(item["input_ids"]) for item in tokens]
        shape = (len(tokens), max(lengths, default=1))
        mask = np.arange(shape[1])[None, :] < np.asarray(lengths, np.int64).reshape(-1, 1)
        result = {"attention_mask": torch.from_numpy(mask.astype(np.int64))}
        fills = {"input_ids": self.tokenizer.pad_token_id}
        if self._has_types:
            fills["token_type_ids"] = self.tokenizer.pad_token_type_id
        for name, fill in fills.items():
            padded = np.full(shape, fill, np.int64)
            if tokens:
                padded[mask] = np.concatenate([item[name] for item in tokens])
            result[name] = torch.from_numpy(padded)
        return result

    def made_up(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return random tokens (n, at most 16), every second text shorter than the longest."""
        length = min(16, self.max_length)
        pad = self.tokenizer.pad_token_id
        ids = torch.randint(0, self.vocab_size - 1, (n, length), generator=generator)
        ids += (ids >= pad).long()  # never the padding token inside a text
        lengths = [length if row % 2 == 0 else max(1, length // 2) for row in range(n)]
        values = ids.numpy().astype(np.int32)
        zeros = np.zeros(length, np.int32)
        return self.tensors(
            [
                {"input_ids": values[row, :end], "token_type_ids": zeros[:end]}
                for row, end in enumerate(lengths)
            ]
        )
