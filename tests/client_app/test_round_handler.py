"""From a train message to its reply: what leaves a client, and what never does."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

import client_app.session as session_module
from client_app import round_handler
from client_app.round_handler import _source, handle_train
from federation.messages import ClientFailure
from privacy import AccountingError, EngineError, PrivacyPlan, PrivacySettings
from strategies import ROUND_PLAN_KEY, STRATEGIES, RoundPlan
from task.errors import DataError, ModelError
from tests.client_app.conftest import PLAN, forget_process
from tests.federation.tiny import TRAIN_RECORDS

SEEDED = {"privacy__insecure_test_seed": 3}
UNIFORM = {"strategy__weighting": "uniform"}
CANARY = "patient-4711-hiv-positive"
RECORDS = TRAIN_RECORDS // 3


def update_of(reply: Message) -> dict[str, np.ndarray]:
    assert reply.has_content(), reply.error
    return {name: array.numpy() for name, array in reply.content["arrays"].items()}


def same(one: Message, two: Message) -> bool:
    first, second = update_of(one), update_of(two)
    return list(first) == list(second) and all(
        first[name].tobytes() == second[name].tobytes() for name in first
    )


def refused(reply: Message, code: ClientFailure) -> None:
    """The reply is this failure's fixed code and text, and nothing else."""
    assert reply.has_error() and not reply.has_content()
    assert (reply.error.code, reply.error.reason) == (int(code), code.to_error().reason)


def charged(context) -> int:
    record = context.state.config_records.get("budget")
    return 0 if record is None else record["steps"]


def fail_with(error):
    def function(*_args, **_kwargs):
        raise error

    return function


# What a reply holds.


@pytest.mark.parametrize("method", sorted(STRATEGIES))
@pytest.mark.parametrize("server_round", [1, 2])
def test_a_reply_holds_the_active_tensors_and_public_numbers_only(site, method, server_round):
    plan = STRATEGIES[method](local_steps=2).plan(server_round)
    message = site.message()
    message.content[ROUND_PLAN_KEY] = plan.to_record()
    context = site.context(1, **UNIFORM)
    reply = handle_train(message, context)
    adapter = site.server_model.adapter
    update = update_of(reply)
    assert list(update) == list(plan.uploaded(adapter))
    for name, value in update.items():
        assert value.dtype == np.float32 and value.shape == tuple(adapter[name].shape)
        assert np.isfinite(value).all() and value.any()
    assert set(reply.content) == {"arrays", "metrics", "privacy"}
    assert dict(reply.content["metrics"]) == {}
    privacy_plan = PrivacyPlan.for_client(
        site.settings().privacy, num_records=RECORDS, steps=site.settings().total_steps
    )
    assert dict(reply.content["privacy"]) == {
        "sample-rate": 0.3,
        "noise-multiplier": privacy_plan.noise_multiplier,
        "target-delta": 1e-5,
        "steps": 2,
        "secure-noise": True,
    }


def test_no_loss_accuracy_or_count_in_any_value(site):
    """Mistake: un-noised metrics beside a noised update.  Every number is one we know."""
    plain = {v for record in [site.settings(**UNIFORM).privacy.model_dump()] for v in
             record.values() if not isinstance(v, str)}  # fmt: skip
    reply = handle_train(site.message(), site.context(**UNIFORM))
    noise = reply.content["privacy"]["noise-multiplier"]
    for record in (reply.content["privacy"], reply.content["metrics"]):
        for key, value in record.items():
            assert value in plain | {noise, True, PLAN.local_steps}, key
            assert value not in (RECORDS, TRAIN_RECORDS)
    for name, array in reply.content["arrays"].items():
        # Only as many bytes as the tensor has: nothing can ride along.
        size = math.prod(site.server_model.adapter[name].shape) * 4
        assert size < len(array.data) <= size + 128


def test_the_count_travels_only_where_it_is_declared_public(site):
    public = handle_train(site.message(), site.context(strategy__weighting="public-counts"))
    assert dict(public.content["metrics"]) == {"num-examples": RECORDS}


