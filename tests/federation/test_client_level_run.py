"""Runs whose unit of protection is a client: what is written, sent, said and counted."""

from __future__ import annotations

import json
import logging
import re

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from flwr.app import RecordDict

from cli.run import ROOT, default_run_config, print_result
from client_app.client_level import _charge_round
from client_app.round_handler import handle_train
from federation.messages import ClientFailure
from federation.settings import Settings, SettingsError
from privacy import BudgetExhausted, calibrate_noise_multiplier
from strategies import ROUND_PLAN_KEY, read_checkpoint
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


# Distributed noise under secure aggregation.

SECURE = {
    "privacy__mode": "client-distributed",
    "privacy__max_update_norm": 0.5,
    "privacy__registered_clients": 5,
    "privacy__least_clients": 3,
    "strategy__weighting": "uniform",
}
FIVE = [handle_train] * 5


@pytest.mark.parametrize("method", ["la-lora", "as-lora", "fed-svd"])
def test_a_run_under_secure_aggregation_states_whom_it_guards_against(
    federate, capsys, caplog, method
):
    with caplog.at_level(logging.INFO, logger="flwr"):
        folder, grid = federate(FIVE, **SECURE, strategy__method=method)
    result, rows = folder.read_result(), list(folder.read_metrics())
    assert [row["applied"] for row in rows] == [False, True, True]
    assert result["epsilon"] is None and result["clients"] is None
    spent = [row["client_epsilon"] for row in rows]
    assert spent[0] == 0 < spent[1] < spent[2] == result["client_epsilon"] <= 8.0
    assert result["client_epsilon"] > 0.98 * 8.0
    print_result(folder, 5)
    assert "against the server, too" in capsys.readouterr().out
    assert "run is NOT PRIVATE" not in caplog.text
    # Four messages a client and round; vectors are masked words, and nothing else leaves.
    assert len(grid.sent) == 2 * 5 * 4
    arrays = [r.content["arrays"] for r in grid.received if "arrays" in r.content]
    assert len(arrays) == 10
    assert all([a.dtype for a in one.values()] == ["uint32"] for one in arrays)


def broken(_message, _context):
    raise RuntimeError("gone")


def test_the_sum_that_is_applied_is_that_of_the_clipped_updates(federate, monkeypatch, tmp_path):
    """Noise and masks as they are; the seeded noise is known, so the rest must be the updates."""
    import client_app.client_level as client_side

    exact: list[np.ndarray] = []
    noisy: list[np.ndarray] = []
    encode = client_side.DistributedMechanism.encode

    def noted(self, update, server_round, client):
        exact.append(update * min(1.0, 0.5 / np.linalg.norm(update)))
        words = encode(self, update, server_round, client)
        noisy.append(words.view(np.int32).astype(np.float64) / self.plan.scale)
        return words

    monkeypatch.setattr(client_side.DistributedMechanism, "encode", noted)
    folder, _ = federate(FIVE, **SECURE, privacy__insecure_test_seed=5,
                         strategy__num_rounds=1, strategy__method="dp-lora")  # fmt: skip
    saved = read_checkpoint(folder.checkpoint).arrays
    cold, _ = federate(
        [handle_train] * 4 + [broken], **SECURE, privacy__insecure_test_seed=5,
        strategy__num_rounds=1, strategy__method="dp-lora", output_dir=str(tmp_path / "b"),
    )  # fmt: skip
    assert len(noisy) == 9
    other = read_checkpoint(cold.checkpoint).arrays
    moved = np.concatenate(
        [(saved[n].numpy().astype(np.float64) - other[n].numpy()).ravel() for n in sorted(saved)]
    )
    np.testing.assert_allclose(moved, noisy[4] / 5, atol=1e-6)
    assert np.linalg.norm(noisy[4] - exact[4]) > 0.5  # the client's own noise is in it


def test_drop_outs_are_recovered_down_to_the_least_number_and_refused_below(federate):
    def leaves_at(stage: str):
        def handle(message, context):
            if message.content["secure-aggregation"]["stage"] == stage:
                raise RuntimeError("gone")
            return handle_train(message, context)

        return handle

    some = [leaves_at("mask"), leaves_at("unmask"), *FIVE[:3]]
    folder, _ = federate(some, **SECURE, strategy__num_rounds=1)
    assert [row["applied"] for row in folder.read_metrics()] == [False, True]
    stubborn = [leaves_at("mask")] * 3 + FIVE[:2]
    with pytest.raises(Exception, match="none of the 1 rounds"):
        federate(stubborn, **SECURE, strategy__num_rounds=1)


