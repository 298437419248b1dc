"""What round_efficiency makes of a run's lines; the runs themselves are slow."""

from __future__ import annotations

import json

import pytest

from benchmarks import round_efficiency
from benchmarks.round_efficiency import judge, main, round_rows, share, steady, table

ROUNDS = [
    {"round": 0, "round_seconds": 9.0},
    {"round": 1, "round_seconds": 20.0},
    {"round": 2, "round_seconds": 10.0},
    {"round": 3, "round_seconds": 30.0},
]


def message(server_round: int, pid: int, steps: float, loads: int = 1) -> dict:
    return {
        "round": server_round,
        "pid": pid,
        "node": pid,
        "steps": 4,
        "threads": 1,
        "backbone_loads": loads,
        "steps_seconds": steps,
        "steps_cpu_seconds": steps / 2,
        "message_seconds": steps + 1,
        "ended": float(server_round),
    }


def trace(second: float, third: float, loads: int = 1) -> list[dict]:
    lines = [message(1, pid, 1.0) for pid in (7, 8)]
    lines += [message(2, pid, second / 2) for pid in (7, 8)]
    return lines + [message(3, pid, third / 2, loads) for pid in (7, 8)]


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch):
    monkeypatch.setattr(round_efficiency.os, "cpu_count", lambda: 2)


def rows_of(app: str = "ours", name: str = "vit-tiny", **trace_arguments) -> list[dict]:
    lines = trace(**{"second": 19.0, "third": 54.0, **trace_arguments})
    return round_rows(app, name, ROUNDS, lines)


def test_a_round_is_its_messages_over_its_core_seconds():
    rows = rows_of()
    assert [row["round"] for row in rows] == [1, 2, 3]
    second = rows[1]
    assert (second["core_seconds"], second["steps_seconds"]) == (20.0, 19.0)
    assert (second["steps_cpu_seconds"], second["steps"], second["workers"]) == (9.5, 8, 2)
    assert share([second]) == pytest.approx(0.95)


def test_the_first_round_does_not_count_and_long_rounds_count_more():
    rows = steady(rows_of(), "ours", "vit-tiny")
    assert [row["round"] for row in rows] == [2, 3]
    assert share(rows) == pytest.approx((19 + 54) / (20 + 60))


def test_bars_hold_and_fail():
    assert all(promise["ok"] for promise in judge(rows_of()).values())
    slow = judge(rows_of(third=50.0))
    assert not slow["vit-tiny, share of core-seconds in private steps"]["ok"]
    twice = judge(rows_of(loads=2))
    assert not twice["backbone loads per process and run, most"]["ok"]
    never = judge(rows_of(loads=0))
    assert not never["backbone loads per process and run, fewest"]["ok"]
    # The naive app may load as often as it likes.
    naive = [*rows_of(), *rows_of(app="naive", third=10.0, loads=9)]
    assert all(promise["ok"] for promise in judge(naive).values())


def test_the_table_has_a_line_per_run():
    rows = [*rows_of(), *rows_of(app="naive")]
    lines = [line for line in table(rows, judge(rows)).splitlines() if line.startswith("| vit")]
    assert [line.split("|")[2].strip() for line in lines] == ["ours", "naive"]
    assert "| 0.912 | 0.900, 0.950 |" in lines[0]


@pytest.mark.parametrize(("other", "status"), [("same", 0), ("else", 1)])
def test_apps_that_compute_different_things_end_the_benchmark(monkeypatch, capsys, other, status):
    digests = {"ours": "same", "naive": other}
    monkeypatch.setattr(
        round_efficiency, "measure", lambda app, name, *_: (rows_of(app, name), digests[app])
    )
    monkeypatch.setattr(round_efficiency, "write_vit_tiny", lambda *_: None)
    assert main(["--json", "--federations", "vit-tiny"]) == status
    printed = capsys.readouterr()
    if status:
        assert "vit-tiny: the apps ended with different adapters" in printed.err
    else:
        assert len(json.loads(printed.out)["rows"]) == 6


def test_the_naive_app_is_ours_but_for_what_it_forgets(tmp_path):
    round_efficiency.write_naive_app(tmp_path)
    app = (tmp_path / "client_app" / "app.py").read_text()
    compile(app, "app.py", "exec")
    assert "forget()" in app
    ours = (round_efficiency.ROOT / "client_app" / "round_handler.py").read_text()
    assert (tmp_path / "client_app" / "round_handler.py").read_text() == ours
