"""Every failure is a reply with a fixed code and text, whatever arrives and whatever breaks."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

import client_app.session as session_module
from client_app import private_round, round_handler
from client_app.local_training import TrainingError
from client_app.round_handler import handle_train
from federation.messages import ClientFailure
from privacy import AccountingError, EngineError
from strategies import ROUND_PLAN_KEY, WIRE_KEY, RoundPlan
from task.errors import DataError, ModelError
from tests.client_app.conftest import PLAN, everything
from tests.client_app.replies import CANARY, RECORDS, charged, fail_with, failure_of

CPU_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"


@pytest.mark.parametrize(
    ("changes", "node_config", "code"),
    [
        ({"strategy__lr_a": -1.0}, None, ClientFailure.SETTINGS),
        ({"strategy__no_such": 1}, None, ClientFailure.SETTINGS),
        ({"device": "tpu"}, None, ClientFailure.SETTINGS),
        ({}, {"partition-id": 0, "num-partitions": 3, "device": "tpu"}, ClientFailure.SETTINGS),
        ({}, {"data-path": f"/no/such/{CANARY}.npz"}, ClientFailure.POLICY),
        ({}, {"data-path": "/data.npz", "policy": f"/no/{CANARY}.toml"}, ClientFailure.POLICY),
        ({}, {"partition-id": 0, "num-partitions": 3, "policy": "/p"}, ClientFailure.POLICY),
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
    assert failure_of(handle_train(site.message(), context)) is code
    assert charged(context) == 0


def test_another_backbone_is_refused_before_data_are_read(site, monkeypatch):
    monkeypatch.setattr(round_handler, "load_client_records", fail_with(AssertionError("read")))
    content = site.content()
    content["config"]["backbone-fingerprint"] = "0" * 64
    reply = handle_train(site.message(content), site.context())
    assert failure_of(reply) is ClientFailure.BACKBONE_DIFFERS


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineError("couples records"), ClientFailure.PRIVACY),
        (AccountingError("in doubt"), ClientFailure.PRIVACY),
        (TrainingError("moved"), ClientFailure.PRIVACY),
        (DataError("no such file"), ClientFailure.DATA),
        (ModelError("does not fit"), ClientFailure.MODEL),
        (MemoryError(CANARY), ClientFailure.OUT_OF_MEMORY),
        (torch.OutOfMemoryError(CANARY), ClientFailure.OUT_OF_MEMORY),
        (RuntimeError(CPU_MEMORY), ClientFailure.OUT_OF_MEMORY),
        (RuntimeError(CANARY), ClientFailure.INTERNAL),
        (ValueError(CANARY), ClientFailure.INTERNAL),
        (KeyError(CANARY), ClientFailure.INTERNAL),
        (UnicodeDecodeError("utf-8", CANARY.encode(), 0, 1, CANARY), ClientFailure.INTERNAL),
        (ExceptionGroup(CANARY, [ValueError(CANARY)]), ClientFailure.INTERNAL),
    ],
)
@pytest.mark.parametrize("place", ["load_client_records", "open_session", "train_round"])
def test_an_exception_becomes_a_code_wherever_it_is_raised(site, monkeypatch, place, error, code):
    module = private_round if place == "train_round" else round_handler
    monkeypatch.setattr(module, place, fail_with(error))
    assert failure_of(handle_train(site.message(), site.context())) is code


def test_torch_still_words_a_lack_of_cpu_memory_as_the_client_expects(site, monkeypatch):
    """It raises a plain RuntimeError, which is known by its text alone."""
    monkeypatch.setattr(
        private_round, "train_round", lambda *_args: torch.empty(2**60, dtype=torch.uint8)
    )
    reply = handle_train(site.message(), site.context())
    assert failure_of(reply) is ClientFailure.OUT_OF_MEMORY


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

    monkeypatch.setattr(private_round, "train_round", fail)
    with caplog.at_level(logging.DEBUG):
        reply = handle_train(site.message(), site.context())
    assert failure_of(reply) is ClientFailure.INTERNAL
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
    assert failure_of(handle_train(site.message(), context)) is ClientFailure.PRIVACY
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
    "no version": drop(WIRE_KEY),
    "damaged on the way": put("arrays", ArrayRecord()),
    "unknown dtype": lambda content: content[WIRE_KEY].update({"dtype": "int4"}),
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
    assert failure_of(handle_train(site.message(content), context)) is ClientFailure.MESSAGE
    assert charged(context) == 0


def test_an_adapter_that_does_not_fit_is_refused(site):
    content = site.content()
    arrays = dict(content["arrays"])
    name = next(iter(arrays))
    for change in ({name: Array(np.zeros((1, 1), np.float32))}, {"unknown": arrays[name]}):
        content["arrays"] = ArrayRecord({**arrays, **change})
        content[WIRE_KEY] = everything(content["arrays"])
        reply = handle_train(site.message(content), site.context())
        assert failure_of(reply) is ClientFailure.MODEL


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
    content[WIRE_KEY] = everything(content["arrays"])
    context = site.context()
    assert failure_of(handle_train(site.message(content), context)) is ClientFailure.MESSAGE
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
        assert failure_of(reply) is ClientFailure.MESSAGE