def test_a_common_rate_states_nothing_of_the_count(site):
    """A common batch size does: its rate is b / n, so that setting declares the count public."""

    def statement(parts, **changes):
        context = site.context(**UNIFORM, **changes)
        context.node_config["num-partitions"] = parts
        return dict(handle_train(site.message(), context).content["privacy"])

    assert statement(3) == statement(6)
    common_batch = {"privacy__sample_rate": 0.0, "privacy__expected_batch_size": 18}
    assert statement(3, **common_batch) != statement(6, **common_batch)
    declared = PrivacySettings.model_fields["expected_batch_size"].description
    assert "declares public" in declared


def test_an_update_says_what_the_adapter_did_in_training(site):
    """The server's tensor plus the update is the client's tensor."""
    before = site.server_model.adapter_state()
    context = site.context()
    reply = handle_train(site.message(), context)
    settings = site.settings()
    model = session_module.open_session(settings, torch.device("cpu")).task_model
    for name, value in update_of(reply).items():
        torch.testing.assert_close(model.adapter_state()[name] - before[name],
                                   torch.from_numpy(value), rtol=0, atol=0)  # fmt: skip


def test_without_privacy_the_statement_promises_nothing(site):
    reply = handle_train(site.message(), site.context(privacy__mode="none"))
    assert reply.content["privacy"]["noise-multiplier"] == 0.0


# The budget.


def test_budget_is_charged_before_training_and_kept_across_rounds(site, monkeypatch):
    context = site.context()
    seen = []
    train_round = round_handler.train_round

    def watch(*args):
        seen.append(charged(context))
        return train_round(*args)

    monkeypatch.setattr(round_handler, "train_round", watch)
    steps = [
        handle_train(site.message(server_round=n), context).content["privacy"]["steps"]
        for n in (1, 2)
    ]
    assert seen == steps == [2, 4]
    third = handle_train(site.message(server_round=3), context)
    refused(third, ClientFailure.BUDGET_EXHAUSTED)
    assert seen == [2, 4] and charged(context) == 4


def test_a_round_longer_than_what_is_left_is_refused_whole(site):
    context = site.context()
    refused(handle_train(site.message(local_steps=6), context), ClientFailure.BUDGET_EXHAUSTED)
    assert charged(context) == 0
    assert handle_train(site.message(local_steps=4), context).has_content()
    assert charged(context) == 4


def test_a_crash_costs_budget_and_releases_nothing(site, monkeypatch):
    context = site.context()
    with monkeypatch.context() as patch:
        patch.setattr(round_handler, "train_round", fail_with(RuntimeError(CANARY)))
        refused(handle_train(site.message(), context), ClientFailure.INTERNAL)
    assert charged(context) == 2
    assert handle_train(site.message(), context).content["privacy"]["steps"] == 4
    refused(handle_train(site.message(), context), ClientFailure.BUDGET_EXHAUSTED)


def test_each_client_has_a_budget_of_its_own(site):
    first, second = site.context(0), site.context(1)
    for _ in range(2):
        assert handle_train(site.message(), first).has_content()
    assert handle_train(site.message(), second).content["privacy"]["steps"] == 2


# Failures.


@pytest.mark.parametrize(
    ("changes", "node_config", "code"),
    [
        ({"strategy__lr_a": -1.0}, None, ClientFailure.SETTINGS),
        ({"strategy__no_such": 1}, None, ClientFailure.SETTINGS),
        ({"device": "tpu"}, None, ClientFailure.SETTINGS),
        ({}, {"partition-id": 0, "num-partitions": 3, "device": "tpu"}, ClientFailure.SETTINGS),
        ({}, {"data-path": f"/no/such/{CANARY}.npz"}, ClientFailure.DATA),
        ({}, {}, ClientFailure.DATA),
        ({}, {"partition-id": 3, "num-partitions": 3}, ClientFailure.DATA),
        ({"data__min_records": RECORDS + 1}, None, ClientFailure.DATA),
        ({"model__name": "/no/such/model"}, None, ClientFailure.MODEL),
        ({"lora__target_modules": "no.such.layer"}, None, ClientFailure.MODEL),
        ({"privacy__target_delta": 0.5}, None, ClientFailure.PRIVACY),
    ],
)
def test_every_failure_has_its_fixed_code_and_text(site, changes, node_config, code):
    context = site.context(node_config=node_config, **changes)
    refused(handle_train(site.message(), context), code)
    assert charged(context) == 0


