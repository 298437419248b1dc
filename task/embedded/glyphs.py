"""Public training data made by code: printed letters bent until they look written.

The embedded backbone must be learned from data that nobody needs to protect and that no hub
needs to serve.  Letters of many alphabets are drawn with the fonts that matplotlib installs,
distorted, and brought into the published format of the handwritten digits (32 x 32 bitmaps,
of which each 4 x 4 block is counted: 8 x 8 values of 0..16).  No digit of any script is drawn.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL import ImageFont

BITMAP_SIDE = 32
"""Side of the bitmaps, in pixels, before the blocks are counted."""
BLOCK_SIDE = 4
"""Side of one counted block, in bitmap pixels."""
LEVELS = BLOCK_SIDE * BLOCK_SIDE
"""The largest count of a block; counts are 0..16."""

FONT_FILES = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSans-BoldOblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSansMono-Oblique.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "DejaVuSerif-BoldItalic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "STIXGeneralItalic.ttf",
    "STIXGeneralBolIta.ttf",
)
"""Fonts of matplotlib's data folder; other fonts of the machine are never used."""

LETTER_RANGES = (
    (0x0041, 0x007A),  # Latin
    (0x00DE, 0x00FE),  # Latin of Iceland and the German sharp s
    (0x0391, 0x03FF),  # Greek and Coptic
    (0x0402, 0x045F),  # Cyrillic
)
"""Blocks of code points, first and last, whose letters may be drawn.

More alphabets were tried and hurt: with 300 to 1000 shapes the backbone spends its short training
on differences that 8 x 8 values hardly show."""

_DRAWING_SIZE = 48  # the em in pixels: letters then stand about as high as the bitmaps
_SAME_SHAPE = 0.88
_CHUNK = 1000  # drawings distorted at once: bounds memory, and fixes the order of random numbers


@dataclass(frozen=True)
class Distortion:
    """Ranges of the random distortion; lengths in half bitmaps, angles in radians."""

    stretch: tuple[float, float] = (0.6, 1.1)
    width: tuple[float, float] = (0.25, 0.85)
    height: tuple[float, float] = (0.9, 1.05)
    rotation: float = 0.1
    slant: float = 0.2
    shift: float = 0.05
    knots: tuple[int, int] = (4, 4)
    elastic: float = 0.12
    cut: tuple[float, float] = (0.22, 0.52)


