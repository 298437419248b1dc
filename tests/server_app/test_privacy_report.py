"""What a run's privacy report says, from what clients stated."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from federation.settings import Settings
from privacy import pld_epsilon
from server_app.privacy_report import NOT_COVERED, as_text, make_report
from server_app.privacy_tracker import PrivacyTracker
from tests.fake_grid import stamp

DOCS = Path(__file__).resolve().parents[2] / "docs"
DELTA = 1e-5


def settings(**changes) -> Settings:
    return Settings.from_run_config(
        {"privacy.sample-rate": 0.3, **{k.replace("__", "."): v for k, v in changes.items()}}
    )


def tracker_of(*stated: dict | None) -> PrivacyTracker:
    """Tell the tracker one statement for each of the nodes 11, 12, ..."""
    tracker = PrivacyTracker(DELTA, 1000)
    for node, numbers in enumerate(stated, 11):
        observe(tracker, node, numbers)
    return tracker


def observe(tracker: PrivacyTracker, node: int, numbers: dict | None) -> None:
    question = stamp(Message(RecordDict(), message_type="train", dst_node_id=node), 0, node)
    records = {} if numbers is None else {"privacy": ConfigRecord(numbers)}
    tracker.observe(node, Message(RecordDict(records), reply_to=question))


def stated(noise: float = 2.0, steps: int = 4, **more) -> dict:
    return {
        "sample-rate": 0.3,
        "noise-multiplier": noise,
        "target-delta": DELTA,
        "steps": steps,
        "secure-noise": True,
        **more,
    }


def epsilon(noise: float = 2.0, steps: int = 4) -> float:
    return pld_epsilon(sample_rate=0.3, noise_multiplier=noise, steps=steps, delta=DELTA)


def test_each_client_and_the_largest_overall():
    report = make_report(settings(), tracker_of(stated(2.0), stated(1.5, 6), stated(4.0)))
    assert [one["node_id"] for one in report["clients"]] == [11, 12, 13]
    expected = [(2.0, 4), (1.5, 6), (4.0, 4)]
    for one, (noise, steps) in zip(report["clients"], expected, strict=True):
        assert (one["sample_rate"], one["noise_multiplier"], one["steps"]) == (0.3, noise, steps)
        assert (one["epsilon"], one["delta"]) == (epsilon(noise, steps), DELTA)
    overall = report["overall"]
    assert overall["epsilon"] == epsilon(1.5, 6) == max(epsilon(*one) for one in expected)
    assert (overall["largest_of"], overall["clients"]) == (12, 3)
    assert (overall["noise_multiplier"], overall["steps"]) == (1.5, 6)
    assert report["private"] is True


def test_the_terms_of_the_guarantee():
    report = make_report(settings(), tracker_of(stated()))
    assert report["unit"] == "one record of one client"
    assert report["adjacency"].startswith("zero-out")
    assert "the server included" in report["trust_model"]
    assert "Gaussian" in report["mechanism"] and report["sampling"].startswith("Poisson")
    assert report["accountant"]["of_record"].startswith("PLD")
    assert "PRV" in report["accountant"]["cross_check"]


def test_clip_norms_are_those_that_steps_were_clipped_to():
    own = settings(**{"privacy__max-grad-norm": 2.0, "privacy__max-grad-norm-b": 0.5})
    (client,) = make_report(own, tracker_of(stated()))["clients"]
    assert client["max_grad_norm"] == client["max_grad_norm_a"] == 2.0
    assert client["max_grad_norm_b"] == 0.5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"privacy__mode": "none"}, "privacy.mode is 'none'"),
        ({"privacy__insecure-test-seed": 3}, "privacy.insecure-test-seed is set"),
    ],
)
def test_a_run_that_is_not_private_says_so_first(changes, reason):
    report = make_report(settings(**changes), tracker_of(stated(**{"secure-noise": False})))
    first = as_text(report).splitlines()[0]
    assert first == report["statement"] == next(iter(report.values()))
    assert first.startswith(f"NOT PRIVATE: {reason}")
    assert report["private"] is False
    assert report["overall"]["epsilon"] is None
    assert [one["epsilon"] for one in report["clients"]] == [None]
    json.dumps(report, allow_nan=False)


def test_settings_that_void_a_guarantee_beat_what_clients_state():
    """Mistake: a client's word taken for it, though the noise can be drawn again."""
    report = make_report(settings(**{"privacy__insecure-test-seed": 3}), tracker_of(stated()))
    assert report["private"] is False
    assert [one["epsilon"] for one in report["clients"]] == [None]