def test_another_backbone_is_refused_before_data_are_read(site, monkeypatch):
    monkeypatch.setattr(round_handler, "load_client_records", fail_with(AssertionError("read")))
    content = site.content()
    content["config"]["backbone-fingerprint"] = "0" * 64
    refused(handle_train(site.message(content), site.context()), ClientFailure.BACKBONE_DIFFERS)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineError("couples records"), ClientFailure.PRIVACY),
        (AccountingError("in doubt"), ClientFailure.PRIVACY),
        (round_handler.TrainingError("moved"), ClientFailure.PRIVACY),
        (DataError("no such file"), ClientFailure.DATA),
        (ModelError("does not fit"), ClientFailure.MODEL),
        (MemoryError(CANARY), ClientFailure.OUT_OF_MEMORY),
        (torch.OutOfMemoryError(CANARY), ClientFailure.OUT_OF_MEMORY),
        (RuntimeError(CANARY), ClientFailure.INTERNAL),
        (ValueError(CANARY), ClientFailure.INTERNAL),
        (KeyError(CANARY), ClientFailure.INTERNAL),
        (UnicodeDecodeError("utf-8", CANARY.encode(), 0, 1, CANARY), ClientFailure.INTERNAL),
        (ExceptionGroup(CANARY, [ValueError(CANARY)]), ClientFailure.INTERNAL),
    ],
)
@pytest.mark.parametrize("place", ["load_client_records", "open_session", "train_round"])
def test_an_exception_becomes_a_code_wherever_it_is_raised(site, monkeypatch, place, error, code):
    monkeypatch.setattr(round_handler, place, fail_with(error))
    refused(handle_train(site.message(), site.context()), code)


@pytest.mark.parametrize("error_type", [RuntimeError, ValueError, KeyError, OSError, TypeError])
def test_no_word_of_an_unexpected_exception_leaves_or_is_logged(
    site, monkeypatch, caplog, capfd, error_type
):
    """Its text may quote a record; a cause and a context may as well."""

    def fail(*_args):
        try:
            raise error_type(CANARY)
        except error_type as cause:
            raise error_type(f"while reading {CANARY}") from cause

    monkeypatch.setattr(round_handler, "train_round", fail)
    with caplog.at_level(logging.DEBUG):
        reply = handle_train(site.message(), site.context())
    refused(reply, ClientFailure.INTERNAL)
    assert error_type.__name__ in caplog.text and f"in fail, {__file__}:" in caplog.text
    assert not any(record.exc_info for record in caplog.records)
    out, err = capfd.readouterr()
    assert CANARY not in caplog.text + out + err


def test_the_reason_of_a_known_failure_is_in_the_clients_own_log(site, caplog):
    with caplog.at_level(logging.ERROR):
        handle_train(site.message(), site.context(data__min_records=RECORDS + 1))
    assert f"data.min-records asks for {RECORDS + 1}" in caplog.text
    assert f" {RECORDS} " not in caplog.text


def test_an_engine_that_is_wrong_on_this_model_stops_the_client(site, monkeypatch):
    monkeypatch.setattr(session_module, "check_engine", fail_with(EngineError("couples")))
    context = site.context()
    refused(handle_train(site.message(), context), ClientFailure.PRIVACY)
    assert charged(context) == 0


def drop(key):
    def change(content: RecordDict) -> None:
        del content[key]

    return change


def put(key, record):
    def change(content: RecordDict) -> None:
        content[key] = record

    return change


