"""The wire benchmark at full size: its promises hold, and a broken one shows."""

from __future__ import annotations

import json

import pytest

from benchmarks import wire

HALVES = ("as-lora", "ro-lora", "ffa-lora")


def run(capsys, *arguments: str) -> tuple[int, dict]:
    status = wire.main([*arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_the_projects_promises_hold_for_roberta_large(capsys):
    arguments = ("--models", "roberta-large", "--methods", *HALVES)
    status, result = run(capsys, *arguments, "--dtypes", "float32", "bfloat16")
    assert status == 0
    assert set(result) == {"machine", "rows", "bars"}
    for way in ("up", "down"):
        for method in HALVES:
            assert result["bars"][f"roberta-large, {method}, float32, {way}: of dp-lora"]["ok"]
    for method in HALVES:
        assert result["bars"][f"roberta-large, {method}, bfloat16, up: of dp-lora's float32"]["ok"]
    assert all(bar.keys() == {"value", "limit", "ok"} for bar in result["bars"].values())
    rows = {(row["method"], row["dtype"]): row for row in result["rows"]}
    # Whole messages are larger than their tensors, and by little.
    whole, tensors = (rows["dp-lora", "float32"][key] for key in ("up", "payload_up"))
    assert tensors < whole < 1.02 * tensors
    mixed = rows["as-lora", "float32"]
    assert mixed["least_layers_a"] > 0
    assert mixed["most_layers_a"] < 48
    assert not any(
        isinstance(value, dict | list) for row in result["rows"] for value in row.values()
    )


def test_swin_b_sends_the_share_of_values_that_each_round_trains(capsys):
    status, result = run(
        capsys, "--models", "swin-b", "--methods", "ro-lora", "--dtypes", "float32"
    )
    assert status == 0
    row = next(row for row in result["rows"] if row["method"] == "ro-lora")
    # B of qkv is three times its A: a third of the values in rounds of A, two thirds in those of B.
    assert row["up_least_share"] == pytest.approx(1 / 3)
    assert row["up_most_share"] == pytest.approx(2 / 3)
    assert row["share_up"] == row["share_down"] == pytest.approx(1 / 2)


def test_a_broken_promise_fails_the_command(capsys, monkeypatch):
    monkeypatch.setattr(wire, "OVER_SHARE", 0.9)
    monkeypatch.setattr(wire, "measure_model", lambda model, methods, dtypes: ROWS)
    assert wire.main([]) == 1
    assert "| roberta-large | fed-svd | float32 | 50 | 0.5000 |" in (
        text := capsys.readouterr().out
    )
    assert "roberta-large, fed-svd, float32, up: over its share: 1.0000 (limit 0.9): FAILS" in text


def _row(method: str, **others: float) -> dict:
    row: dict = {"model": "roberta-large", "method": method, "dtype": "float32"}
    row |= {"least_layers_a": 0, "most_layers_a": 48}
    for way in ("up", "down"):
        row |= {way: 100.0, f"payload_{way}": 99.0, f"share_{way}": 1.0, f"{way}_ratio": 1.0}
        row |= {f"payload_{way}_ratio": 1.0, f"{way}_over_share": 1.0}
        row |= {f"{way}_least_share": 1.0, f"{way}_most_share": 1.0}
    return row | others


ROWS = [_row("dp-lora"), _row("fed-svd", up=50.0, up_ratio=0.5)]
