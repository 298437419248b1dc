"""What a client tells its own operator about its time, and nobody else."""

from __future__ import annotations

import logging

import pytest

from client_app.round_handler import handle_train
from client_app.trace import VARIABLE, MessageTrace, read_trace, traced_message
from task.backbones import backbone_loads
from tests.client_app.conftest import forget_process


def test_nothing_is_written_unless_asked(site, tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert handle_train(site.message(), site.context(0)).has_content()
    assert list(tmp_path.iterdir()) == []


def test_each_message_leaves_a_line(site, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "trace"))
    before = backbone_loads()
    for partition in (0, 1, 2):
        assert handle_train(site.message(server_round=3), site.context(partition)).has_content()
    lines = read_trace(tmp_path / "trace")
    assert [(line["node"], line["round"], line["steps"]) for line in lines] == [
        (0, 3, 2),
        (1, 3, 2),
        (2, 3, 2),
    ]
    for line in lines:
        assert 0 < line["steps_seconds"] <= line["message_seconds"]
        assert line["message_seconds"] <= line["ended"] - line["started"] + 0.1
        # Three virtual clients, one backbone in this process.
        assert line["backbone_loads"] == before + 1


def test_the_lines_hold_no_count_of_records(site, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    handle_train(site.message(), site.context(0))
    (line,) = read_trace(tmp_path)
    known = {"pid", "started", "ended", "round", "node", "steps", "threads", "backbone_loads"}
    assert {key for key in line if not key.endswith("_seconds")} == known


def test_the_reply_is_the_same_with_a_trace(site, tmp_path, monkeypatch):
    replies = []
    for folder in ("", str(tmp_path)):
        monkeypatch.setenv(VARIABLE, folder)
        forget_process()
        replies.append(handle_train(site.message(), site.context(0)))
    assert sorted(replies[0].content) == sorted(replies[1].content)
    assert dict(replies[0].content["privacy"]) == dict(replies[1].content["privacy"])


def test_a_trace_that_cannot_be_written_costs_no_round(site, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert handle_train(site.message(), site.context(0)).has_content()
    assert "DP_LORA_TRACE: the trace cannot be written" in caplog.text


def test_spans_of_one_name_add_up():
    trace = MessageTrace()
    for _ in range(3):
        with trace.span("steps"):
            sum(range(1000))
    first = trace.values["steps_seconds"]
    with pytest.raises(RuntimeError), trace.span("steps"):
        raise RuntimeError
    assert trace.values["steps_seconds"] > first > 0
    assert trace.values["steps_cpu_seconds"] > 0


def test_others_cannot_read_it_and_a_value_that_cannot_be_written_costs_no_round(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "trace"))
    with traced_message() as trace:
        trace.values["round"] = 1
    (file,) = (tmp_path / "trace").iterdir()
    assert (tmp_path / "trace").stat().st_mode & 0o077 == 0
    assert file.stat().st_mode & 0o077 == 0
    with caplog.at_level(logging.WARNING), traced_message() as trace:
        trace.values["round"] = object()
    assert "cannot be written" in caplog.text
    assert len(read_trace(tmp_path / "trace")) == 1