@dataclass(frozen=True)
class GlyphBank:
    """Clean drawings, one row for each pair of letter and font.

    Attributes
    ----------
    bitmaps : numpy.ndarray
        uint8, shape (n, 32, 32), 0 paper to 255 ink, each drawing stretched to the full frame.
    aspects : numpy.ndarray
        float32, shape (n,), width over height before stretching.
    labels : numpy.ndarray
        int64, shape (n,), the shape class of the letter, 0..num_classes - 1.
    letters : tuple of str
        All letters drawn; letters of the same shape (Latin A, Greek Alpha) share a class.
    """

    bitmaps: np.ndarray
    aspects: np.ndarray
    labels: np.ndarray
    letters: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of shape classes."""
        return int(self.labels.max()) + 1


def is_public_letter(character: str) -> bool:
    """Whether a character is a plain letter and no number in any reading of Unicode."""
    if unicodedata.category(character) not in {"Lu", "Ll", "Lo"}:
        return False
    if unicodedata.numeric(character, None) is not None:
        return False
    if unicodedata.normalize("NFKD", character) != character:
        return False  # accents repeat a shape, and compatibility forms may hide a digit
    # The tone letters of old Zhuang are digits in all but the code point.
    return " TONE " not in unicodedata.name(character, "")


def draw_bank(
    fonts: tuple[str, ...] = FONT_FILES,
    ranges: tuple[tuple[int, int], ...] = LETTER_RANGES,
) -> GlyphBank:
    """Draw every public letter with every font that has it.

    Parameters
    ----------
    fonts : tuple of str
        File names in matplotlib's font folder.
    ranges : tuple of pairs of int
        First and last code points.

    Returns
    -------
    GlyphBank
        The drawings, in the order of letters, then fonts.

    Raises
    ------
    FileNotFoundError
        If matplotlib does not carry one of the fonts.
    """
    import matplotlib
    from matplotlib.ft2font import FT2Font
    from PIL import ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    missing = [name for name in fonts if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"matplotlib's font folder lacks {', '.join(missing)}")
    faces = [
        (ImageFont.truetype(str(folder / name), _DRAWING_SIZE), FT2Font(str(folder / name)))
        for name in fonts
    ]
    bitmaps: list[np.ndarray] = []
    aspects: list[float] = []
    labels: list[int] = []
    letters: list[str] = []
    prototypes: list[np.ndarray] = []
    for code in (code for first, last in ranges for code in range(first, last + 1)):
        letter = chr(code)
        if not is_public_letter(letter):
            continue
        attempts = [_draw(letter, pen) for pen, table in faces if table.get_char_index(code) != 0]
        drawings = [drawing for drawing in attempts if drawing is not None]
        if not drawings:
            continue
        label = _shape_class(drawings[0], prototypes)
        letters.append(letter)
        for bitmap, aspect in drawings:
            bitmaps.append(bitmap)
            aspects.append(aspect)
            labels.append(label)
    return GlyphBank(
        np.stack(bitmaps),
        np.array(aspects, dtype=np.float32),
        np.array(labels, dtype=np.int64),
        tuple(letters),
    )


def _draw(letter: str, pen: ImageFont.FreeTypeFont) -> tuple[np.ndarray, float] | None:
    from PIL import Image

    ink = pen.getmask(letter, mode="L")
    box = ink.getbbox()
    if box is None:
        return None
    image = Image.frombytes("L", ink.size, bytes(ink)).crop(box)
    aspect = image.width / image.height
    side = (BITMAP_SIDE, BITMAP_SIDE)
    return np.asarray(image.resize(side, Image.Resampling.BOX)), aspect


def _shape_class(drawing: tuple[np.ndarray, float], prototypes: list[np.ndarray]) -> int:
    """Index of the prototype that a drawing repeats; a new prototype if it repeats none."""
    bitmap, aspect = drawing
    # Compared as coarsely as the digits' format will show them.
    blocks = bitmap.reshape(BITMAP_SIDE // BLOCK_SIDE, BLOCK_SIDE, -1, BLOCK_SIDE).mean(axis=(1, 3))
    flat = blocks.astype(np.float32).ravel()
    flat -= flat.mean()
    flat = np.append(flat / max(float(np.linalg.norm(flat)), 1e-6), 0.5 * np.log(aspect))
    for index, known in enumerate(prototypes):
        alike = float(flat[:-1] @ known[:-1]) - abs(float(flat[-1] - known[-1]))
        if alike > _SAME_SHAPE:
            return index
    prototypes.append(flat)
    return len(prototypes) - 1


def distort(
    bitmaps: torch.Tensor,
    aspects: torch.Tensor,
    strength: Distortion,
    generator: torch.Generator,
) -> torch.Tensor:
    """Bend clean drawings at random and count their blocks.

    Parameters
    ----------
    bitmaps : torch.Tensor
        Floating, shape (n, 32, 32), 0 paper to 1 ink.
    aspects : torch.Tensor
        Shape (n,), width over height of each letter.
    strength : Distortion
        Ranges to draw from.
    generator : torch.Generator
        Source of all randomness.

    Returns
    -------
    torch.Tensor
        Floating, shape (n, 8, 8), whole counts 0..16.
    """
    import torch
    from torch.nn import functional

    count = bitmaps.shape[0]
    sides = [count, 1, BITMAP_SIDE, BITMAP_SIDE]

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    width = (aspects * uniform(*strength.stretch)).clamp(*strength.width)
    angle = torch.randn(count, generator=generator) * strength.rotation
    slant = torch.randn(count, generator=generator) * strength.slant
    height = uniform(*strength.height)
    # Rows of the inverse map: from a pixel of the bent bitmap to one of the drawing.
    cos, sin = angle.cos(), angle.sin()
    top = torch.stack(
        [(cos + slant * sin) / width, (slant * cos - sin) / width, uniform(-1, 1) * strength.shift],
        dim=1,
    )
    bottom = torch.stack([sin / height, cos / height, uniform(-1, 1) * strength.shift], dim=1)
    grid = functional.affine_grid(torch.stack([top, bottom], dim=1), sides, align_corners=False)
    knots = torch.randn(count, 2, *strength.knots, generator=generator) * strength.elastic
    bend = functional.interpolate(knots, size=BITMAP_SIDE, mode="bicubic", align_corners=True)
    bent = functional.grid_sample(
        bitmaps[:, None], grid + bend.permute(0, 2, 3, 1), align_corners=False
    )
    # A blurred stroke cut at a low level is thick, at a high level thin.
    soft = functional.avg_pool2d(bent, 5, stride=1, padding=2, count_include_pad=False)
    ink = soft > uniform(*strength.cut)[:, None, None, None]
    return (functional.avg_pool2d(ink.float(), BLOCK_SIDE)[:, 0] * LEVELS).round()


def render_glyphs(
    bank: GlyphBank,
    count: int,
    seed: int,
    strength: Distortion | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Make written-looking letters in the digits' format.

    Every shape class is as likely as any other, and every drawing of it.

    Parameters
    ----------
    bank : GlyphBank
        The clean drawings.
    count : int
        Number of images.
    seed : int
        Seed of the choice and of the distortion; the same seed gives the same images.
    strength : Distortion, optional
        Ranges of the distortion; the defaults of :class:`Distortion` if left out.
    report : callable
        Called now and then with the number of images made and ``count``.

    Returns
    -------
    images : numpy.ndarray
        uint8, shape (count, 8, 8), whole counts 0..16.
    labels : numpy.ndarray
        int64, shape (count,), shape classes.
    """
    import torch

    strength = strength or Distortion()
    choice = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    members = [np.flatnonzero(bank.labels == label) for label in range(bank.num_classes)]
    labels = choice.integers(bank.num_classes, size=count)
    rows = np.array([members[label][choice.integers(len(members[label]))] for label in labels])
    images = np.empty((count, BITMAP_SIDE // BLOCK_SIDE, BITMAP_SIDE // BLOCK_SIDE), dtype=np.uint8)
    for start in range(0, count, _CHUNK):
        part = rows[start : start + _CHUNK]
        clean = torch.from_numpy(bank.bitmaps[part]).float() / 255
        bent = distort(clean, torch.from_numpy(bank.aspects[part]), strength, generator)
        images[start : start + _CHUNK] = bent.numpy().astype(np.uint8)
        report(min(start + _CHUNK, count), count)
    return images, labels
