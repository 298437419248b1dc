"""The folder of a run: whole files or none, also in a crash."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.run_files import RunFolder, default_runs_folder, write_atomically


def crash(*_args, **_kwargs):
    raise OSError("disk full")


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "result.json"
    write_atomically(path, "one")
    write_atomically(path, "zwei ä")
    assert path.read_text(encoding="utf-8") == "zwei ä"
    assert os.listdir(tmp_path) == ["result.json"]


@pytest.mark.parametrize("place", ["fsync", "replace"])
@pytest.mark.parametrize("existed", [True, False])
def test_a_crash_in_the_middle_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, place, existed
):
    path = tmp_path / "result.json"
    if existed:
        path.write_text("old")
    monkeypatch.setattr(*((os, "fsync") if place == "fsync" else (Path, "replace")), crash)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert os.listdir(tmp_path) == (["result.json"] if existed else [])
    assert not existed or path.read_text() == "old"


def test_text_that_cannot_be_encoded_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["result.json"]


def test_the_new_content_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    order = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(
        Path, "replace", lambda a, b: (order.append(a.read_text()), replace(a, b))[1]
    )
    write_atomically(path, "new")
    assert order == ["fsync", "new", "fsync"]  # the file, its name, the folder that holds the name


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "runs", method="la-lora", run_id=17)


def test_the_folder_is_new_and_its_name_ends_in_method_and_run_id(folder, tmp_path):
    assert folder.path.is_dir() and folder.path.parent == tmp_path / "runs"
    assert folder.path.name.endswith("-la-lora-17")
    again = folder.path
    with pytest.raises(FileExistsError):
        again.mkdir()
    assert not folder.result.exists() and not folder.adapter.exists()


def test_rows_come_back_as_they_were_written(folder):
    rows = [{"round": n, "accuracy": n / 3, "applied": bool(n)} for n in range(3)]
    for row in rows:
        folder.append_metrics(row)
    assert list(folder.read_metrics()) == rows
    assert folder.metrics.read_text().count("\n") == 3


@pytest.mark.parametrize("half", ["{", '{"round": 1', '{"round": 1, "accuracy": 0.5}', '{"a": "ä'])
def test_a_line_that_is_still_being_written_is_left_for_later(folder, half):
    folder.append_metrics({"round": 0})
    with folder.metrics.open("ab") as file:
        file.write(half.encode()[:-1] if "ä" in half else half.encode())
    if "ä" in half:  # cut inside a character
        with pytest.raises(UnicodeDecodeError):
            half.encode()[:-1].decode()
        folder.metrics.write_bytes(folder.metrics.read_bytes()[:-1])
    assert list(folder.read_metrics()) == [{"round": 0}]


def test_no_metrics_yet(folder):
    assert list(folder.read_metrics()) == []


@given(
    values=st.dictionaries(
        st.text(max_size=5), st.one_of(st.floats(), st.integers(), st.text(), st.none()), max_size=4
    )
)
def test_files_are_strict_json_whatever_the_values_are(values, tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    folder.write_result(values)
    folder.append_metrics(values)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    for text in (folder.result.read_text(), folder.metrics.read_text()):
        plain = json.loads(text, parse_constant=refuse)
        for key, value in values.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            assert plain[key] == (value if finite else None)
    assert list(folder.read_metrics()) == [folder.read_result()]


def test_settings_are_kept(folder):
    folder.write_settings({"strategy": {"method": "la-lora"}, "seed": 1})
    assert json.loads(folder.settings.read_text()) == {
        "seed": 1,
        "strategy": {"method": "la-lora"},
    }


def test_a_run_is_found_by_its_id_and_by_no_part_of_it(tmp_path):
    made = {n: RunFolder.create(tmp_path, method="la-lora", run_id=n) for n in (7, 17, 170)}
    for run_id, folder in made.items():
        found = RunFolder.find(tmp_path, run_id)
        assert found is not None and found.path == folder.path
    assert RunFolder.find(tmp_path, 70) is None
    assert RunFolder.find(tmp_path / "missing", 7) is None


def test_the_latest_of_two_folders_with_one_id_is_found(tmp_path):
    (tmp_path / "20250101-000000-la-lora-7").mkdir()
    (tmp_path / "20260101-000000-dp-lora-7").mkdir()
    found = RunFolder.find(tmp_path, 7)
    assert found is not None and found.path.name.startswith("2026")


def test_runs_go_where_the_environment_says_else_home(monkeypatch, tmp_path):
    monkeypatch.setenv("FLOWER_DP_LORA_RUNS", str(tmp_path / "here"))
    assert default_runs_folder() == tmp_path / "here"
    monkeypatch.delenv("FLOWER_DP_LORA_RUNS")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_runs_folder() == tmp_path / "flower-dp-lora" / "runs"
