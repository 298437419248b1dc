"""Client-level privacy through the strategies: only a round's noised sum has any effect."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
from flwr.app import Error, Message

from privacy import ClientLevelMechanism, ClientLevelPlan, clip_update
from strategies import STRATEGIES, ASLoRA, LALoRA, ReleasedMean, as_lora
from strategies.client_level import ReleasedEnergies
from tests.fake_grid import FakeGrid
from tests.strategies.random_clients import LAYERS, PRODUCTS, Client, begin, bits

PLAN = ClientLevelPlan(
    max_update_norm=0.5,
    sample_rate=1.0,
    participation="public",
    registered_clients=8,
    noise_multiplier=1.0,
    rounds=4,
    target_delta=1e-5,
)
METHODS = sorted(set(STRATEGIES) - set(PRODUCTS))
SPARE = {"min_train_nodes": 1, "min_available_nodes": 1, "local_steps": 2}


def make(method: str, plan: ClientLevelPlan = PLAN, *, seed: int = 1, **changes):
    mechanism = ClientLevelMechanism(plan, insecure_test_seed=seed)
    return STRATEGIES[method](client_level=mechanism, **{**SPARE, **changes}), mechanism


def train(strategy, handlers, rounds: int):
    """The adapter before round 1 and after each, and the grid; who is silent is not waited for."""
    history, grid = [], FakeGrid(handlers)
    strategy.start(
        grid,
        begin(),
        num_rounds=rounds,
        timeout=0.3,
        evaluate_fn=lambda _, arrays: history.append({n: a.numpy() for n, a in arrays.items()}),
    )
    return history, grid


def silent(_message, _context):
    return None


def failing(message, _context):
    return Message(Error(code=1099, reason="no"), reply_to=message)


def change(history, place: int) -> dict[str, np.ndarray]:
    before, after = history[place - 1], history[place]
    return {n: after[n].astype(np.float64) - before[n].astype(np.float64) for n in after}


def norm(values) -> float:
    return float(np.sqrt(sum(np.square(value).sum() for value in values.values())))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "fed-svd"])
@pytest.mark.parametrize("away", [silent, failing])
def test_one_client_more_or_less_moves_the_round_by_its_bound_over_the_constant(method, away):
    """Add-one sensitivity through the real strategy: same noise, client 3 there or not."""
    histories = []
    for third in (Client(2, size=50.0), away):
        strategy, _ = make(method)
        clients = [Client(0), Client(1), third]
        histories.append(train(strategy, clients, 1)[0])
    moved = {n: histories[0][1][n].astype(np.float64) - histories[1][1][n] for n in histories[0][1]}
    assert norm(moved) == pytest.approx(0.5 / 8, rel=1e-4)  # float32 adapters
    assert norm(change(histories[1], 1)) > 0


def test_the_mean_is_of_clipped_updates_over_the_constant_whoever_answers():
    """A long update is clipped again at the server: its client may lie."""
    strategy, mechanism = make("dp-lora", dataclasses.replace(PLAN, noise_multiplier=1e-12))
    clients = [Client(0, size=0.001), Client(1, size=1e4), failing]
    history, _ = train(strategy, clients, 1)
    expected: dict[str, np.ndarray] = {}
    for client in clients[:2]:
        update = {n: client.ended[1][n] - client.began[1][n] for n in client.began[1]}
        for name, value in clip_update(update, 0.5).items():
            expected[name] = expected.get(name, 0.0) + value / 8
    got = change(history, 1)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], atol=3e-7)
    assert mechanism.rounds_released == 1


class Fixed(ClientLevelMechanism):
    """Releases the same whatever was summed: only this may reach the state."""

    def release(self, server_round, sums):
        self.rounds_released += 1
        generator = np.random.default_rng(server_round)
        return {n: 0.1 * generator.standard_normal(sums[n].shape) for n in sorted(sums)}


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_the_released_mean_reaches_the_state(method, caplog):
    """Pairwise scores, weights, counts, norms: any use of single updates would show here."""
    outcomes = []
    for clients in (
        [Client(0), Client(1), Client(2)],
        [Client(3, size=40.0), silent, failing],
        [silent, silent, silent],
    ):
        strategy = STRATEGIES[method](client_level=Fixed(PLAN, insecure_test_seed=1), **SPARE)
        grid, start = FakeGrid(clients), begin()
        seen: list[dict[str, bytes]] = []
        with caplog.at_level(logging.INFO, logger="flwr"):
            result = strategy.start(
                grid, start, num_rounds=4, timeout=0.2,
                evaluate_fn=lambda _, a, seen=seen: seen.append(
                    bits({n: v.numpy() for n, v in a.items()})
                ),
            )  # fmt: skip
        choice = strategy.choice.state_dict() if isinstance(strategy, ASLoRA) else None
        metrics = {n: dict(m) for n, m in result.train_metrics_clientapp.items()}
        outcomes.append((seen, choice, metrics))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert len(set(map(str, outcomes[0][0]))) == 5
    assert "more than half of the weight" not in caplog.text


def test_a_round_that_asks_nobody_is_noised_applied_and_counted():
    plan = dataclasses.replace(PLAN, sample_rate=1e-9, participation="secret")
    strategy, mechanism = make("la-lora", plan)
    history, grid = train(strategy, [Client(0), Client(1)], 3)
    assert grid.sent == []
    assert mechanism.rounds_released == 3
    for place in (1, 2, 3):
        moved = change(history, place)
        assert all(np.abs(value).min() > 0 for value in moved.values())
        noise = np.concatenate([value.ravel() for value in moved.values()])
        # Standard deviation sigma S / (q N), within 4 standard errors.
        relative = np.sqrt(np.mean(noise**2)) / mechanism.noise_std
        assert abs(relative - 1) < 4 / np.sqrt(2 * noise.size)


def test_clients_are_asked_by_the_mechanisms_coins_not_by_a_fixed_number():
    plan = dataclasses.replace(PLAN, sample_rate=0.5)
    strategy, mechanism = make("ffa-lora", plan)
    _, grid = train(strategy, [Client(i % 5) for i in range(8)], 4)
    asked = [[], [], [], []]
    for message in grid.sent:
        asked[message.content["round-plan"]["server-round"] - 1].append(
            message.metadata.dst_node_id
        )
    expected = [list(1 + np.flatnonzero(mechanism.draw(r, 8))) for r in (1, 2, 3, 4)]
    assert asked == expected
    assert len({len(nodes) for nodes in asked}) > 1


def test_the_noise_of_a_round_is_drawn_once_however_often_the_mean_is_read():
    mechanism = ClientLevelMechanism(PLAN)
    mean = ReleasedMean(mechanism, 1, {"a": (3, 2)})
    mean.add({"a": np.ones((3, 2), np.float32)}, 1.0)
    first, second = mean.mean(), mean.mean()
    assert np.array_equal(first["a"], second["a"]) and mechanism.rounds_released == 1
    with pytest.raises(RuntimeError, match="released already"):
        mean.add({"a": np.ones((3, 2), np.float32)}, 1.0)
    with pytest.raises(ValueError, match="weigh the same"):
        ReleasedMean(mechanism, 1, {"a": (1,)}).add({"a": np.ones(1, np.float32)}, 2.0)


def test_scores_look_at_no_single_update(monkeypatch):
    def never(*_args, **_kwargs):
        raise AssertionError("a single update was looked at")

    monkeypatch.setattr(as_lora.UpdateEnergies, "add", never)
    monkeypatch.setattr(as_lora, "stated_noise", never)
    strategy, _ = make("as-lora", optimizer="adamw")
    train(strategy, [Client(0), Client(1)], 3)
    assert strategy.last_scores


def test_scores_from_the_released_mean_are_unbiased():
    """4,000 noised means of a known change; mean within 4 standard errors (fixed seed)."""
    generator = np.random.default_rng(0)
    truth = {
        "x.lora_A.weight": generator.standard_normal((2, 5)),
        "x.lora_B.weight": np.ones((4, 2)),
    }
    groups = dict.fromkeys(truth, "x")
    lr = dict.fromkeys(truth, 0.1)
    values = []
    plan = dataclasses.replace(PLAN, noise_multiplier=0.7 / 0.5 * 8)  # 0.7 on each value
    energies = ReleasedEnergies(groups, ClientLevelMechanism(plan))
    for _ in range(4_000):
        noised = {n: v + 0.7 * generator.standard_normal(v.shape) for n, v in truth.items()}
        values.append(energies.debiased(noised, lr, 5, low_pass=False)["x"])
    exact = sum(float(np.vdot(v, v)) for v in truth.values()) / 0.5**2
    assert abs(np.mean(values) - exact) < 4 * np.std(values) / np.sqrt(4_000)
    floors = energies.noise_floors(noised, 5, low_pass=False)
    assert floors["x"] == pytest.approx(18 * 0.49 / 0.25)


def test_scores_of_mean_gradients_take_off_the_noise_of_gradients():
    """Where the server steps by a noised mean gradient; mean within 4 standard errors."""

    class OfGradients(ClientLevelMechanism):
        of_gradients = True

    generator = np.random.default_rng(1)
    gradient, name = generator.standard_normal((4, 2)), "x.lora_B.weight"
    plan = dataclasses.replace(PLAN, noise_multiplier=0.7 / 0.5 * 8)
    energies = ReleasedEnergies({name: "x"}, OfGradients(plan))
    values = []
    for _ in range(4_000):
        change = -0.25 * (gradient + 0.7 * generator.standard_normal((4, 2)))
        values.append(energies.debiased({name: change}, {name: 0.25}, 1, low_pass=False)["x"])
    exact = float(np.vdot(gradient, gradient))
    assert abs(np.mean(values) - exact) < 4 * np.std(values) / np.sqrt(4_000)


@pytest.mark.parametrize("method", PRODUCTS)
def test_methods_that_need_single_factors_are_refused(method):
    with pytest.raises(ValueError, match="noised sum only"):
        make(method)


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("la-lora", {"weighting": "public-counts"}, "weighting must be 'uniform'"),
        ("la-lora", {"trim": 0.2}, "trim must be 0.0"),
        ("la-lora", {"fraction_train": 0.5}, "fraction_train must be 1.0"),
        ("la-lora", {"low_pass": True}, "low_pass must be False"),
        ("as-lora", {"score": "pairwise"}, "'pairwise' looks at single updates"),
        ("as-lora", {"score": "client"}, "'client' looks at single updates"),
    ],
)
def test_what_looks_at_single_clients_is_refused(method, changes, words):
    with pytest.raises(ValueError, match=words):
        make(method, **changes)


def test_the_filter_for_noised_gradients_is_off_by_default_here():
    assert LALoRA(**SPARE).low_pass and not make("la-lora")[0].low_pass


def test_the_summary_names_unit_and_adversary(caplog):
    with caplog.at_level(logging.INFO, logger="flwr"):
        make("la-lora")[0].summary()
    assert "Unit: one client with all its records" in caplog.text
    assert "not against the server" in caplog.text


def test_reproducible_noise_is_called_what_it_is(caplog):
    strategy, _ = make("ffa-lora")
    train(strategy, [Client(0), Client(1)], 1)
    assert not strategy.last_round.private
    assert "NOT PRIVATE" in caplog.text
    secure = STRATEGIES["ffa-lora"](client_level=ClientLevelMechanism(PLAN), **SPARE)
    train(secure, [Client(0), Client(1)], 1)
    assert secure.last_round.private


def test_all_layers_move_by_the_noised_mean():
    strategy, _ = make("dp-lora")
    history, _ = train(strategy, [Client(0), Client(1)], 1)
    moved = change(history, 1)
    assert all(
        np.abs(moved[f"{layer}.lora_{f}.weight"]).min() > 0 for layer in LAYERS for f in "AB"
    )
