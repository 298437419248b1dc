"""A stamp changes when a site's records may have changed, and by nothing that a server says."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from task.data import data_stamp
from task.errors import DataError
from task.settings import DataSettings


def stamp(where: Path, **settings: object) -> str:
    data = DataSettings(**{"source": "csv", "num_labels": 2, **settings})
    return data_stamp(data, {"data-path": str(where)}, seed=0)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.csv"
    path.write_text("text,label\na,0\n")
    return path


def test_the_same_file_has_the_same_stamp(table):
    assert stamp(table) == stamp(table)


def test_another_content_of_the_same_length_and_time_is_another_stamp(table, tmp_path):
    """As ``cp -p`` and ``rsync -t`` leave it."""
    before, times = stamp(table), table.stat()
    other = tmp_path / "other"
    other.write_text("text,label\nb,0\n")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    shutil.copy2(other, table)
    assert table.stat().st_mtime_ns == times.st_mtime_ns
    assert stamp(table) != before


def test_any_file_of_a_folder_counts(tmp_path):
    folder = tmp_path / "images"
    (folder / "cat").mkdir(parents=True)
    (folder / "cat" / "1.png").write_bytes(b"x")
    settings = {"source": "image-folder", "label_names": "cat,dog", "num_labels": 0}
    stamps = [stamp(folder, **settings)]
    (folder / "cat" / "2.png").write_bytes(b"y")
    stamps.append(stamp(folder, **settings))
    (folder / "cat" / "2.png").rename(folder / "cat" / "3.png")
    stamps.append(stamp(folder, **settings))
    assert len(set(stamps)) == 3


def test_what_a_record_is_counts(table):
    stamps = [
        stamp(table),
        stamp(table, text_column="other"),
        stamp(table, text_pair_column="second"),
        stamp(table, image_column="picture"),
        stamp(table, source="tsv"),
    ]
    assert len(set(stamps)) == len(stamps)


def test_what_leaves_the_records_alone_does_not(table):
    one = stamp(table)
    for settings in ({"alpha": 0.7}, {"min_records": 3}, {"test_path": "/x.csv"},
                     {"num_labels": 3}, {"partitioner": "iid"}, {"path": "/y.csv"}):  # fmt: skip
        assert stamp(table, **settings) == one


def test_files_that_are_not_there_are_refused_without_their_name(tmp_path):
    with pytest.raises(DataError, match="the data's files cannot be looked at"):
        stamp(tmp_path / "patient-4711.csv")
