"""What each method trains in each step, and what travels."""

from __future__ import annotations

import math

import pytest
from flwr.app import ConfigRecord
from hypothesis import given
from hypothesis import strategies as st

from strategies import DPLoRA, FFALoRA, LALoRA, RoLoRA, RoundPlan, kind_of, layer_of, layers_of

NAMES = [
    "base_model.model.blocks.0.attn.qkv.lora_A.weight",
    "base_model.model.blocks.0.attn.qkv.lora_B.weight",
    "base_model.model.blocks.1.attn.qkv.lora_A.weight",
    "base_model.model.blocks.1.attn.qkv.lora_B.weight",
    "base_model.model.head.weight",
    "base_model.model.head.bias",
]
HEAD = {"head"}


def kinds(names) -> set[str]:
    return {kind_of(name) for name in names}


def plan_of(**changes) -> RoundPlan:
    numbers = {
        "server_round": 1, "mode": "B", "local_steps": 4, "lr_a": 0.1, "lr_b": 0.2, "lr_head": 0.3,
    }  # fmt: skip
    return RoundPlan(**{**numbers, **changes})


def test_names_tell_factors_and_layers():
    assert [kind_of(name) for name in NAMES] == ["A", "B", "A", "B", "head", "head"]
    assert layers_of(NAMES) == (
        "base_model.model.blocks.0.attn.qkv",
        "base_model.model.blocks.1.attn.qkv",
    )
    assert layer_of(NAMES[-1]) == ""


@pytest.mark.parametrize(
    ("strategy", "by_round", "uploaded"),
    [
        (DPLoRA, {1: ["AB", "AB"], 2: ["AB", "AB"]}, {1: "AB", 2: "AB"}),
        (FFALoRA, {1: ["B", "B"], 2: ["B", "B"]}, {1: "B", 2: "B"}),
        (RoLoRA, {1: ["B", "B"], 2: ["A", "A"], 3: ["B", "B"]}, {1: "B", 2: "A", 3: "B"}),
        (LALoRA, {1: ["B", "A", "B", "A"], 2: ["B", "A"]}, {1: "AB", 2: "AB"}),
    ],
)
def test_active_factors_by_round_and_step(strategy, by_round, uploaded):
    """The methods' table in the shared notes; every one of them starts at B."""
    method = strategy(local_steps=4)
    for server_round, steps in by_round.items():
        plan = method.plan(server_round)
        for step, factors in enumerate(steps, start=1):
            assert kinds(plan.active(step, NAMES)) == set(factors) | HEAD
        assert kinds(plan.uploaded(NAMES)) == set(uploaded[server_round]) | HEAD


def test_a_frozen_head_is_neither_trained_nor_sent():
    plan = LALoRA(local_steps=2, train_head=False).plan(1)
    assert kinds(plan.active(1, NAMES)) == {"B"}
    assert kinds(plan.active(2, NAMES)) == {"A"}
    assert kinds(plan.uploaded(NAMES)) == {"A", "B"}


def test_a_single_alternating_step_would_be_refused():
    with pytest.raises(ValueError, match="even number of local steps, got 5"):
        LALoRA(local_steps=5)


def test_layers_can_differ():
    plan = plan_of(layer_modes={"base_model.model.blocks.1.attn.qkv": "A"}, train_head=False)
    assert plan.active(1, NAMES) == (NAMES[1], NAMES[2])
    assert plan.uploaded(NAMES) == (NAMES[1], NAMES[2])


def test_a_plan_describes_itself_in_a_word():
    assert plan_of(mode="alternate").describe() == "alternate"
    modes = {"one": "A", "two": "A"}
    assert plan_of(layer_modes=modes).describe() == "B (A in 2 layers)"


def test_learning_rates_decay_by_round_and_differ_by_factor():
    method = RoLoRA(lr_a=1.0, lr_b=2.0, lr_head=4.0, lr_decay=0.5)
    third = method.plan(3)
    assert [third.learning_rate(name) for name in (NAMES[0], NAMES[1], NAMES[4])] == [0.25, 0.5, 1]


def test_the_filter_is_la_loras_unless_asked_for():
    assert LALoRA().plan(1).low_pass
    assert not LALoRA(low_pass=False).plan(1).low_pass
    assert not DPLoRA().plan(1).low_pass
    assert DPLoRA(low_pass=True).plan(1).low_pass


@given(
    st.sampled_from(["A", "B", "both", "alternate"]),
    st.integers(1, 9),
    st.floats(1e-6, 10),
    st.booleans(),
    st.dictionaries(st.text(max_size=5), st.sampled_from(["A", "B", "both"]), max_size=3),
)
def test_plans_survive_the_wire(mode, rounds, rate, flag, layer_modes):
    plan = plan_of(
        mode=mode, server_round=rounds, lr_a=rate, train_head=flag, low_pass=not flag,
        layer_modes=layer_modes, optimizer="adamw",
    )  # fmt: skip
    assert RoundPlan.from_record(plan.to_record()) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "C"}, "mode must be one of"),
        ({"local-steps": 0}, "local_steps must be >= 1"),
        ({"local-steps": "4"}, "local_steps of a round plan must be int"),
        ({"server-round": True}, "server_round of a round plan must be int"),
        ({"optimizer": "lbfgs"}, "optimizer must be one of"),
        ({"layer-modes": "[]"}, "JSON object"),
        ({"surplus": 1}, "a round plan has"),
    ],
)
def test_spoilt_plans_are_refused(change, message):
    record = ConfigRecord({**dict(plan_of().to_record().items()), **change})
    with pytest.raises(ValueError, match=message):
        RoundPlan.from_record(record)


@pytest.mark.parametrize("rate", [-0.1, math.nan, math.inf, 3.402823466385289e38])
def test_a_rate_that_cannot_multiply_a_gradient_is_refused(rate):
    with pytest.raises(ValueError, match="lr_b must be from 0 to"):
        RoundPlan(server_round=1, mode="B", local_steps=1, lr_a=0.1, lr_b=rate, lr_head=0.1)
