"""The private records: exact values, and a split that never moves."""

import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_digits

from task.embedded import NUM_LABELS, load_digits_arrays


def test_shapes_types_and_sizes():
    for split, size in (("train", 1437), ("test", 360)):
        images, labels = load_digits_arrays(split)
        assert images.shape == (size, 8, 8)
        assert images.dtype == np.uint8
        assert labels.shape == (size,)
        assert labels.dtype == np.int64
        assert set(labels) == set(range(NUM_LABELS))


def test_both_parts_together_are_the_data_exactly():
    parts = [load_digits_arrays(split) for split in ("train", "test")]
    images = np.concatenate([images for images, _ in parts])
    labels = np.concatenate([labels for _, labels in parts])
    counts = np.rint(images.astype(float) * 16 / 255).astype(int)
    found = sorted((row.tobytes(), label) for row, label in zip(counts, labels, strict=True))
    whole = load_digits()
    expected = sorted(
        (row.astype(int).tobytes(), label)
        for row, label in zip(whole.images, whole.target, strict=True)
    )
    # 1797 records, each in exactly one part, each value recovered exactly.
    assert found == expected
    assert images.max() == 255


def test_split_is_stratified():
    _, train = load_digits_arrays("train")
    _, test = load_digits_arrays("test")
    share = np.bincount(test) / (np.bincount(test) + np.bincount(train))
    np.testing.assert_allclose(share, 0.2, atol=0.01)


def test_split_never_changes():
    images, labels = load_digits_arrays("test")
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    assert digest == "ec7ab00d353cc896379d1bf14db7b7e995f644201cd7db4d686888f21b985864"


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="validation"):
        load_digits_arrays("validation")
