"""AS-LoRA: the choice, what drives it, and what it must not depend on."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from strategies import PRIVACY_KEY, ROUND_PLAN_KEY, ASLoRA, RoundPlan, StrategySettings
from strategies.selection import FactorChoice, group_of
from tests.fake_grid import FakeGrid

BLOCKS = 4
SHAPES = {
    f"base_model.model.blocks.{block}.attn.{module}.lora_{factor}.weight": shape
    for block in range(BLOCKS)
    for module in ("qkv", "proj")
    for factor, shape in (("A", (2, 6)), ("B", (6, 2)))
}


def adapter() -> ArrayRecord:
    return ArrayRecord({n: Array(np.zeros(s, np.float32)) for n, s in SHAPES.items()})


def client(useful, *, noise: float = 0.0, seed: int = 0, state_noise: bool = True):
    """A client whose gradient on useful tensors is 1 everywhere, and 0 on useless ones."""
    generator = np.random.default_rng(seed)

    def handle(message: Message, _context) -> Message:
        plan = RoundPlan.from_record(message.content[ROUND_PLAN_KEY])
        update = {}
        for name in plan.uploaded(SHAPES):
            mean_gradient = np.full(SHAPES[name], -float(useful(name)))
            mean_gradient += (
                noise / math.sqrt(plan.local_steps) * generator.standard_normal(SHAPES[name])
            )
            change = -plan.learning_rate(name) * plan.local_steps * mean_gradient
            update[name] = Array(change.astype(np.float32))
        records = {"arrays": ArrayRecord(update), "metrics": MetricRecord({"num-examples": 10})}
        if state_noise:
            records[PRIVACY_KEY] = ConfigRecord({"noise-std": noise})
        return Message(RecordDict(records), reply_to=message)

    return handle


def train(strategy: ASLoRA, clients, rounds: int):
    grid = FakeGrid(clients)
    strategy.start(grid, adapter(), num_rounds=rounds)
    return grid


def block_of(name: str) -> int:
    return int(name.split("blocks.")[1].split(".")[0])


def test_warm_up_is_tied_and_starts_with_b():
    strategy = ASLoRA(num_rounds=40, local_steps=4)
    grid = FakeGrid([client(lambda name: True)] * 2)
    strategy.start(grid, adapter(), num_rounds=4)
    plans = [RoundPlan.from_record(m.content[ROUND_PLAN_KEY]) for m in grid.sent[::2]]
    assert strategy.warm_up == 4
    for plan, factor in zip(plans, "BABA", strict=True):
        assert {name.split("lora_")[1][0] for name in plan.uploaded(SHAPES)} == {factor}


@pytest.mark.parametrize("score", ["debiased", "pairwise"])
def test_the_choice_finds_the_useful_factor(score):
    """A useless in the first half of the blocks, B in the second; noise as large as the signal."""

    def useful(name: str) -> bool:
        return ("lora_B" in name) == (block_of(name) < BLOCKS // 2)

    strategy = ASLoRA(num_rounds=60, local_steps=4, score=score, seed=1)
    clients = [client(useful, noise=1.0, seed=seed) for seed in range(4)]
    grid = train(strategy, clients, 60)
    plans = [RoundPlan.from_record(m.content[ROUND_PLAN_KEY]) for m in grid.sent[::4]]
    late = plans[-30:]
    right = [useful(name) for plan in late for name in plan.uploaded(SHAPES)]
    assert np.mean(right) > 0.9
    for group, seen in strategy.choice.scores().items():
        assert (seen["B"] > seen["A"]) == (block_of(group + ".") < BLOCKS // 2)


def test_each_round_sends_one_factor_per_layer_and_keeps_the_other():
    strategy = ASLoRA(num_rounds=6, local_steps=2, granularity="module", exploration=0.5)
    grid = train(strategy, [client(lambda name: True, seed=s) for s in range(2)], 6)
    sent = {tuple(sorted(reply.content["arrays"])) for reply in grid.received}
    for names in sent:
        assert len(names) == len(SHAPES) // 2
        assert len({name.split(".lora_")[0] for name in names}) == len(names)
    assert len(sent) > 2  # with exploration a half the choice is a coin


def test_blocks_share_one_choice_and_modules_do_not():
    assert group_of("m.layers.0.blocks.1.attn.qkv.lora_A.weight", "block") == "m.layers.0.blocks.1"
    assert group_of("m.blocks.3.attn.qkv.lora_B.weight", "module") == "m.blocks.3.attn.qkv"
    assert group_of("m.encoder.layer.11.attention.self.query.lora_A.weight", "block") == (
        "m.encoder.layer.11"
    )
    assert group_of("m.proj.lora_A.weight", "block") == "m.proj"
    strategy = ASLoRA(num_rounds=30, local_steps=2, exploration=0.5, seed=2)
    grid = train(strategy, [client(lambda name: True, seed=s) for s in range(2)], 30)
    plan = RoundPlan.from_record(grid.sent[-1].content[ROUND_PLAN_KEY])
    for block in range(BLOCKS):
        layers = [f"base_model.model.blocks.{block}.attn.{module}" for module in ("qkv", "proj")]
        assert len({plan.layer_modes.get(layer, plan.mode) for layer in layers}) == 1


def test_the_choice_is_a_function_of_what_was_sent():
    """Same privatised replies, same choices: nothing else of a client can reach the server."""

    def plans(extra) -> list[RoundPlan]:
        clients = [client(lambda name: True, noise=1.0, seed=s) for s in range(2)]

        def chatty(message, context):
            reply = clients[0](message, context)
            reply.content["metrics"] = MetricRecord({"num-examples": 10, **extra})
            return reply

        grid = train(ASLoRA(num_rounds=20, local_steps=2), [chatty, clients[1]], 20)
        return [RoundPlan.from_record(m.content[ROUND_PLAN_KEY]) for m in grid.sent]

    assert plans({}) == plans({"train-loss": 0.1, "raw-gradient-norm": 7.0})


def test_noise_that_nobody_states_leaves_the_pairwise_score(caplog):
    strategy = ASLoRA(num_rounds=4, local_steps=2, score="debiased")
    clients = [client(lambda name: True, seed=s, state_noise=s == 0) for s in range(2)]
    with caplog.at_level(logging.INFO, logger="flwr"):
        train(strategy, clients, 2)
    assert "this round's scores are pairwise" in caplog.text
    assert "pairwise scores: median" in caplog.text


@pytest.mark.parametrize("stated", [1e300, math.inf, math.nan, -1.0, "much", 1])
def test_a_client_that_states_nonsense_does_not_end_the_run(stated):
    honest = client(lambda name: True, seed=1)

    def liar(message, context):
        reply = honest(message, context)
        reply.content[PRIVACY_KEY] = ConfigRecord({"noise-std": stated})
        return reply

    strategy = ASLoRA(num_rounds=4, local_steps=2)
    train(strategy, [honest, liar], 4)
    for seen in strategy.choice.scores().values():
        assert len(seen) == 2
        assert all(math.isfinite(score) for score in seen.values())


def test_scores_choice_and_signal_to_noise_are_logged(caplog):
    strategy = ASLoRA(num_rounds=4, local_steps=2)
    clients = [client(lambda name: True, noise=0.5, seed=s) for s in range(2)]
    with caplog.at_level(logging.INFO, logger="flwr"):
        train(strategy, clients, 2)
    assert "Round 1: A in 0 and B in 4 groups; debiased scores: median" in caplog.text
    assert "signal to noise" in caplog.text


def test_adaptive_steps_have_no_debiased_score():
    with pytest.raises(ValueError, match="needs optimizer 'sgd'"):
        ASLoRA(score="debiased", optimizer="adamw")
    assert ASLoRA(optimizer="adamw").score == "auto"


def test_settings_reach_the_strategy():
    wishes = StrategySettings(
        method="as-lora", num_rounds=50, granularity="module", score="pairwise", ema=0.5,
        exploration=0.1,
    )  # fmt: skip
    strategy = ASLoRA.from_settings(wishes)
    assert (strategy.warm_up, strategy.granularity, strategy.score) == (5, "module", "pairwise")
    assert (strategy.ema, strategy.exploration) == (0.5, 0.1)


# --- the choice by itself --------------------------------------------------------------------


def choice_of(**changes) -> FactorChoice:
    return FactorChoice(["g"], **{"warm_up": 2, **changes})


def test_probability_follows_the_formula():
    choice = choice_of(exploration=0.0)
    choice.observe("g", "A", 3.0)
    choice.observe("g", "B", 1.0)
    drive = 2.0 / (4.0 + 1e-8)
    for server_round in (3, 20, 200):
        tau = max(0.1, 0.95 ** (server_round - 2))
        assert choice.temperature(server_round) == tau
        assert choice.probability_of_a("g", server_round) == pytest.approx(
            1 / (1 + math.exp(-drive / tau))
        )


def test_a_factor_never_observed_comes_first():
    choice = choice_of()
    assert choice.probability_of_a("g", 5) == 0  # B first
    choice.observe("g", "B", 1.0)
    assert choice.probability_of_a("g", 5) == 1
    choice.observe("g", "A", -1.0)
    assert choice.probability_of_a("g", 5) == pytest.approx(1 / (1 + math.exp(1 / 0.95**3)))


def test_moving_average_starts_at_the_first_score():
    choice = choice_of(ema=0.9)
    choice.observe("g", "A", 10.0)
    choice.observe("g", "A", 0.0)
    assert choice.scores()["g"]["A"] == pytest.approx(9.0)


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.integers(3, 500), st.floats(0, 0.5))
def test_probabilities_keep_the_exploration_floor(a, b, server_round, floor):
    choice = choice_of(exploration=floor)
    choice.observe("g", "A", a)
    choice.observe("g", "B", b)
    probability = choice.probability_of_a("g", server_round)
    assert floor <= probability <= 1 - floor


def test_draws_are_seeded_by_round_and_go_on_from_a_saved_state():
    groups = [f"g{i}" for i in range(30)]

    def fresh(seed=0):
        return FactorChoice(groups, warm_up=2, seed=seed, exploration=0.2)

    one = fresh()
    for group in groups:
        one.observe(group, "A", 1.0)
        one.observe(group, "B", 1.0)
    other = fresh()
    other.load_state_dict(one.state_dict())
    assert [one.choose(t) for t in range(1, 9)] == [other.choose(t) for t in range(1, 9)]
    assert one.choose(5) != one.choose(6)
    third = fresh(seed=1)
    third.load_state_dict(one.state_dict())
    assert third.choose(5) != one.choose(5)
    with pytest.raises(ValueError, match="other groups"):
        FactorChoice(["x"], warm_up=2).load_state_dict(one.state_dict())