def plan_record(**changes):
    record = PLAN.to_record()
    for key, value in changes.items():
        record[key.replace("_", "-")] = value
    return record


MALFORMED = {
    "no arrays": drop("arrays"),
    "no config": drop("config"),
    "no plan": drop(ROUND_PLAN_KEY),
    "arrays are metrics": put("arrays", MetricRecord({"a": 1})),
    "config is metrics": put("config", MetricRecord({"a": 1})),
    "no fingerprint": put("config", ConfigRecord({})),
    "empty plan": put(ROUND_PLAN_KEY, ConfigRecord({})),
    "surplus in plan": put(ROUND_PLAN_KEY, plan_record(clip_norm=100.0)),
    "unknown mode": put(ROUND_PLAN_KEY, plan_record(mode="C")),
    "no steps": put(ROUND_PLAN_KEY, plan_record(local_steps=0)),
    "odd steps": put(ROUND_PLAN_KEY, plan_record(local_steps=3)),
    "negative steps": put(ROUND_PLAN_KEY, plan_record(local_steps=-2)),
    "steps as text": put(ROUND_PLAN_KEY, plan_record(local_steps="2")),
    "no JSON": put(ROUND_PLAN_KEY, plan_record(layer_modes="{")),
    "JSON list": put(ROUND_PLAN_KEY, plan_record(layer_modes="[]")),
    "unknown layer mode": put(ROUND_PLAN_KEY, plan_record(layer_modes='{"x": ["A"]}')),
}


@pytest.mark.parametrize("what", sorted(MALFORMED))
def test_a_malformed_message_is_refused_and_costs_nothing(site, what):
    content = site.content()
    MALFORMED[what](content)
    context = site.context()
    refused(handle_train(site.message(content), context), ClientFailure.MESSAGE)
    assert charged(context) == 0


def test_an_adapter_that_does_not_fit_is_refused(site):
    content = site.content()
    arrays = dict(content["arrays"])
    name = next(iter(arrays))
    for change in ({name: Array(np.zeros((1, 1), np.float32))}, {"unknown": arrays[name]}):
        content["arrays"] = ArrayRecord({**arrays, **change})
        refused(handle_train(site.message(content), site.context()), ClientFailure.MODEL)


@pytest.mark.parametrize(
    "spoilt",
    [
        Array("float32", (2, 32), "numpy.ndarray", b"no numpy file"),
        Array("float32", (2, 32), "pickle", b""),
    ],
)
def test_arrays_that_cannot_be_read_are_a_malformed_message(site, spoilt):
    content = site.content()
    arrays = dict(content["arrays"])
    content["arrays"] = ArrayRecord({**arrays, next(iter(arrays)): spoilt})
    context = site.context()
    refused(handle_train(site.message(content), context), ClientFailure.MESSAGE)
    assert charged(context) == 0


scalars = st.one_of(
    st.integers(-3, 7), st.floats(), st.booleans(), st.text(max_size=5), st.binary(max_size=5),
    st.sampled_from(["A", "both", "sgd", "{}", '{"": "A"}', "null"]),
)  # fmt: skip
plans = st.dictionaries(st.sampled_from([*PLAN.to_record(), "surplus"]), scalars, max_size=4)


@examples(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=plans, dropped=st.sets(st.sampled_from(["arrays", "config", ROUND_PLAN_KEY])))
def test_whatever_arrives_there_is_a_reply(site, changes, dropped):
    content = site.content()
    content[ROUND_PLAN_KEY] = ConfigRecord({**PLAN.to_record(), **changes})
    try:
        RoundPlan.from_record(content[ROUND_PLAN_KEY])
        readable = not dropped
    except ValueError:
        readable = False
    for key in dropped:
        del content[key]
    reply = handle_train(site.message(content), site.context(privacy__mode="none"))
    if readable:
        assert reply.has_content() or reply.error.code == ClientFailure.BUDGET_EXHAUSTED
    else:
        refused(reply, ClientFailure.MESSAGE)


# What stays in the process.


