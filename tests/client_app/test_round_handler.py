"""From a train message to its reply: what leaves a client, and what never does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import client_app.session as session_module
from client_app import private_round
from client_app.round_handler import handle_train
from privacy import PrivacyPlan, PrivacySettings
from strategies import ROUND_PLAN_KEY, STRATEGIES
from tests.client_app.conftest import PLAN
from tests.client_app.replies import RECORDS, update_of
from tests.federation.tiny import TRAIN_RECORDS

UNIFORM = {"strategy__weighting": "uniform"}


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
    assert set(reply.content) == {"arrays", "metrics", "privacy", "wire"}
    assert dict(reply.content["wire"]) == {
        "version": message.content["wire"]["version"], "rank": message.content["wire"]["rank"],
    }  # fmt: skip
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


def test_an_update_says_what_the_adapter_did_in_training(site, monkeypatch):
    """The server's tensor plus the update is the client's tensor, which then is put back."""
    before = site.server_model.adapter_state()
    trained = {}
    train_round = private_round.train_round

    def noted(plan, adapter, *others):
        update = train_round(plan, adapter, *others)
        trained.update({name: p.detach().clone() for name, p in adapter.items()})
        return update

    monkeypatch.setattr(private_round, "train_round", noted)
    reply = handle_train(site.message(), site.context())
    for name, value in update_of(reply).items():
        torch.testing.assert_close(trained[name] - before[name],
                                   torch.from_numpy(value), rtol=0, atol=0)  # fmt: skip
    model = session_module.open_session(site.settings(), torch.device("cpu")).task_model
    assert all(torch.equal(value, before[name]) for name, value in model.adapter_state().items())


def test_without_privacy_the_statement_promises_nothing(site):
    reply = handle_train(site.message(), site.context(privacy__mode="none"))
    assert reply.content["privacy"]["noise-multiplier"] == 0.0
