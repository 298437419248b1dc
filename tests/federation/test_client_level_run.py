"""Runs whose unit of protection is a client: what is written, sent, said and counted."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant

from cli.run import print_result
from client_app.round_handler import handle_train
from federation.settings import Settings, SettingsError
from privacy import calibrate_noise_multiplier
from strategies import read_checkpoint
from tests.federation.test_resume import PowerCut, killed_in_round, only_folder
from tests.federation.tiny import changed

CLIENT = {
    "privacy__mode": "client",
    "privacy__max_update_norm": 0.5,
    "privacy__registered_clients": 50,
    "strategy__weighting": "uniform",
}
SEEDED = {**CLIENT, "privacy__insecure_test_seed": 5}


def client_epsilon(rounds: int, calibrated_for: int) -> float:
    """Google's accountant, asked in its own words."""
    noise = calibrate_noise_multiplier(
        target_epsilon=8.0, target_delta=1e-5, sample_rate=1.0, steps=calibrated_for
    )
    accountant = PLDAccountant()
    accountant.compose(SelfComposedDpEvent(GaussianDpEvent(noise), rounds))
    return accountant.get_epsilon(1e-5)


@pytest.mark.parametrize("method", ["la-lora", "as-lora", "fed-svd"])
def test_a_run_states_the_clients_epsilon_and_no_other(federate, capsys, caplog, method):
    with caplog.at_level(logging.INFO, logger="flwr"):
        folder, _ = federate(**CLIENT, strategy__method=method)
    result, rows = folder.read_result(), list(folder.read_metrics())
    assert result["epsilon"] is None
    for row in rows:
        assert row["epsilon"] is None
        for key in ("clients", "failures", "bytes_up", "bytes_down"):  # tell who answered
            assert row[key] is None and (key == "failures" or result[key] is None)
    spent = [row["client_epsilon"] for row in rows]
    assert spent[0] == 0.0
    for place in (1, 2):
        assert spent[place] == pytest.approx(client_epsilon(place, 2), rel=0.01)
    assert 0.97 * 8 < result["client_epsilon"] == spent[2] <= 8.0
    assert "client-level epsilon" in caplog.text and "CLIENT-level epsilon 8" in caplog.text
    assert "Unit: one client with all its records" in caplog.text
    assert "run is NOT PRIVATE" not in caplog.text
    assert "num-replies" not in caplog.text
    print_result(folder, 3)
    said = capsys.readouterr().out
    assert "client-level epsilon" in said and "not against the server" in said
    assert "for each record" not in said and "sent" not in said


def test_a_client_sends_its_clipped_update_and_nothing_that_depends_on_its_data(federate):
    _, grid = federate(**CLIENT, strategy__lr_a=50.0, strategy__lr_b=50.0, strategy__lr_head=50.0)
    statements = set()
    for reply in grid.received:
        content = reply.content
        assert set(content) == {"arrays", "wire", "metrics", "privacy"}
        assert dict(content["metrics"]) == {}
        statements.add(json.dumps(dict(content["privacy"])))
        update = np.concatenate([a.numpy().ravel() for a in content["arrays"].values()])
        assert 0.49 < np.linalg.norm(update.astype(np.float64)) <= 0.5 * (1 + 1e-6)
    assert statements == {json.dumps({"unit": "client", "max-update-norm": 0.5})}


def test_a_round_that_was_cut_off_is_counted_twice(federate, runs, tmp_path):
    with pytest.raises(PowerCut):
        federate([handle_train, handle_train, killed_in_round(3)], **CLIENT,
                 strategy__num_rounds=3)  # fmt: skip
    cut = only_folder(runs)
    resumed, _ = federate(
        **CLIENT,
        strategy__num_rounds=3,
        resume=str(cut.path),
        output_dir=str(tmp_path / "resumed"),
    )
    spent = [row["client_epsilon"] for row in resumed.read_metrics()]
    assert spent[3] == pytest.approx(client_epsilon(4, 3), rel=0.01)
    account = read_checkpoint(resumed.checkpoint).state["companions"]["account"]
    assert account == {"rounds-released": 4}


def test_a_resumed_run_draws_fresh_noise_and_a_seeded_one_the_same(federate, runs, tmp_path):
    whole, _ = federate(**SEEDED, strategy__num_rounds=3, output_dir=str(tmp_path / "whole"))
    with pytest.raises(PowerCut):
        federate([handle_train, handle_train, killed_in_round(3)], **SEEDED,
                 strategy__num_rounds=3)  # fmt: skip
    resumed, _ = federate(
        **SEEDED, strategy__num_rounds=3, resume=str(only_folder(runs).path),
        output_dir=str(tmp_path / "resumed"),
    )  # fmt: skip
    one, two = (read_checkpoint(folder.checkpoint).arrays for folder in (whole, resumed))
    assert all(one[name].data == two[name].data for name in one)
    secure = [
        read_checkpoint(federate(**CLIENT, output_dir=str(tmp_path / n))[0].checkpoint).arrays
        for n in ("a", "b")
    ]
    assert all(secure[0][name].data != secure[1][name].data for name in secure[0])


def test_reproducible_noise_guarantees_nothing(federate, caplog):
    folder, _ = federate(**SEEDED)
    assert folder.read_result()["client_epsilon"] is None
    assert "NOT PRIVATE" in caplog.text


def test_rounds_without_any_client_are_released_too(federate):
    folder, grid = federate(**CLIENT, privacy__client_sample_rate=1e-9)
    assert grid.sent == []
    assert [row["applied"] for row in folder.read_metrics()] == [False, True, True]
    assert folder.read_result()["client_epsilon"] > 7.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strategy__weighting": "public-counts"}, ["strategy.weighting", "'uniform'"]),
        ({"strategy__trim": 0.1}, ["strategy.trim", "0.0"]),
        ({"strategy__fraction_train": 0.5}, ["strategy.fraction-train", "client-sample-rate"]),
        ({"strategy__method": "flora"}, ["strategy.method", "'flora'", "as-lora"]),
        ({"strategy__method": "as-lora", "strategy__score": "pairwise"},
         ["strategy.score", "'debiased'"]),
        ({"strategy__low_pass": "on"}, ["strategy.low-pass", "'off'"]),
        ({"privacy__max_update_norm": 0.0}, ["privacy.max-update-norm", "above 0"]),
    ],
)  # fmt: skip
def test_settings_that_look_at_single_clients_are_refused(tiny, changes, words):
    with pytest.raises(SettingsError) as refused:
        Settings.from_run_config(changed(tiny, **{**CLIENT, **changes}))
    assert [word for word in words if word not in str(refused.value)] == []
