"""The aggregation benchmark at small sizes, and that memory does not grow at full size."""

from __future__ import annotations

import json
import tracemalloc

from benchmarks import aggregation

SMALL = ["--layers", "1", "--clients", "3", "--memory-clients", "3", "6", "--json"]
SECONDS = ["ms", "ms_least", "ms_most"]


def test_all_arms_and_bars_are_there(capsys, monkeypatch):
    # Two layers are so small that what a round holds besides replies shows.
    monkeypatch.setattr(aggregation, "MOST_GROWTH", 2.0)
    monkeypatch.setattr(aggregation, "child", _without_a_process)
    assert aggregation.main(SMALL) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"machine", "rows", "bars"}
    assert all(bar.keys() == {"value", "limit", "ok"} for bar in result["bars"].values())
    timed = {row["method"] for row in result["rows"] if "peak_rss_mb" in row}
    assert timed == set(aggregation.WHAT)
    traced = {(r["method"], r["clients"]) for r in result["rows"] if "peak_traced_mb" in r}
    assert traced == {(method, n) for method in aggregation.MEANS for n in (3, 6)}
    assert all(row["layers_measured"] == 2 for row in result["rows"])
    assert all(row[key] > 0 for row in result["rows"] for key in SECONDS)
    products = result["bars"]["products by both SVDs, relative difference"]
    assert products["value"] <= products["limit"] == 1e-6
    assert result["bars"]["dense SVD over QR-core SVD, step alone"]["value"] > 10


def test_memory_does_not_grow_with_the_clients_at_full_size():
    few, many = (aggregation.child("as-lora", n, 24, traced=True) for n in (10, 40))
    assert many["peak_traced_mb"] / few["peak_traced_mb"] <= aggregation.MOST_GROWTH


def test_a_broken_promise_fails_the_command(capsys, monkeypatch):
    monkeypatch.setattr(aggregation, "child", _fake_child)
    assert aggregation.main(["--clients", "6", "1000"]) == 0
    text = capsys.readouterr().out
    assert "| fed-svd, dense / ro-lora | 10.00 | 10.00 |" in text
    assert "ro-lora, peak RSS: 1000 clients over 10: 1 (limit 1.1): holds" in text
    monkeypatch.setattr(aggregation, "MOST_GROWTH", 0.9)
    assert aggregation.main([]) == 1
    assert "FAILS" in capsys.readouterr().out


def _without_a_process(method: str, clients: int, layers: int, *, traced: bool = False) -> dict:
    try:
        return json.loads(json.dumps(aggregation.run_arm(method, clients, layers, traced)))
    finally:
        tracemalloc.stop()


def _fake_child(method: str, clients: int, layers: int, *, traced: bool = False) -> dict:
    dense = method == aggregation.DENSE
    row = {"method": method, "clients": clients, "layers_measured": 48}
    row |= {"ms": 100.0 if dense else 10.0, "peak_traced_mb" if traced else "peak_rss_mb": 30.0}
    steps = {"svd_step_ms": 90.0, "qr_core_step_ms": 3.0, "product_error": 0.0}
    return row | (steps if dense else {})
