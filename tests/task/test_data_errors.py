"""What a client says about bad data: the row and what is accepted, never a record's content."""

from __future__ import annotations

import pytest

from task.data import load_client_records, load_test_records
from task.errors import DataError
from task.settings import DataSettings
from tests.task.records import GREY, PETS, SECRET, rows, site, write_table


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
