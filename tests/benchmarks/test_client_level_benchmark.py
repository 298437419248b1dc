"""The benchmark of client-level privacy: its rows are the plans' numbers, a broken bar shows."""

from __future__ import annotations

import json

import pytest

from benchmarks import client_level


def test_noise_rows_say_what_the_modes_differ_in():
    rows = {row["clients"]: row for row in client_level.client_rows()}
    for row in rows.values():
        assert row["secret"] <= row["public"] < row["shares"] < row["dropout"]
    assert rows[100]["public"] == pytest.approx(10 * rows[10]["public"] / 50, rel=1e-3)
    bars = client_level.make_bars(list(rows.values()))
    assert len(bars) == 4 and all(promise["ok"] for promise in bars.values())
    rows[10]["shares"] *= 1.2
    broken = client_level.make_bars(list(rows.values()))
    assert sum(not promise["ok"] for promise in broken.values()) == 1


def test_the_table_and_json_hold_all_rows(capsys, monkeypatch):
    rows = client_level.record_rows()
    monkeypatch.setattr(client_level, "client_rows", list)
    monkeypatch.setattr(client_level, "record_rows", lambda: rows)
    status = client_level.main(["--repeats", "1", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert [row["kind"] for row in result["rows"]] == ["records"] * 3 + ["time"] * 6
    assert status == (0 if all(promise["ok"] for promise in result["bars"].values()) else 1)
    for row in rows:  # shares: about the square root of the clients better
        assert row["own"] / row["shares"] == pytest.approx(row["clients"] ** 0.5, rel=0.1)
    text = client_level.table(result["rows"], result["bars"])
    assert "own noise at each" in text and f"{rows[0]['own']:.5f}" in text
