"""A whole federation, from settings to result, and the mistakes that whole runs make."""

from __future__ import annotations

import functools
import itertools
import json

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from flwr.app import Message, RecordDict
from safetensors.torch import load_file

from client_app.round_handler import handle_train
from federation.messages import ClientFailure
from privacy import calibrate_noise_multiplier
from server_app import federation_run, observer
from server_app.federation_run import NothingLearned
from strategies import ROUND_PLAN_KEY, STRATEGIES
from task.data import load_test_records
from task.settings import DataSettings
from tests.fake_grid import FakeGrid

RESULT_KEYS = [
    "method", "rounds", "stopped_early", "clients", "accuracy_start", "accuracy_end", "epsilon",
    "delta",    "bytes_up", "bytes_down", "seconds", "adapter",
]  # fmt: skip
QUICK = {"privacy__mode": "none"}
SEEDED = {"privacy__insecure_test_seed": 5}


def independent_epsilon(statement, steps: int) -> float:
    """Google's accountant, asked in its own words; none of our code."""
    return _epsilon(
        statement["sample-rate"], statement["noise-multiplier"], steps, statement["target-delta"]
    )


@functools.cache
def _epsilon(rate: float, noise: float, steps: int, delta: float) -> float:
    event = PoissonSampledDpEvent(rate, GaussianDpEvent(noise))
    accountant = PLDAccountant()
    accountant.compose(SelfComposedDpEvent(event, steps))
    return accountant.get_epsilon(delta)


def adapter_bytes(folder) -> bytes:
    """All bits of all tensors.  (The file's own header names its metadata in a random order.)"""
    state = load_file(folder.adapter / "adapter_model.safetensors")
    return b"".join(name.encode() + state[name].numpy().tobytes() for name in sorted(state))


def without_data(message, context):
    """A client whose file is not there."""
    context.node_config = {**context.node_config, "partition-id": 99}
    return handle_train(message, context)


@pytest.mark.parametrize("method", sorted(STRATEGIES))
def test_a_private_run_of_every_method_leaves_a_complete_result(federate, method):
    folder, grid = federate(strategy__method=method)
    result = folder.read_result()
    assert list(result) == RESULT_KEYS
    rows = list(folder.read_metrics())
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert (result["method"], result["rounds"], result["clients"]) == (method, 2, 3)
    assert result["delta"] == 1e-5
    assert result["adapter"] == str(folder.adapter)
    assert result["accuracy_start"] == rows[0]["accuracy"]
    assert result["accuracy_end"] == rows[-1]["accuracy"]
    assert rows[0]["epsilon"] == 0.0 and rows[0]["clients"] == 0 and rows[0]["bytes_up"] == 0
    assert all(row["clients"] == 3 and row["failures"] == 0 and row["applied"] for row in rows[1:])
    assert result["seconds"] > 0
    assert json.loads(folder.settings.read_text())["strategy"]["method"] == method
    # The bytes are those of the tensors that travelled.
    for key, messages in (("bytes_up", grid.received), ("bytes_down", grid.sent)):
        assert result[key] == sum(
            len(array.data) for m in messages for array in m.content["arrays"].values()
        )

    # Mistake: one round's epsilon reported as the total.
    statement = grid.received[0].content["privacy"]
    for row, steps in ((rows[1], 2), (rows[2], 4)):
        assert row["epsilon"] == pytest.approx(independent_epsilon(statement, steps), rel=0.02)
    assert result["epsilon"] == rows[2]["epsilon"] > 1.1 * rows[1]["epsilon"]
    assert 0.98 * 8.0 < result["epsilon"] <= 8.0


def test_the_exported_adapter_gives_the_federations_logits_on_a_fresh_backbone(
    federate, tiny, monkeypatch
):
    import timm
    from peft import PeftModel

    models = []
    build = federation_run.build_task_model

    def keep(*args, **kwargs):
        models.append(build(*args, **kwargs))
        return models[-1]

    monkeypatch.setattr(federation_run, "build_task_model", keep)
    folder, _ = federate(**QUICK, strategy__method="la-lora")
    (ours,) = models
    data = DataSettings(source="npz", path=tiny["data.path"], num_labels=3)
    test = load_test_records(data, ours.encoder)
    batch = test.batch(np.arange(len(test)))
    base = timm.create_model(f"local-dir:{tiny['model.name']}", pretrained=True, num_classes=3)
    loaded = PeftModel.from_pretrained(base, folder.adapter)
    loaded.eval()
    ours.model.eval()
    with torch.no_grad():
        expected, got = ours.logits(batch), loaded(batch["pixel_values"])
    assert expected.std() > 0.01
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    # And they are those whose accuracy was reported, not the first or the best round's.
    right = (got.argmax(1) == batch["labels"]).float().mean().item()
    assert right == pytest.approx(folder.read_result()["accuracy_end"])


