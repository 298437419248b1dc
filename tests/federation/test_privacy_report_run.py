"""The privacy report that a whole run leaves behind."""

from __future__ import annotations

import re

import pytest

from client_app.round_handler import handle_train
from federation.run_files import RunFolder
from server_app import federation_run
from strategies import ROUND_PLAN_KEY


class PowerCut(BaseException):
    """Nothing may catch it."""


def numbers_in(value) -> set[float]:
    if isinstance(value, dict):
        return set().union(*map(numbers_in, value.values()))
    if isinstance(value, list):
        return set().union(*map(numbers_in, value))
    return {float(value)} if isinstance(value, int | float) else set()


def test_a_private_run_leaves_a_report_of_what_it_spent(federate):
    """180 records on 3 clients: 60 each, 18 expected in a batch; neither is in the report."""
    folder, grid = federate(strategy__weighting="uniform")
    report, result = folder.read_privacy_report(), folder.read_result()
    assert report["private"] is True
    assert report["overall"]["epsilon"] == result["epsilon"] <= report["target_epsilon"] == 8.0
    assert report["overall"]["delta"] == result["delta"]
    said = {m.metadata.src_node_id: m.content["privacy"] for m in grid.received}
    assert [one["node_id"] for one in report["clients"]] == sorted(said) == [1, 2, 3]
    for one in report["clients"]:
        statement = said[one["node_id"]]
        assert one["sample_rate"] == statement["sample-rate"] == 0.3
        assert one["noise_multiplier"] == statement["noise-multiplier"]
        assert one["steps"] == statement["steps"] == 4  # 2 rounds x 2 steps
        assert one["epsilon"] == result["epsilon"]
    text = folder.privacy_report_text.read_text(encoding="utf-8")
    assert text.splitlines()[0] == report["statement"]
    assert ", 1e-05)-differentially private" in report["statement"]
    assert numbers_in(report).isdisjoint({60.0, 180.0, 18.0, 1 / 60, 0.3 * 180})
    assert not re.findall(r"(?<![\d.])(?:18|60|180)(?![\d.])", text)


def test_a_run_without_privacy_says_so(federate):
    folder, _ = federate(privacy__mode="none")
    report = folder.read_privacy_report()
    assert report["statement"].startswith("NOT PRIVATE: privacy.mode")
    assert report["overall"]["epsilon"] is None
    text = folder.privacy_report_text.read_text(encoding="utf-8")
    assert text.startswith("NOT PRIVATE")


def test_a_resumed_run_reports_the_earlier_ones_steps_too(federate, runs, tmp_path):
    def killed_in_the_second_round(message, context):
        if message.content[ROUND_PLAN_KEY]["server-round"] == 2:
            raise PowerCut
        return handle_train(message, context)

    with pytest.raises(PowerCut):
        federate([handle_train, handle_train, killed_in_the_second_round])
    (cut,) = map(RunFolder, runs.iterdir())
    assert not cut.privacy_report.exists()
    folder, _ = federate(resume=str(cut.path), output_dir=str(tmp_path / "resumed"))
    report = folder.read_privacy_report()
    assert report["resumed"] is True
    assert report["overall"]["epsilon"] == folder.read_result()["epsilon"] <= 8.0
    assert {one["steps"] for one in report["clients"]} == {4}  # lost replies were sent again
    text = folder.privacy_report_text.read_text(encoding="utf-8")
    assert "went on from an earlier one" in text and "above the run's target" not in text


def test_a_run_is_complete_only_with_its_report(federate, runs, monkeypatch):
    """Mistake: a result without the statement of what it cost."""

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(federation_run.RunFolder, "write_privacy_report", crash)
    with pytest.raises(OSError, match="disk full"):
        federate(privacy__mode="none")
    (path,) = runs.iterdir()
    assert not RunFolder(path).result.exists()
