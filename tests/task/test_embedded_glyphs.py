"""The public made data: no digits, the digits' format, the same images for the same seed."""

import unicodedata

import numpy as np
import pytest

from task.embedded import glyphs, pixels


@pytest.fixture(scope="module")
def bank() -> glyphs.GlyphBank:
    return glyphs.draw_bank()


def test_no_letter_is_a_number_in_any_script(bank):
    for letter in bank.letters:
        assert unicodedata.digit(letter, None) is None
        assert unicodedata.decimal(letter, None) is None
        assert unicodedata.numeric(letter, None) is None
        assert unicodedata.category(letter).startswith("L")


@pytest.mark.parametrize("character", ["0", "9", "٣", "५", "²", "５", "Ⅷ", "一", "ƽ", "%", " "])
def test_numbers_and_their_look_alikes_are_refused(character):
    assert not glyphs.is_public_letter(character)


@pytest.mark.parametrize("character", ["A", "q", "ß", "Ω", "ж"])
def test_plain_letters_are_accepted(character):
    assert glyphs.is_public_letter(character)


def test_a_range_that_spans_digits_draws_none_of_them():
    bank = glyphs.draw_bank(fonts=glyphs.FONT_FILES[:1], ranges=((0x0030, 0x0042),))
    assert bank.letters == ("A", "B")


def test_bank_is_whole(bank):
    assert bank.bitmaps.shape == (len(bank.labels), glyphs.BITMAP_SIDE, glyphs.BITMAP_SIDE)
    assert bank.bitmaps.dtype == np.uint8
    assert set(bank.labels) == set(range(bank.num_classes))
    assert 100 < bank.num_classes < len(bank.letters)
    assert (bank.bitmaps.reshape(len(bank.labels), -1).max(axis=1) > 0).all()


def test_letters_of_one_shape_share_a_class():
    fonts = glyphs.FONT_FILES[:1]
    bank = glyphs.draw_bank(fonts, ranges=((0x0041, 0x0042), (0x0391, 0x0391), (0x0410, 0x0410)))
    assert bank.letters == ("A", "B", "Α", "А")
    assert bank.labels.tolist() == [0, 1, 0, 0]


def test_missing_font_is_named():
    with pytest.raises(FileNotFoundError, match=r"NoSuchFont\.ttf"):
        glyphs.draw_bank(fonts=("NoSuchFont.ttf",))


def test_rendering_has_the_digits_format(bank):
    images, labels = glyphs.render_glyphs(bank, 1200, seed=3)
    assert images.shape == (1200, 8, 8)
    assert images.dtype == np.uint8
    assert images.min() == 0
    assert images.max() == 16
    assert labels.dtype == np.int64
    assert 0 <= labels.min() <= labels.max() < bank.num_classes
    assert len(set(labels)) > 0.9 * bank.num_classes


def test_rendering_repeats_with_its_seed_and_changes_with_it(bank):
    first, first_labels = glyphs.render_glyphs(bank, 40, seed=5)
    again, again_labels = glyphs.render_glyphs(bank, 40, seed=5)
    other, _ = glyphs.render_glyphs(bank, 40, seed=6)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first_labels, again_labels)
    assert (first != other).any()


def test_two_images_of_one_drawing_differ():
    bank = glyphs.draw_bank(fonts=glyphs.FONT_FILES[:1], ranges=((0x0041, 0x0041),))
    images, _ = glyphs.render_glyphs(bank, 8, seed=1)
    assert len({image.tobytes() for image in images}) == 8


def test_rendering_reports_to_the_end(bank):
    seen = []
    glyphs.render_glyphs(bank, 1500, seed=0, report=lambda done, total: seen.append((done, total)))
    assert seen == [(1000, 1500), (1500, 1500)]


def test_greys_give_the_counts_back():
    counts = np.arange(17)
    greys = pixels.counts_to_grey(counts)
    assert greys.dtype == np.uint8
    assert (greys[0], greys[-1]) == (0, 255)
    np.testing.assert_array_equal(np.rint(greys * 16.0 / 255), counts)