def test_rounds_between_evaluations_have_no_accuracy_and_cost_none(federate, monkeypatch):
    """The start and the last round always have one: the result is of the last round."""
    calls = []

    def count(*_):
        calls.append(1)
        return {"accuracy": 0.1 * len(calls), "loss": 1.0}

    monkeypatch.setattr(observer, "evaluate", count)
    changes = {"strategy__num_rounds": 5, "strategy__evaluate_every": 3}
    folder, _ = federate(strategy__method="dp-lora", **QUICK, **changes)
    rows = list(folder.read_metrics())
    shown = [None if row["accuracy"] is None else round(row["accuracy"], 1) for row in rows]
    assert shown == [0.1, None, None, 0.2, None, 0.3]
    assert [row["loss"] is None for row in rows] == [value is None for value in shown]
    assert len(calls) == 3
    assert all(row["applied"] for row in rows[1:])
    assert folder.read_result()["accuracy_end"] == pytest.approx(0.3)


def test_the_reported_accuracy_is_the_last_rounds(federate, monkeypatch):
    """Mistake: the best of all rounds, chosen on the test set."""
    accuracies = itertools.chain([0.3, 0.9, 0.4])
    monkeypatch.setattr(
        observer, "evaluate", lambda *_: {"accuracy": next(accuracies), "loss": 1.0}
    )
    folder, _ = federate(**QUICK)
    result = folder.read_result()
    assert (result["accuracy_start"], result["accuracy_end"]) == (0.3, 0.4)


def test_the_model_learns_where_privacy_does_not_stand_in_its_way(federate):
    rates = {f"strategy__lr_{kind}": 0.1 for kind in ("a", "b", "head")}
    folder, _ = federate(
        **QUICK, **SEEDED, **rates, strategy__num_rounds=8, strategy__local_steps=4
    )
    result = folder.read_result()
    assert result["accuracy_start"] < 0.5 < 0.8 < result["accuracy_end"]


@pytest.mark.parametrize("changes", [QUICK, SEEDED])
def test_a_run_without_a_guarantee_says_null(federate, changes):
    folder, _ = federate(**changes)
    text = folder.result.read_text() + folder.metrics.read_text()
    assert "Infinity" not in text and "NaN" not in text
    assert folder.read_result()["epsilon"] is None
    assert [row["epsilon"] for row in folder.read_metrics()] == [0.0, None, None]


def test_a_client_that_fails_costs_its_share_only(federate):
    folder, grid = federate([handle_train, without_data, handle_train], **QUICK)
    assert folder.read_result()["clients"] == 2
    rows = list(folder.read_metrics())[1:]
    assert [(row["clients"], row["failures"], row["applied"]) for row in rows] == [(2, 1, True)] * 2
    errors = [reply.error for reply in grid.received if reply.has_error()]
    assert [error.code for error in errors] == [ClientFailure.DATA] * 2
    assert "/no/such" not in errors[0].reason


def test_a_client_that_promises_nothing_takes_the_federations_guarantee(federate):
    def silent(message, context):
        reply = handle_train(message, context)
        content = RecordDict({key: reply.content[key] for key in ("arrays", "metrics")})
        return Message(content, reply_to=message)

    folder, _ = federate([handle_train, silent, handle_train])
    assert folder.read_result()["epsilon"] is None


def test_a_run_in_which_nobody_could_train_fails_and_leaves_no_result(federate, runs):
    with pytest.raises(NothingLearned, match=r"none of the 2 rounds.*strategy\.min-train-nodes"):
        federate([without_data] * 3, **QUICK)
    (folder,) = runs.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.npz", "ledgers", "metrics.jsonl", "settings.json",
    ]  # fmt: skip


