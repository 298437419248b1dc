"""Partitions: complete, disjoint, seeded, quiet."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from task.data.partitions import split_rows
from task.errors import DataError
from task.settings import DataSettings

SLOW = hypothesis_settings(max_examples=30, deadline=None, derandomize=True)


def with_partitioner(name: str, **changes: object) -> DataSettings:
    values = {"partitioner": name, "num_labels": 4, "source": "csv", "min_records": 1}
    if name == "natural-id":
        values["partition_column"] = "who"
    return DataSettings(**{**values, **changes})


@SLOW
@given(
    name=st.sampled_from(["iid", "dirichlet", "shards", "natural-id"]),
    count=st.integers(1, 7),
    labels=st.lists(st.integers(0, 3), min_size=30, max_size=120),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_every_record_is_with_exactly_one_client(name, count, labels, seed, data):
    owners = None
    if name == "natural-id":
        ids = st.integers(0, 20)
        owners = data.draw(st.lists(ids, min_size=len(labels), max_size=len(labels)))
        owners[:count] = range(count)
    settings = with_partitioner(name)
    array = np.asarray(labels)
    parts = split_rows(settings, array, owners, count, seed=seed)
    assert len(parts) == count
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    again = split_rows(settings, array, owners, count, seed=seed)
    assert all(np.array_equal(one, two) for one, two in zip(parts, again, strict=True))
    if owners is not None:
        holders = [set(np.asarray(owners)[part].tolist()) for part in parts]
        assert sum(len(h) for h in holders) == len(set(owners))


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards"])
def test_the_seed_decides(name):
    labels = np.arange(100) % 4
    one, two = (split_rows(with_partitioner(name), labels, None, 3, seed=s) for s in (1, 2))
    assert any(not np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_iid_mixes_a_sorted_file():
    parts = split_rows(with_partitioner("iid"), np.repeat(np.arange(4), 50), None, 4, seed=1)
    assert all(len(part) == 50 for part in parts)
    assert all(len(set((part // 50).tolist())) == 4 for part in parts)


def test_small_alpha_is_skewed_and_large_alpha_is_even():
    labels = np.arange(400) % 4

    def largest_share(alpha):
        parts = split_rows(with_partitioner("dirichlet", alpha=alpha), labels, None, 4, seed=1)
        return np.mean([np.bincount(labels[p], minlength=4).max() / len(p) for p in parts])

    assert largest_share(0.1) > 0.6 > 0.3 > largest_share(1000.0)


def test_shards_limit_the_classes_of_a_client():
    labels = np.arange(400) % 4
    settings = with_partitioner("shards", shards_per_client=1)
    parts = split_rows(settings, labels, None, 4, seed=1)
    assert all(len(set(labels[part].tolist())) == 1 for part in parts)


def test_a_split_that_cannot_give_everyone_enough_still_stands():
    labels = np.arange(40) % 4
    settings = with_partitioner("dirichlet", min_records=39)
    parts = split_rows(settings, labels, None, 4, seed=1)
    assert sum(len(part) for part in parts) == 40


def test_equal_in_another_process():
    code = (
        "import numpy as np, hashlib\n"
        "from task.data.partitions import split_rows\n"
        "from task.settings import DataSettings\n"
        "parts = split_rows(DataSettings(), np.arange(300) % 10, None, 5, seed=7)\n"
        "print(hashlib.sha256(str([p.tolist() for p in parts]).encode()).hexdigest())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    parts = split_rows(DataSettings(), np.arange(300) % 10, None, 5, seed=7)
    ours = hashlib.sha256(str([p.tolist() for p in parts]).encode()).hexdigest()
    assert done.stdout.strip() == ours
    assert done.stderr == ""


def test_partitioning_is_quiet(capfd):
    owners = ["x", "y", "z"] * 20
    split_rows(with_partitioner("natural-id"), np.zeros(60, np.int64), owners, 2, seed=1)
    split_rows(with_partitioner("dirichlet", min_records=59), np.arange(60) % 4, None, 2, seed=1)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_refusals():
    labels = np.arange(10) % 4
    with pytest.raises(DataError, match="fewer records than the 11 clients"):
        split_rows(with_partitioner("iid"), labels, None, 11, seed=1)
    with pytest.raises(DataError, match="12 shards"):
        split_rows(with_partitioner("shards", shards_per_client=6), labels, None, 2, seed=1)
    natural = with_partitioner("natural-id")
    with pytest.raises(DataError, match="'who': fewer different ids than the 3 clients"):
        split_rows(natural, labels, ["x", "y"] * 5, 3, seed=1)
    with pytest.raises(DataError, match="row 2: missing"):
        split_rows(natural, labels, ["x", None] * 5, 2, seed=1)
    with pytest.raises(DataError, match="no such column"):
        split_rows(natural, labels, None, 2, seed=1)
