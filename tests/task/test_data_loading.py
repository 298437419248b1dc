"""Loading records: every source, simulation and site, and what a client says about bad data."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import task.data.images as images
from task.backbones import load_backbone
from task.data import load_client_records, load_test_records, num_labels, simulation_cache
from task.encoders import ImageEncoder
from task.errors import DataError
from task.settings import DataSettings
from tests import models

GREY = ImageEncoder(1, 8, "bicubic", (0.5,), (0.25,))
COLOUR = ImageEncoder(3, 8, "bilinear", (0.5, 0.4, 0.3), (0.25, 0.2, 0.1))
SECRET = "Xanthippe"
TEXTS = ["the film was good", "", "NA", "not a good plot", "bad", "007", "very bad film", "good"]


@pytest.fixture(scope="module")
def roberta(settings_of):
    return load_backbone(settings_of("roberta"), 2, seed=0).encoder


@pytest.fixture(scope="module")
def bert(settings_of):
    return load_backbone(settings_of("bert"), 2, seed=0).encoder


def rows(n=24):
    return [
        {"text": TEXTS[i % len(TEXTS)], "label": i % 2, "who": f"user-{i % 5}"} for i in range(n)
    ]


def write_table(path, source, records):
    import datasets

    if source in ("csv", "tsv"):
        table = datasets.Dataset.from_list(records)
        table.to_csv(str(path), sep="," if source == "csv" else "\t", index=False)
    elif source == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        datasets.Dataset.from_list(records).to_parquet(str(path))
    return path


def site(settings, encoder, path):
    return load_client_records(settings, encoder, {"data-path": str(path)}, seed=0)


def picture(value, size=(10, 12), mode="L"):
    return Image.new(mode, size, value)


def png(value, **options):
    stream = io.BytesIO()
    picture(value, **options).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("source", ["csv", "tsv", "jsonl", "parquet"])
def test_text_tables(source, roberta, tmp_path):
    path = write_table(tmp_path / f"data.{source}", source, rows())
    settings = DataSettings(source=source, num_labels=2)
    records = site(settings, roberta, path)
    assert len(records) == 24
    assert records.labels.tolist() == [i % 2 for i in range(24)]
    batch = records.batch([0, 1, 2])
    assert batch["labels"].dtype == torch.int64
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 6)
    unknown, begin, end = 3, 0, 2
    assert batch["input_ids"][1, :2].tolist() == [begin, end]  # the empty text
    assert batch["input_ids"][2, :3].tolist() == [begin, unknown, end]  # "NA" is a text
    assert batch["attention_mask"].sum(1).tolist() == [6, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_text_pairs_and_token_types(bert, tmp_path):
    records = [{**row, "text2": "bad plot"} for row in rows()]
    path = write_table(tmp_path / "data.csv", "csv", records)
    settings = DataSettings(source="csv", num_labels=2, text_pair_column="text2")
    batch = site(settings, bert, path).batch(np.array([0, 3]))
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}


def test_label_names_in_every_spelling(roberta, tmp_path):
    named = [{**row, "label": ["no", "yes"][row["label"]]} for row in rows()]
    path = write_table(tmp_path / "data.csv", "csv", named)
    listed = models.write_json(tmp_path / "names.json", ["no", "yes"])
    lines = tmp_path / "names.txt"
    lines.write_text("no\nyes\n")
    for names in ("no, yes", str(listed), str(lines)):
        settings = DataSettings(source="csv", label_names=names)
        assert num_labels(settings) == 2
        assert site(settings, roberta, path).labels.tolist() == [i % 2 for i in range(24)]
    swapped = DataSettings(source="csv", label_names="yes,no")
    assert site(swapped, roberta, path).labels.tolist() == [1 - i % 2 for i in range(24)]
    numbered = write_table(tmp_path / "numbered.csv", "csv", rows())
    settings = DataSettings(source="csv", label_names="no,yes")
    assert site(settings, roberta, numbered).labels.tolist() == [i % 2 for i in range(24)]


def test_names_of_the_file_are_matched_with_the_declared_names(roberta, tmp_path):
    import datasets

    feature = datasets.ClassLabel(names=["yes", "no"])
    table = datasets.Dataset.from_list(rows()).cast_column("label", feature)
    table.to_parquet(str(tmp_path / "data.parquet"))
    settings = DataSettings(source="parquet", label_names="no,yes")
    labels = site(settings, roberta, tmp_path / "data.parquet").labels
    assert labels.tolist() == [1 - i % 2 for i in range(24)]


@pytest.mark.parametrize(
    ("names", "number", "message"),
    [
        ("a,a", 0, "2 names, 1 of them different"),
        ("a", 0, "1 names"),
        ("a,b", 3, "2 names but data.num-labels is 3"),
        ("missing.json", 0, "cannot be read"),
    ],
)
def test_refused_label_names(names, number, message):
    with pytest.raises(DataError, match=message):
        num_labels(DataSettings(source="csv", label_names=names, num_labels=number))


def test_a_simulation_covers_the_file_and_reads_it_once(roberta, tmp_path, monkeypatch):
    import task.data.tables as tables

    path = write_table(tmp_path / "data.jsonl", "jsonl", rows(50))
    reads = []
    read_file = tables.read_file
    monkeypatch.setattr(tables, "read_file", lambda *a: reads.append(a) or read_file(*a))
    for partitioner, column in (("iid", ""), ("natural-id", "who")):
        settings = DataSettings(
            source="jsonl",
            path=str(path),
            num_labels=2,
            partitioner=partitioner,
            partition_column=column,
            min_records=2,
        )
        parts = [
            load_client_records(
                settings, roberta, {"partition-id": part, "num-partitions": 3}, seed=1
            )
            for part in range(3)
        ]
        assert sum(len(part) for part in parts) == 50
        for part in parts:
            batch = part.batch(range(len(part)))
            assert batch["labels"].tolist() == part.labels.tolist()
    assert len(reads) == 2
    simulation_cache.clear()
    assert len(simulation_cache) == 0


def test_a_site_is_never_kept_in_the_cache(roberta, tmp_path):
    path = write_table(tmp_path / "data.csv", "csv", rows())
    site(DataSettings(source="csv", num_labels=2), roberta, path)
    assert len(simulation_cache) == 0


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


@pytest.fixture
def folder(tmp_path):
    """Make an image folder with 10 pictures of two classes of three."""
    for name, value in (("cat", 30), ("dog", 200)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for index in range(10):
            picture(value + index).save(tmp_path / "pets" / name / f"{index}.png")
    (tmp_path / "pets" / "cat" / "notes.txt").write_text(SECRET)
    return tmp_path / "pets"


PETS = DataSettings(source="image-folder", label_names="dog,bird,cat")


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


def test_hub(monkeypatch, roberta):
    import datasets

    asked = []

    def load_dataset(name, subset, *, split, revision):
        asked.append((name, subset, split, revision))
        if split == "nope":
            raise ValueError(SECRET)
        return datasets.Dataset.from_list(rows())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    commit = "0" * 40
    settings = DataSettings(
        source="hub", name="o/d", revision=commit, num_labels=2, min_records=4, test_split="dev"
    )
    node = {"partition-id": 1, "num-partitions": 2}
    assert 4 <= len(load_client_records(settings, roberta, node, seed=1)) < 24
    assert len(load_test_records(settings, roberta)) == 24
    assert asked == [("o/d", None, "train", commit), ("o/d", None, "dev", commit)]
    bad = settings.model_copy(update={"test_split": "nope"})
    with pytest.raises(DataError, match="split 'nope': cannot be loaded") as caught:
        load_test_records(bad, roberta)
    assert SECRET not in str(caught.value) and caught.value.__suppress_context__


@pytest.mark.parametrize("source", ["csv", "tsv", "jsonl", "parquet"])
def test_bad_records_are_named_by_row_only(source, roberta, tmp_path):
    settings = DataSettings(source=source, label_names="no,yes")
    bad = [{**row, "label": "yes"} for row in rows()]
    bad[6]["label"] = SECRET
    path = write_table(tmp_path / "data", source, bad)
    with pytest.raises(DataError, match=r"column 'label', row 7.*\(no, yes\)") as caught:
        site(settings, roberta, path)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("value", ["-1", "2", "1.0", "", "one", SECRET])
def test_labels_outside_the_range(value, roberta, tmp_path):
    bad = [{**row, "label": str(row["label"])} for row in rows()]
    bad[6]["label"] = value
    path = write_table(tmp_path / "data.csv", "csv", bad)
    with pytest.raises(DataError, match="row 7: not a declared class; accepted: a whole number"):
        site(DataSettings(source="csv", num_labels=2), roberta, path)


def test_missing_and_foreign_texts(roberta, tmp_path):
    settings = DataSettings(source="jsonl", num_labels=2)
    bad = rows()
    bad[2]["text"] = None
    path = write_table(tmp_path / "data.jsonl", "jsonl", bad)
    with pytest.raises(DataError, match="column 'text', row 3: missing; accepted: text"):
        site(settings, roberta, path)
    path = write_table(tmp_path / "n.jsonl", "jsonl", [{**r, "text": 5} for r in rows()])
    with pytest.raises(DataError, match="row 1: a int"):
        site(settings, roberta, path)


def test_refused_files(roberta, tmp_path, capfd):
    settings = DataSettings(source="csv", num_labels=2)
    path = write_table(tmp_path / "data.csv", "csv", rows())
    asked = settings.model_copy(update={"text_column": "words"})
    with pytest.raises(DataError, match=r"no column 'words' .*here are text, label, who"):
        site(asked, roberta, path)
    with pytest.raises(DataError, match=r"data-path .*: no such file"):
        site(settings, roberta, tmp_path / "none.csv")
    few = write_table(tmp_path / "few.csv", "csv", rows(15))
    with pytest.raises(
        DataError, match=r"too few records; data\.min-records asks for 16"
    ) as caught:
        site(settings, roberta, few)
    assert "15" not in str(caught.value)
    for content in (b"", b"text,text\n", b"text,label\n", b"\xff\xfe\x00", b"a,b\n1,2,3\n"):
        path.write_bytes(content)
        with pytest.raises(DataError):
            site(settings, roberta, path)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "' + SECRET + "\n" * 3)
    with pytest.raises(DataError, match="cannot be read as jsonl") as caught:
        site(settings.model_copy(update={"source": "jsonl"}), roberta, broken)
    assert SECRET not in str(caught.value) and caught.value.__suppress_context__
    assert "it/s" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({}, "partition-id is None"),
        ({"partition-id": "0", "num-partitions": 2}, "partition-id is '0'"),
        ({"partition-id": 0}, "num-partitions is None"),
        ({"partition-id": 2, "num-partitions": 2}, "partition-id is 2 with num-partitions 2"),
        ({"partition-id": -1, "num-partitions": 2}, "partition-id is -1"),
        ({"partition-id": 0, "num-partitions": 2}, "data.path is not set"),
        ({"data-path": ""}, "not a path"),
        ({"data-path": 3}, "not a path"),
        ({"data-path": "x", "partition-id": 0}, "both data-path and partition-id"),
    ],
)
def test_refused_node_configs(node, message, roberta):
    with pytest.raises(DataError, match=message):
        load_client_records(DataSettings(source="csv", num_labels=2), roberta, node, seed=0)


def test_refused_test_data(roberta, tmp_path):
    settings = DataSettings(source="csv", num_labels=2)
    with pytest.raises(DataError, match=r"data\.test-path is not set"):
        load_test_records(settings, roberta)


def test_images_for_a_text_model_and_the_reverse(roberta, folder, tmp_path):
    with pytest.raises(DataError, match="holds images, but the model takes text"):
        site(PETS, roberta, folder)
    path = write_table(tmp_path / "data.csv", "csv", rows())
    with pytest.raises(DataError, match="no column 'image'"):
        site(DataSettings(source="csv", num_labels=2), GREY, path)


def test_empty_batches(roberta, folder, tmp_path):
    path = write_table(tmp_path / "data.csv", "csv", rows())
    text = site(DataSettings(source="csv", num_labels=2), roberta, path).batch([])
    assert text["input_ids"].shape[0] == text["labels"].shape[0] == 0
    assert site(PETS, GREY, folder).batch([])["pixel_values"].shape == (0, 1, 8, 8)
