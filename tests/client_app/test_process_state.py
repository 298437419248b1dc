"""What stays in a process that plays many clients, and where their noise comes from."""

from __future__ import annotations

import gc
import json
import logging

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from torch.nn.parameter import UninitializedTensorMixin

import client_app.session as session_module
from client_app import private_round
from client_app.private_round import random_source
from client_app.round_handler import handle_train
from client_app.trace import MessageTrace
from privacy import Charge, PoissonSampler, PrivacyPlan, PrivateGradient, SeededTestSource
from privacy.record_pass import RecordPass
from strategies import GradientEnergies
from tests.client_app.conftest import forget_process
from tests.client_app.replies import CANARY, same, update_of

SEEDED = {"privacy__insecure_test_seed": 3}


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


OF_ONE_CLIENT = (
    PrivateGradient, PoissonSampler, PrivacyPlan, Charge, SeededTestSource, RecordPass,
    GradientEnergies, MessageTrace, torch.optim.Optimizer, Message, Context,
)  # fmt: skip


def objects_of_clients() -> list[object]:
    gc.collect()
    return [thing for thing in gc.get_objects() if isinstance(thing, OF_ONE_CLIENT)]


def look_for(tensors: list[torch.Tensor], others: list[object]) -> list[str]:
    """Everything of one client that is still in this process: its objects, and its numbers."""
    known = {id(thing) for thing in others}  # those of other tests
    found = [type(thing).__name__ for thing in objects_of_clients() if id(thing) not in known]
    for thing in gc.get_objects():
        if isinstance(thing, UninitializedTensorMixin):  # of some library; has no shape to ask for
            continue
        if isinstance(thing, torch.Tensor) and not any(thing is own for own in tensors):
            same_shape = [own for own in tensors if own.shape == thing.shape]
            if any(own.any() and torch.allclose(own, thing.float()) for own in same_shape):
                found.append(f"a tensor {tuple(thing.shape)}")
    return found


@pytest.mark.parametrize("failing", [False, True])
def test_nothing_of_a_client_is_left_in_the_process(site, monkeypatch, failing):
    """Looks: at every object that the garbage collector knows, after one client's round."""
    seen: list[torch.Tensor] = []
    others = objects_of_clients()
    train_round, step = private_round.train_round, PrivateGradient.step

    def noted_step(self, *args):
        released = step(self, *args)
        seen.extend(value.clone() for value in released.values())
        return released

    def noted_round(plan, adapter, *others):
        update = train_round(plan, adapter, *others)
        seen.extend(value.clone() for value in update.values())
        seen.extend(p.detach().clone() for n, p in adapter.items() if n in update)
        if failing:
            raise RuntimeError("after the last step")
        return update

    with monkeypatch.context() as patch:
        patch.setattr(private_round, "train_round", noted_round)
        patch.setattr(PrivateGradient, "step", noted_step)
        context = site.context(0)
        reply = handle_train(site.message(mode="both"), context)
        assert reply.has_error() is failing
        assert len(seen) > 10
        found = look_for(seen, others)
        assert "Context" in found  # the looking finds what is there
        del context, reply
    assert look_for(seen, others) == []


def test_a_client_that_fails_leaves_nothing_behind_either(site, monkeypatch):
    alone = handle_train(site.message(), site.context(1, **SEEDED))
    train_round = private_round.train_round

    def train_and_fail(*args):
        train_round(*args)
        raise RuntimeError(CANARY)

    with monkeypatch.context() as patch:
        patch.setattr(private_round, "train_round", train_and_fail)
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
            random_source(
                site.settings(privacy__insecure_test_seed=seed), site.context(part), round_
            ).words(4)
        )
        for seed in (0, 1)
        for part in (0, 1, 2)
        for round_ in (1, 2)
    }
    assert len(streams) == 12
