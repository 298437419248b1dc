"""The ledger's benchmark measures a real ledger and says whether its bar holds."""

from __future__ import annotations

import json

import pytest

from benchmarks import ledger


def test_the_quick_command_measures_every_call_and_judges_the_message(capsys, monkeypatch):
    monkeypatch.setattr(ledger, "MESSAGE_MS", 1e6)  # a loaded machine is not what is tested
    assert ledger.main(["--quick", "--json", "--repeats", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    messages = [row for row in result["rows"] if row["kind"] == "message"]
    assert [row["entries"] for row in messages] == [10, 100]
    for row in messages:
        parts = [row[name] for name in ("admit", "find", "charge", "keep")]
        assert min(parts) > 0
        assert row["all"] == pytest.approx(sum(parts))
    assert result["rows"][-1]["records"] == 1000


def test_a_slow_ledger_fails_the_bar(capsys, monkeypatch):
    monkeypatch.setattr(ledger, "MESSAGE_MS", 1e-6)
    assert ledger.main(["--quick", "--repeats", "1"]) == 1
    assert "FAILS" in capsys.readouterr().out


def test_ledgers_have_as_many_entries_as_is_said(tmp_path):
    ledger.message_rows(tmp_path, (10, 40), repeats=1)
    found = ledger.Ledger(tmp_path / "ledger", tmp_path / "head" / "head.json").book()
    (plan,) = found.plans.values()
    # Admission and plan stand beside the charges; one message was played after the last filling.
    assert len(plan.rounds) == 40 - 2 + 1
