"""`dp-lora ledger`: what a site has spent and has left, as its operator sees it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from privacy import BudgetLimit, Ledger, PrivacyPlan, Request
from privacy.commands import main

PLAN = PrivacyPlan(
    sample_rate=0.2,
    expected_batch_size=20.0,
    max_grad_norm=1.0,
    noise_multiplier=2.0,
    steps=60,
    target_delta=1e-5,
)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(
        f'[ledger]\npath = "{tmp_path / "ledger"}"\nhead = "{tmp_path / "head.json"}"\n'
        + "".join(
            f'[datasets.{name}]\ndata-paths = ["/srv/{name}.csv"]\nmax-epsilon = 8.0\n'
            'max-delta = 2e-5\ntasks = ["text-classification"]\n'
            for name in ("wards", "labs")
        )
    )
    path.chmod(0o600)
    return path


@pytest.fixture
def ledger(policy: Path, capsys) -> Ledger:
    assert main(["ledger", "--policy", str(policy), "--create"]) == 0
    assert "Made an empty ledger" in capsys.readouterr().out
    return Ledger(policy.parent / "ledger", policy.parent / "head.json")


def charge(ledger: Ledger, dataset: str, training: str, server_round: int, **changes) -> None:
    request = Request(
        dataset=dataset,
        training=training,
        server_round=server_round,
        inputs="0" * 64,
        plan=PLAN,
        secure_noise=changes.get("secure_noise", True),
        steps=6,
        records=next(iter(ledger.book().holdings[dataset].stamps.values())),
    )
    ledger.charge(request, changes.get("limits", {}))


def test_a_new_ledger_has_spent_nothing(policy, ledger, capsys):
    assert main(["ledger", "--policy", str(policy), "--json"]) == 0
    stated = json.loads(capsys.readouterr().out)
    assert [(one["dataset"], one["spent"], one["left"]) for one in stated] == [
        ("labs", 0.0, 8.0),
        ("wards", 0.0, 8.0),
    ]


def test_what_is_spent_and_left_is_what_the_filter_goes_by(policy, ledger, capsys):
    ledger.admit("wards", "s-wards", lambda: [b"a" * 32, b"b" * 32])
    ledger.admit("labs", "s-labs", lambda: [b"b" * 32, b"c" * 32, b"d" * 32])
    for server_round in (1, 2):
        charge(ledger, "wards", "one", server_round)
    charge(ledger, "labs", "two", 1)
    assert main(["ledger", "--policy", str(policy), "--json"]) == 0
    labs, wards = json.loads(capsys.readouterr().out)
    plans = [plan.spendings for plan in ledger.book().plans.values()]
    limit = BudgetLimit(8.0, 2e-5)
    assert labs["spent"] == wards["spent"] == limit.spent(plans)
    assert labs["left"] == limit.left(plans) < 8.0
    assert (labs["shares-records-with"], labs["records"]) == (["wards"], 3)
    trainings = [(one["training"], one["steps"], one["rounds"]) for one in wards["trainings"]]
    assert trainings == [("one", 12, 2), ("two", 6, 1)]

    assert main(["ledger", "--policy", str(policy)]) == 0
    text = capsys.readouterr().out
    assert f"spent      epsilon {labs['spent']:.3f}" in text
    assert "limit      epsilon 8 at delta 2e-05" in text
    assert "12 of 60 steps in 2 rounds, q 0.2, sigma 2" in text
    assert "has records of labs: what they spend counts here, too" in text


def test_a_release_without_a_guarantee_is_shown_as_that(policy, ledger, capsys):
    ledger.admit("wards", "s-wards", lambda: [b"a" * 32])
    charge(ledger, "wards", "one", 1, secure_noise=False)
    assert main(["ledger", "--policy", str(policy)]) == 0
    text = capsys.readouterr().out
    assert "infinite: nothing is guaranteed" in text and "NOT PRIVATE" in text
    assert "left       a release of epsilon 0.000" in text


def test_a_simulated_ledger_is_shown_by_its_folder(policy, ledger, capsys):
    ledger.admit("client-0", "s-client-0", lambda: [b"a" * 32])
    charge(ledger, "client-0", "one", 1)
    folder = str(policy.parent / "ledger")
    assert main(["ledger", "--folder", folder, "--head", str(policy.parent / "head.json")]) == 0
    assert "client-0" in capsys.readouterr().out


def test_a_ledger_that_cannot_be_trusted_is_an_error(policy, ledger, capsys):
    (policy.parent / "head.json").unlink()
    assert main(["ledger", "--policy", str(policy)]) == 1
    assert "head" in capsys.readouterr().err


def test_a_second_ledger_is_not_made_in_its_place(policy, ledger, capsys):
    assert main(["ledger", "--policy", str(policy), "--create"]) == 1
    assert "there is one already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--policy: got nothing"),
        (["--folder", "/tmp"], "--policy: got nothing"),
        (["--policy", "/no/such.toml"], "policy /no/such.toml: cannot be read"),
        (["--policy", "p", "--folder", "f", "--head", "h"], "takes one of the two"),
    ],
)
def test_options_that_say_nothing_are_refused(options, said, capsys):
    assert main(["ledger", *options]) == 2
    assert said in capsys.readouterr().err