def test_a_client_masks_no_more_updates_than_the_noise_is_calibrated_for(federate):
    """A server that asks for more rounds than the run config has is refused by each client."""
    contexts = {}

    def remembered(message, context):
        contexts[context.node_id] = context
        return handle_train(message, context)

    _, grid = federate([remembered] * 5, **SECURE)
    for context in contexts.values():
        assert context.state["client-level-rounds"]["rounds"] == 2
    for message in [m for m in grid.sent if m.metadata.dst_node_id == 1][-4:-1]:
        if ROUND_PLAN_KEY in message.content:  # as it was it would get its old reply again
            message.content[ROUND_PLAN_KEY]["server-round"] = 3
        reply = handle_train(message, contexts[1])
    assert reply.has_error() and reply.error.code == ClientFailure.BUDGET_EXHAUSTED
    state = RecordDict()
    for spent in (1, 2):
        _charge_round(state, 2)
        assert state["client-level-rounds"]["rounds"] == spent
    with pytest.raises(BudgetExhausted, match="2 of 2 rounds"):
        _charge_round(state, 2)


def test_a_message_of_secure_aggregation_in_another_run_is_refused(federate):
    _, grid = federate(FIVE, **SECURE, strategy__num_rounds=1)
    advertise = grid.sent[0]
    _, other = federate(**CLIENT, strategy__num_rounds=1)
    reply = handle_train(advertise, other.contexts[0])
    assert reply.has_error() and reply.error.code == ClientFailure.PRIVACY


def test_a_secure_round_that_was_cut_off_is_counted_twice(federate, runs, tmp_path):
    def dies(message, context):
        if message.content["secure-aggregation"]["stage"] == "unmask":
            seen.append(message)
            if len(seen) > 5:
                raise PowerCut
        return handle_train(message, context)

    seen: list[object] = []
    with pytest.raises(PowerCut):
        federate([dies] * 5, **SECURE)
    resumed, _ = federate(
        FIVE, **SECURE, resume=str(only_folder(runs).path), output_dir=str(tmp_path / "resumed")
    )
    account = read_checkpoint(resumed.checkpoint).state["companions"]["account"]
    assert account == {"rounds-released": 3}
    spent = [row["client_epsilon"] for row in resumed.read_metrics()]
    assert spent[2] > 8.0 > spent[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wire__dtype": "int8"}, ["wire.dtype", "'float32'", "'int8'"]),
        ({"privacy__least_clients": 1}, ["privacy.least-clients", "from 2 to"]),
    ],
)
def test_settings_that_do_not_go_with_secure_aggregation_are_refused(tiny, changes, words):
    with pytest.raises(SettingsError) as refused:
        Settings.from_run_config(changed(tiny, **{**SECURE, **changes}))
    assert [word for word in words if word not in str(refused.value)] == []


# One record's noise in shares.

SHARED = {
    "privacy__mode": "record-distributed",
    "privacy__registered_clients": 5,
    "privacy__least_clients": 3,
    "privacy__colluding_clients": 1,
    "privacy__registered_records": 180,
    "privacy__max_grad_norm": 0.8,
    "strategy__weighting": "uniform",
    "strategy__local_steps": 1,
    "strategy__method": "dp-lora",
}


@pytest.mark.parametrize("method", ["dp-lora", "as-lora", "ro-lora"])
def test_a_run_with_noise_in_shares_states_the_records_epsilon_and_whom_it_guards_against(
    federate, capsys, caplog, method
):
    with caplog.at_level(logging.INFO, logger="flwr"):
        folder, grid = federate(FIVE, **{**SHARED, "strategy__method": method})
    result, rows = folder.read_result(), list(folder.read_metrics())
    assert [row["applied"] for row in rows] == [False, True, True]
    assert "client_epsilon" not in result
    assert 0.98 * 8 < result["epsilon"] <= 8.0
    assert rows[0]["epsilon"] == 0 < rows[1]["epsilon"] < rows[2]["epsilon"] == result["epsilon"]
    print_result(folder, 5)
    said = capsys.readouterr().out
    assert "for each record" in said and "as long as it keeps to the protocol" in said
    assert "RECORD-level epsilon 8" in caplog.text and "run is NOT PRIVATE" not in caplog.text
    for reply in grid.received:
        assert set(reply.content) <= {"arrays", "wire", "metrics", "privacy", "secure-aggregation"}
        assert not dict(reply.content.get("metrics", {}))
        said = dict(reply.content.get("privacy", {}))
        assert said in ({}, {"unit": "record", "max-grad-norm": 0.8})