def test_rounds_that_fail_after_a_good_one_keep_what_was_learned(federate):
    def first_round_only(message, context):
        first = message.content[ROUND_PLAN_KEY]["server-round"] == 1
        return handle_train(message, context) if first else without_data(message, context)

    folder, _ = federate([first_round_only] * 3, **QUICK)
    rows = list(folder.read_metrics())
    assert [row["applied"] for row in rows] == [False, True, False]
    assert rows[2]["accuracy"] == rows[1]["accuracy"] and rows[2]["loss"] == rows[1]["loss"]
    assert folder.read_result()["accuracy_end"] == rows[1]["accuracy"]


class BackwardGrid(FakeGrid):
    """Clients train in the other order."""

    def push_messages(self, messages):
        return super().push_messages(list(messages)[::-1])[::-1]


@pytest.mark.parametrize("method", ["la-lora", "dp-lora"])
def test_equal_seeds_give_bit_identical_adapters_in_any_order_of_clients(federate, method):
    changes = {**SEEDED, "strategy__method": method}
    one, _ = federate(**changes)
    two, grid = federate(**changes, grid_type=BackwardGrid)
    assert [m.metadata.dst_node_id for m in grid.sent] == [3, 2, 1, 3, 2, 1]
    assert adapter_bytes(one) == adapter_bytes(two)


def test_another_seed_or_secure_noise_gives_another_adapter(federate):
    folders = [
        federate(**changes)[0]
        for changes in (SEEDED, {**SEEDED, "seed": 1}, {"privacy__insecure_test_seed": 6}, {}, {})
    ]
    assert len({adapter_bytes(folder) for folder in folders}) == 5


def test_the_plan_is_for_all_rounds_however_few_clients_a_round_asks(federate):
    """Mistakes: expected instead of worst-case participation; amplification by client sampling."""
    folder, grid = federate([handle_train] * 4, strategy__fraction_train=0.5)
    asked = [message.metadata.dst_node_id for message in grid.sent]
    assert len(asked) == 4  # two of four clients in each of two rounds
    expected = calibrate_noise_multiplier(
        target_epsilon=8.0, target_delta=1e-5, sample_rate=0.3, steps=4
    )
    statements = [reply.content["privacy"] for reply in grid.received]
    assert {s["noise-multiplier"] for s in statements} == {expected}
    assert {s["sample-rate"] for s in statements} == {0.3}  # not 0.3 x 0.5
    most = max(s["steps"] for s in statements)
    assert most == 2 * max(asked.count(node) for node in asked)
    assert folder.read_result()["epsilon"] == pytest.approx(
        independent_epsilon(statements[0], most), rel=0.02
    )


def test_a_common_batch_size_accounts_the_rate_that_samples(federate):
    """Mistake: q accounted as 1 / int(n / b), or b computed from the private n."""
    _, grid = federate(**QUICK, privacy__sample_rate=0.0, privacy__expected_batch_size=17)
    rates = {reply.content["privacy"]["sample-rate"] for reply in grid.received}
    assert rates == {17 / 60}
    _, grid = federate(**QUICK, privacy__sample_rate=0.0, privacy__expected_batch_size=1000)
    assert {reply.content["privacy"]["sample-rate"] for reply in grid.received} == {1.0}


def test_a_refused_update_is_counted_in_the_federations_epsilon(federate):
    """Clients 1 and 2 drop out after round 1; client 3 spends both rounds on void replies."""

    def once(message, context):
        first = message.content[ROUND_PLAN_KEY]["server-round"] == 1
        return handle_train(message, context) if first else without_data(message, context)

    def spoilt(message, context):
        reply = handle_train(message, context)
        arrays = reply.content["arrays"]
        del arrays[next(iter(arrays))]
        return reply

    folder, grid = federate([once, once, spoilt])
    spent = grid.received[-1].content["privacy"]
    assert spent["steps"] == 4
    assert folder.read_result()["epsilon"] == pytest.approx(independent_epsilon(spent, 4), rel=0.02)


def test_epsilon_and_delta_of_the_result_belong_together(federate):
    def generous(message, context):
        reply = handle_train(message, context)
        reply.content["privacy"]["target-delta"] = 0.5
        return reply

    folder, grid = federate([generous] * 3)
    result = folder.read_result()
    statement = {**grid.received[0].content["privacy"], "target-delta": result["delta"]}
    honest = independent_epsilon(statement, 4)
    assert result["epsilon"] is None or result["epsilon"] >= 0.98 * honest