def test_without_privacy_nothing_is_clipped():
    report = make_report(settings(privacy__mode="none"), tracker_of(None))
    assert report["overall"]["max_grad_norm"] is None
    assert report["target_epsilon"] is None
    assert report["mechanism"].startswith("none")
    assert "Not covered" not in as_text(report)


def test_one_client_without_a_guarantee_leaves_none_overall():
    report = make_report(settings(), tracker_of(stated(), None, stated(**{"target-delta": 0.5})))
    assert report["statement"] == "NOT PRIVATE: no guarantee can be stated for client 12, 13."
    assert report["overall"]["epsilon"] is None
    assert [one["epsilon"] for one in report["clients"]] == [None] * 3
    text = as_text(report)
    assert text.splitlines()[0] == report["statement"]
    json.dumps(report, allow_nan=False)


def test_numbers_far_beyond_any_plan_are_no_guarantee():
    tracker = PrivacyTracker(DELTA, 10**6, target_epsilon=1.0)
    observe(tracker, 11, stated(0.16, 10**6))
    report = make_report(settings(), tracker)
    assert report["private"] is False
    json.dumps(report, allow_nan=False)


def test_no_client_is_no_guarantee():
    report = make_report(settings(), PrivacyTracker(DELTA, 1000))
    assert report["statement"] == "NOT PRIVATE: no client has stated anything."
    assert report["clients"] == [] and report["overall"]["epsilon"] is None


def test_after_a_resume_all_steps_count_and_renamed_nodes_stay():
    earlier = tracker_of(stated(steps=4))
    tracker = PrivacyTracker(DELTA, 1000)
    tracker.load_state_dict(json.loads(json.dumps(earlier.state_dict())))
    observe(tracker, 99, stated(steps=6))
    own = settings(resume="somewhere", **{"privacy__target-epsilon": 1.0})
    report = make_report(own, tracker)
    steps = {one["node_id"]: one["steps"] for one in report["clients"]}
    assert steps == {11: 4, 99: 6}  # sites count a training over resumed runs
    assert report["overall"]["epsilon"] == epsilon(steps=6)
    assert report["resumed"] is True
    text = as_text(report)
    assert "above the run's target epsilon of 1" in text
    assert "went on from an earlier one" in text


def test_the_text_has_every_number():
    report = make_report(settings(), tracker_of(stated(2.0), stated(1.5, 6)))
    text = as_text(report)
    (said,) = re.findall(r"is \((.+), 1e-05\)-differentially private", text.splitlines()[0])
    assert 0 <= float(said) - epsilon(1.5, 6) < 1e-4  # never rounded down
    for one in report["clients"]:
        line = next(row for row in text.splitlines() if row.startswith(str(one["node_id"])))
        assert line.split() == [
            str(one["node_id"]), "0.3", f"{one['noise_multiplier']:.4f}", str(one["steps"]),
            f"{one['epsilon']:.4f}",
        ]  # fmt: skip
    for sentence in report["not_covered"]:
        assert f"- {sentence}\n" in text
    assert "above the run's target" not in text


def test_what_is_not_covered_is_what_the_privacy_page_lists():
    page = (DOCS / "privacy.md").read_text(encoding="utf-8")
    section = page.split("## What is not covered")[1].split("\n## ")[0]
    assert re.findall(r"^- \*\*(.+?)\*\*", section, flags=re.MULTILINE) == list(NOT_COVERED)
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in NOT_COVERED.values())


def test_statements_by_node():
    tracker = tracker_of(stated(), None)
    found = tracker.statements()
    assert list(found) == [11, 12]
    one, spent = found[11]
    assert one is not None and (one.noise_multiplier, spent) == (2.0, epsilon())
    assert found[12] == (None, math.inf)
