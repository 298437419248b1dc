"""Loading images: embedded digits, arrays, folders and tables; each also with bad files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import task.data.images as images
from task.data import load_client_records, load_test_records, num_labels
from task.errors import DataError
from task.settings import DataSettings
from tests.task.records import COLOUR, GREY, PETS, SECRET, picture, png, site, write_table


def test_embedded_digits(monkeypatch):
    import sys
    from types import ModuleType

    generator = np.random.default_rng(0)
    arrays = generator.integers(0, 256, (60, 8, 8), dtype=np.uint8), np.arange(60) % 10
    stand_in = ModuleType("task.embedded.digits")
    stand_in.load_digits_arrays = lambda split: tuple(a[:40] for a in arrays)
    monkeypatch.setitem(sys.modules, "task.embedded.digits", stand_in)
    settings = DataSettings(min_records=1)
    assert num_labels(settings) == 10
    node = {"partition-id": 0, "num-partitions": 1}
    records = load_client_records(settings, GREY, node, seed=1)
    batch = records.batch(range(40))
    assert batch["pixel_values"].shape == (40, 1, 8, 8)
    expected = (torch.from_numpy(arrays[0][:40, None]) / 255 - 0.5) / 0.25
    torch.testing.assert_close(batch["pixel_values"], expected)
    assert len(load_test_records(settings, GREY)) == 40
    with pytest.raises(DataError, match="has no files"):
        site(settings, GREY, "anything")


@pytest.mark.parametrize("encoder", [GREY, COLOUR])
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3), (16, 12)])
def test_npz(encoder, shape, tmp_path):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (20, *shape), dtype=np.uint8)
    labels = np.arange(20) % 3
    np.savez(
        tmp_path / "d.npz", x_train=pixels, y_train=labels, x_test=pixels[:5], y_test=labels[:5]
    )
    np.savez(tmp_path / "plain.npz", x=(pixels / 255).astype(np.float32), y=labels[:, None])
    settings = DataSettings(source="npz", num_labels=3, path=str(tmp_path / "d.npz"))
    one = site(settings, encoder, tmp_path / "d.npz").batch(range(20))
    two = site(settings, encoder, tmp_path / "plain.npz").batch(range(20))
    assert one["pixel_values"].shape == (20, encoder.channels, 8, 8)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert len(load_test_records(settings, encoder)) == 5


def test_refused_npz(tmp_path):
    settings = DataSettings(source="npz", num_labels=3)
    good = np.full((20, 8, 8), 0.5, np.float32)
    nan = good.copy()
    nan[6, 1, 1] = np.nan
    labels = np.arange(20) % 3
    cases = [
        ({"x": nan, "y": labels}, "row 7: a pixel is NaN"),
        ({"x": good * 255, "y": labels}, r"row 1: a pixel is NaN or outside \[0, 1\]"),
        ({"x": good.astype(np.int32), "y": labels}, "type int32"),
        ({"x": good[:, None], "y": labels}, r"shape \(1, 8, 8\)"),
        ({"x": good, "y": labels + 1}, "labels, row 3: not a declared class"),
        ({"x": good, "y": labels - 1}, "labels, row 1: not a declared class"),
        ({"x": good, "y": labels / 2}, "y is float64"),
        ({"x": good, "y": labels[1:]}, "differ in length"),
        ({"a": good}, "found a; accepted: arrays x_train and y_train, or x and y"),
        ({"x": np.array([{}] * 20, dtype=object), "y": labels}, "cannot be read"),
    ]
    for arrays, message in cases:
        np.savez(tmp_path / "d.npz", **arrays)
        with pytest.raises(DataError, match=message):
            site(settings, GREY, tmp_path / "d.npz")
    (tmp_path / "d.npz").write_bytes(b"not a zip file")
    with pytest.raises(DataError, match="cannot be read"):
        site(settings, GREY, tmp_path / "d.npz")


@pytest.mark.parametrize("held", [images.HELD_BYTES, 0])
def test_image_folder(held, folder, monkeypatch):
    monkeypatch.setattr(images, "HELD_BYTES", held)
    records = site(PETS, COLOUR, folder)
    assert records.labels.tolist() == [0] * 10 + [2] * 10
    batch = records.batch([1, 10])
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    first_red = batch["pixel_values"][:, 0].mean(dim=(1, 2)) * 0.25 + 0.5
    torch.testing.assert_close(first_red, torch.tensor([201 / 255, 30 / 255]))


@pytest.mark.parametrize("held", [images.HELD_BYTES, 0])
def test_refused_image_folder(held, folder, monkeypatch):
    monkeypatch.setattr(images, "HELD_BYTES", held)
    Image.fromarray(np.full((4, 4), 900, np.uint16)).save(folder / "cat" / "3.png")
    with pytest.raises(DataError, match="image 14: more than 8 bits"):
        site(PETS, COLOUR, folder)
    (folder / "cat" / "3.png").write_text(SECRET)
    with pytest.raises(DataError, match="image 14: missing or unreadable") as caught:
        site(PETS, COLOUR, folder)
    assert SECRET not in str(caught.value)
    (folder / SECRET).mkdir()
    with pytest.raises(
        DataError, match=r"1 sub-folders are not declared.*dog, bird, cat"
    ) as caught:
        site(PETS, COLOUR, folder)
    assert SECRET not in str(caught.value)
    with pytest.raises(DataError, match="no such folder"):
        site(PETS, COLOUR, folder / "none")


def test_a_truncated_image_of_a_large_set_shows_up_in_its_batch(folder, monkeypatch):
    monkeypatch.setattr(images, "HELD_BYTES", 0)
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (40, 40), dtype=np.uint8))
    noise.save(folder / "cat" / "3.png")
    whole = (folder / "cat" / "3.png").read_bytes()
    (folder / "cat" / "3.png").write_bytes(whole[: len(whole) // 2])
    records = site(PETS, COLOUR, folder)
    records.batch([0])
    with pytest.raises(DataError, match="image 14"):
        records.batch([13])


def test_images_in_tables(tmp_path):
    settings = DataSettings(source="parquet", num_labels=2)
    cells = [{"image": {"bytes": png(i), "path": None}, "label": i % 2} for i in range(20)]
    path = write_table(tmp_path / "data.parquet", "parquet", cells)
    batch = site(settings, GREY, path).batch([3])
    torch.testing.assert_close(batch["pixel_values"].mean(), torch.tensor((3 / 255 - 0.5) / 0.25))
    (tmp_path / "files").mkdir()
    for index in range(20):
        picture(index).save(tmp_path / "files" / f"{index}.png")
    listed = [{"image": f"files/{i}.png", "label": i % 2} for i in range(20)]
    path = write_table(tmp_path / "data.csv", "csv", listed)
    settings = DataSettings(source="csv", num_labels=2)
    assert torch.equal(site(settings, GREY, path).batch([3])["pixel_values"], batch["pixel_values"])
    listed[4]["image"] = SECRET
    path = write_table(tmp_path / "data.csv", "csv", listed)
    with pytest.raises(DataError, match="column 'image', image 5: missing") as caught:
        site(settings, GREY, path)
    assert SECRET not in str(caught.value)
    numbers = [{"image": i, "label": i % 2} for i in range(20)]
    path = write_table(tmp_path / "data.parquet", "parquet", numbers)
    with pytest.raises(DataError, match=r"column 'image': holds .*int64"):
        site(DataSettings(source="parquet", num_labels=2), GREY, path)