def test_the_server_steps_by_the_noised_sum_of_the_clients_clipped_gradients(federate, monkeypatch):
    import client_app.client_level as client_side

    sums, noisy = [], []
    encode = client_side.DistributedMechanism.encode

    def noted(self, vector, server_round, client):
        sums.append(vector)
        words = encode(self, vector, server_round, client)
        noisy.append(words.view(np.int32).astype(np.float64) / self.plan.scale)
        return words

    monkeypatch.setattr(client_side.DistributedMechanism, "encode", noted)
    folder, grid = federate(
        FIVE, **SHARED, strategy__num_rounds=1, strategy__lr_a=0.5, strategy__lr_b=0.25,
        strategy__lr_head=2.0,
    )  # fmt: skip
    start = next(m.content["arrays"] for m in grid.sent if "arrays" in m.content)
    end = read_checkpoint(folder.checkpoint).arrays
    total = -sum(noisy) / (0.3 * 180)
    rates = {"lora_A": 0.5, "lora_B": 0.25}
    place = 0
    for name in sorted(end):
        rate = next((rate for key, rate in rates.items() if key in name), 2.0)
        before, after = start[name].numpy().astype(np.float64), end[name].numpy()
        expected = rate * total[place : place + before.size].reshape(before.shape)
        np.testing.assert_allclose(after - before, expected, atol=2e-5)
        place += before.size
    assert place == total.size
    # Batches are of about 0.3 x 36 records, each clipped to 0.8; the noise is of the plan's size.
    assert all(0.1 < np.linalg.norm(one) < 0.8 * 36 for one in sums)
    noise = np.concatenate([one - two for one, two in zip(noisy, sums, strict=True)])
    plan = client_side.DistributedPlan.for_run(
        Settings.from_run_config(grid.contexts[0].run_config).privacy,
        rounds=1,
        values=total.size,
    )
    assert noise.std() == pytest.approx(plan.sigma / plan.scale, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strategy__local_steps": 2}, ["strategy.local-steps", "must be 1", "got 2"]),
        ({"strategy__optimizer": "adamw"}, ["strategy.optimizer", "'sgd'", "'adamw'"]),
        ({"strategy__method": "flora"}, ["strategy.method", "'flora'"]),
        ({"strategy__weighting": "public-counts"}, ["strategy.weighting", "'uniform'"]),
    ],
)
def test_more_than_one_step_or_single_updates_are_refused_with_noise_in_shares(
    tiny, changes, words
):
    with pytest.raises(SettingsError) as refused:
        Settings.from_run_config(changed(tiny, **{**SHARED, **changes}))
    assert [word for word in words if word not in str(refused.value)] == []


def test_a_client_takes_no_second_step_whatever_the_round_plan_says(federate):
    _, grid = federate(FIVE, **SHARED)
    message = next(m for m in grid.sent if "round-plan" in m.content)
    message.content["round-plan"]["local-steps"] = 2
    context = grid.contexts[0]
    context.run_id = 999  # a client that nothing was asked of yet
    reply = handle_train(message, context)
    assert reply.has_error() and reply.error.code == ClientFailure.PRIVACY


def test_the_pages_own_examples_are_accepted_as_flower_reads_them():
    from flwr.common.config import parse_config_args

    text = (ROOT / "docs" / "client-level.md").read_text(encoding="utf-8")
    examples = re.findall(r"flwr run \. -c '([^']+)'", text)
    modes = []
    for example in examples:
        config = {**default_run_config(), **parse_config_args([example])}
        modes.append(Settings.from_run_config(config).privacy.mode)
    assert modes == ["client", "client-distributed", "record-distributed"]
