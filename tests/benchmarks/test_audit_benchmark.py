"""The audit finds nothing in the client as it is, and every fault that is put into it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest

from benchmarks import audit
from benchmarks.audit import judge, main, table, try_control
from benchmarks.audit_checks import CHECKS
from benchmarks.audit_controls import CONTROLS, Control
from benchmarks.audit_runs import canary_run, two_world_bound
from benchmarks.audit_site import ClientRefused, Site, released
from client_app import private_round, round_handler
from client_app.session import forget
from privacy import pld_epsilon
from privacy.audit import Canaries, recorded
from task.data import simulation_cache

# Milliseconds each; the rest is in the whole quick audit, which is slow.
CHEAP = ("noise", "normaliser", "reply", "scores", "fresh noise", "steps")
CHEAP_CONTROLS = [control for control in CONTROLS if control.detector in CHEAP]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    yield Site(tmp_path_factory.mktemp("audit"), 0, rounds=5, local_steps=4, sample_rate=0.2)
    forget()
    simulation_cache.clear()


@pytest.mark.parametrize("control", CHEAP_CONTROLS, ids=lambda control: control.name)
def test_a_broken_client_is_noticed_and_the_real_one_is_back_afterwards(site, control):
    assert try_control(control, site, 0)["detected"]
    finding = CHECKS[control.detector](site, 0)
    assert finding.passed, finding


def test_every_control_names_a_detector_and_every_detector_has_a_control():
    assert {control.detector for control in CONTROLS} == set(CHECKS)
    assert len({control.name for control in CONTROLS}) == len(CONTROLS)


def test_a_control_that_breaks_down_is_no_detection(site):
    """A fault of the control itself must not pass for a privacy fault that was noticed."""

    def broken():
        return mock.patch.object(private_round, "train_round", side_effect=TypeError("mine"))

    with pytest.raises(ClientRefused) as caught:
        try_control(Control("broken", "steps", broken), site, 0)
    assert caught.value.code == 1099


def test_an_unnoticed_fault_is_told(site):
    def harmless():
        return mock.patch.object(round_handler, "_LOGGER")

    row = try_control(Control("harmless", "steps", harmless), site, 0)
    assert row["detected"] is False and row["passed"] is True


def test_the_claim_is_the_clients_own_statement(site):
    run = canary_run(site, canaries=40, epsilon=1.5, seed=0)
    said = run.reply.statement
    assert said["steps"] == 20 and said["sample-rate"] == 0.2
    assert run.claimed == pld_epsilon(
        sample_rate=0.2, noise_multiplier=said["noise-multiplier"], steps=20, delta=1e-5
    )
    assert 1.45 < run.claimed <= 1.5
    assert run.scores.shape == run.included.shape == (40,)
    assert max(run.bounds().values()) < run.claimed


def test_without_noise_a_canary_scores_the_number_of_steps_that_drew_it(site):
    """Through clip, sum, normaliser, optimizer and update: C / b for each of them, exactly."""
    canaries = Canaries.draw(site.shapes, np.arange(30), seed=0, norm=100.0)

    class Alone:
        def replace(self, name, records, rows):
            return canaries.replace(name, records, rows.new_zeros(rows.shape))

    plan = site.plan(1)
    quiet = next(control for control in CONTROLS if control.name == "no noise")
    with quiet.broken(), recorded(Alone()) as tape:
        reply = site.train(site.context(site.config(records=60)), plan)
    drawn = np.bincount(np.concatenate(tape.batches), minlength=60)[:30]
    steps = canaries.scores(released(reply, plan)) * 0.2 * 60
    np.testing.assert_allclose(steps, drawn * canaries.included, atol=1e-3)
    assert steps.max() > 0.9


def test_an_update_is_minus_the_rate_times_what_was_released(site):
    plan = site.plan(1, steps=1, lr_a=0.02)
    reply = site.train(site.context(site.config(records=60)), plan)
    for name, value in released(reply, plan).items():
        rate = 0.02 if "lora_A" in name else 0.05
        np.testing.assert_allclose(value * -rate, reply.update[name], rtol=1e-6)


def test_a_single_step_in_two_worlds_is_below_its_claim():
    bound, claimed = two_world_bound(600, 2.0, 0)
    assert 0 <= bound < claimed and 1.9 < claimed < 2.1


def rows(**changes):
    bound = {"kind": "bound", "mechanism": "m", "estimator": "e", "seed": 0}
    numbers = {"value": 1.0, "limit": 2.0, "detail": "d", "seed": 0}
    made = [
        {**bound, "lower_bound": changes.get("bound", 0.5), "claimed": 1.0},
        {"kind": "detector", "detector": "x", "passed": changes.get("passed", True), **numbers},
    ]
    return made + [
        {"kind": "control", "control": control.name, "detector": control.detector,
         "detected": index != changes.get("missed"), **numbers}
        for index, control in enumerate(CONTROLS)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "status"),
    [({}, 0), ({"bound": 1.01}, 1), ({"passed": False}, 1), ({"missed": 3}, 1)],
)
def test_bars_hold_and_fail(monkeypatch, capsys, changes, status):
    monkeypatch.setattr(audit, "audit", lambda *_: rows(**changes))
    assert main(["--quick", "--json", "--seed", "7"]) == status
    result = json.loads(capsys.readouterr().out)
    assert result["seed"] == 7 and result["settings"]["canaries"] == 1000
    assert result["commit"] and result["machine"] and result["confidence"] == 0.99
    found = len(CONTROLS) - (1 if "missed" in changes else 0)
    assert result["bars"]["controls detected"]["value"] == found


def test_the_table_counts_controls():
    text = table(rows(missed=0), judge(rows(missed=0)))
    assert f"Controls detected: {len(CONTROLS) - 1} of {len(CONTROLS)}" in text
    assert "| no noise | canaries | NO |" in text


def test_a_negative_seed_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--quick", "--seed", "-1"])
    assert "--seed must be 0 or more, got -1" in capsys.readouterr().err


def whole(capsys, *arguments):
    status = main([*arguments, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert status == 0, [name for name, promise in result["bars"].items() if not promise["ok"]]
    bounds = [row for row in result["rows"] if row["kind"] == "bound"]
    assert all(row["lower_bound"] <= row["claimed"] for row in bounds)
    # They prove something: an audit whose bounds are all 0 would pass with any client.
    assert max(row["lower_bound"] for row in bounds) > 0.25 * 5.0
    assert result["bars"]["controls detected"]["value"] == len(CONTROLS)
    return result


@pytest.mark.slow
def test_the_quick_audit(capsys):
    result = whole(capsys, "--quick")
    assert {row["detector"] for row in result["rows"] if row["kind"] == "detector"} == set(CHECKS)


@pytest.mark.slow
def test_the_long_audit(capsys):
    result = whole(capsys)
    assert len({row["seed"] for row in result["rows"] if row["kind"] == "bound"}) == 2