def test_virtual_clients_do_not_leak_into_each_other(site):
    """One process plays many clients: client 2's reply must not know whether 1 was here."""
    alone = handle_train(site.message(), site.context(1, **SEEDED))
    forget_process()
    first = handle_train(site.message(mode="both"), site.context(0, **SEEDED))
    after = handle_train(site.message(), site.context(1, **SEEDED))
    assert same(alone, after)
    assert json.dumps(dict(alone.content["privacy"])) == json.dumps(dict(after.content["privacy"]))
    assert not same(first, handle_train(site.message(mode="both"), site.context(1, **SEEDED)))


def test_a_client_that_fails_leaves_nothing_behind_either(site, monkeypatch):
    alone = handle_train(site.message(), site.context(1, **SEEDED))
    train_round = round_handler.train_round

    def train_and_fail(*args):
        train_round(*args)
        raise RuntimeError(CANARY)

    with monkeypatch.context() as patch:
        patch.setattr(round_handler, "train_round", train_and_fail)
        assert handle_train(site.message(), site.context(0, **SEEDED)).has_error()
    assert same(alone, handle_train(site.message(), site.context(1, **SEEDED)))


def test_virtual_clients_do_not_leak_through_dropout(site):
    changes = {**SEEDED, "lora__lora_dropout": 0.5}
    torch.manual_seed(0)
    alone = handle_train(site.message(mode="both", local_steps=4), site.context(1, **changes))
    forget_process()
    torch.manual_seed(0)
    handle_train(site.message(mode="both", local_steps=4), site.context(0, **changes))
    after = handle_train(site.message(mode="both", local_steps=4), site.context(1, **changes))
    assert same(alone, after)


def test_the_backbone_is_built_once_per_process(site, monkeypatch):
    built = []
    build = session_module.build_task_model

    def count(*args, **kwargs):
        built.append(args)
        return build(*args, **kwargs)

    monkeypatch.setattr(session_module, "build_task_model", count)
    for partition in range(3):
        context = site.context(partition)
        for server_round in (1, 2):
            reply = handle_train(site.message(server_round=server_round), context)
            assert reply.has_content()
    assert len(built) == 1
    assert handle_train(site.message(), site.context(lora__r=3)).has_error()  # another model
    assert len(built) == 2


# Where the noise comes from.


def test_noise_is_secure_by_default(site):
    """The same message twice: whoever can reproduce the noise can subtract it."""
    torch.manual_seed(0)
    np.random.seed(0)
    one = handle_train(site.message(), site.context(0))
    torch.manual_seed(0)
    np.random.seed(0)
    two = handle_train(site.message(), site.context(0))
    first, second = update_of(one), update_of(two)
    for name in first:
        if name.endswith("lora_B.weight"):
            # Not a few different bits: the noise itself is another one.
            correlation = np.corrcoef(first[name].ravel(), second[name].ravel())[0, 1]
            assert abs(correlation) < 0.9
        assert not np.array_equal(first[name], second[name])


def test_the_test_seed_reproduces_a_round_and_says_that_it_is_not_secure(site, caplog):
    with caplog.at_level(logging.WARNING):
        one = handle_train(site.message(), site.context(0, **SEEDED))
    assert "NOT PRIVATE" in caplog.text
    forget_process()
    assert same(one, handle_train(site.message(), site.context(0, **SEEDED)))
    assert one.content["privacy"]["secure-noise"] is False
    other_round = handle_train(site.message(server_round=2), site.context(0, **SEEDED))
    other_seed = handle_train(site.message(), site.context(0, privacy__insecure_test_seed=4))
    assert not same(one, other_round) and not same(one, other_seed)


def test_test_streams_differ_by_seed_partition_and_round(site):
    """A stream that meets two different inputs gives their difference away."""
    streams = {
        tuple(
            _source(
                site.settings(privacy__insecure_test_seed=seed), site.context(part), round_
            ).words(4)
        )
        for seed in (0, 1)
        for part in (0, 1, 2)
        for round_ in (1, 2)
    }
    assert len(streams) == 12
