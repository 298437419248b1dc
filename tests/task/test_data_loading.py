"""Loading records from tables and the hub, in simulation and at a site."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from task.data import load_client_records, load_test_records, num_labels, simulation_cache
from task.errors import DataError
from task.settings import DataSettings
from tests import models
from tests.task.records import GREY, PETS, SECRET, rows, site, write_table


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


def test_empty_batches(roberta, folder, tmp_path):
    path = write_table(tmp_path / "data.csv", "csv", rows())
    text = site(DataSettings(source="csv", num_labels=2), roberta, path).batch([])
    assert text["input_ids"].shape[0] == text["labels"].shape[0] == 0
    assert site(PETS, GREY, folder).batch([])["pixel_values"].shape == (0, 1, 8, 8)
