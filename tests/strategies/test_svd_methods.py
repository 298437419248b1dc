"""FedSVD, FedEx-LoRA, FLoRA and FlexLoRA against dense float64 algebra, round by round."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Message, RecordDict

from strategies import ROUND_PLAN_KEY, WIRE_KEY, FlexLoRA
from tests.strategies.random_clients import (
    FOLDING,
    HEAD,
    LAYERS,
    Client,
    assert_close,
    begin,
    bits,
    effective,
    factors,
    make,
    mean_of,
    mean_product,
    product,
    shares,
    train,
)

ALPHA = 6.0


@pytest.mark.parametrize("method", ["fed-svd", *FOLDING])
@pytest.mark.parametrize("weighting", ["uniform", "public-counts"])
@pytest.mark.parametrize("number", [1, 2, 5])
def test_the_weights_change_by_the_exact_mean_of_products(method, weighting, number):
    """``W_after = W_before + s (sum_k p_k B_k A_k - B A)``, merges of folds included."""
    clients = [Client(k) for k in range(number)]
    history, _ = train(make(method, number, weighting=weighting), clients, 5)
    p = shares(clients, weighting)
    for t in range(1, 6):
        before, after = history[t - 1], history[t]
        for layer in LAYERS:
            target = effective(before, layer) - product(before, layer)
            target = target + mean_product(clients, p, t, layer)
            assert_close(effective(after, layer), target)
        assert_close(after[HEAD], mean_of(clients, p, t, HEAD))


def test_fed_svd_keeps_a_orthonormal_and_sends_b_alone_up():
    clients = [Client(k) for k in range(3)]
    history, grid = train(make("fed-svd"), clients, 4)
    for before, after, t in zip(history, history[1:], range(1, 5), strict=False):
        for layer in LAYERS:
            b, a = factors(after, layer)
            np.testing.assert_allclose(a @ a.T, np.eye(2), atol=1e-6)
            # B = U S: columns at right angles, longest first.
            gram = b.T @ b
            assert abs(gram[0, 1]) < 1e-5 * gram[0, 0] and gram[0, 0] >= gram[1, 1]
            mean_b = mean_of(clients, shares(clients, "uniform"), t, f"{layer}.lora_B.weight")
            assert_close(b @ a, mean_b @ factors(before, layer)[1])
    for reply in grid.received:
        assert not any(".lora_A." in name for name in reply.content["arrays"])


def test_fed_svd_leaves_a_as_drawn_while_there_is_no_product_of_full_rank():
    start = begin()
    for layer in LAYERS:
        name = f"{layer}.lora_B.weight"
        start[name] = Array(np.zeros_like(start[name].numpy()))
    one, two = train(make("fed-svd"), [Client(k, size=0.0) for k in range(2)], 1, start)[0]
    assert bits(one) == bits(two)


def test_fedex_keeps_the_means_as_the_adapter_and_one_client_has_no_residual():
    clients = [Client(k) for k in range(2)]
    history, _ = train(make("fedex-lora"), clients, 3)
    for t in (1, 2, 3):
        for name in begin():
            assert_close(history[t][name], mean_of(clients, [0.5, 0.5], t, name))
        assert len([n for n in history[t] if ".fold_B." in n]) == t * len(LAYERS)
    alone, _ = train(make("fedex-lora", 1), [Client(0)], 3)
    assert not [name for name in alone[-1] if ".fold_" in name]


def test_flora_begins_anew_with_b_zero_and_a_seeded_by_round_and_layer():
    def run(seed: int = 0):
        return train(make("flora", seed=seed), [Client(k) for k in range(2)], 3)[0]

    history, again, other = run(), run(), run(seed=1)
    drawn = []
    for t in (1, 2, 3):
        for layer in LAYERS:
            b, a = factors(history[t], layer)
            assert not b.any()
            # PEFT's kaiming_uniform_(a=sqrt(5)): uniform in +-1/sqrt(n).
            limit = 1 / np.sqrt(a.shape[1])
            assert np.abs(a).max() <= limit * (1 + 1e-6)
            drawn.append((a / limit).ravel())
            assert not np.allclose(a, factors(other[t], layer)[1])
    assert len({a.tobytes() for a in drawn}) == len(drawn)  # two layers have one shape
    values = np.concatenate(drawn)
    # Variance 1/3 of 186 values, error 0.022 each way: a false alarm in 1e4, seed fixed.
    assert abs(np.mean(values**2) - 1 / 3) < 0.09 and abs(values.mean()) < 0.17
    assert [bits(adapter) for adapter in history] == [bits(adapter) for adapter in again]


@pytest.mark.parametrize("method", FOLDING)
def test_clients_that_missed_rounds_or_lost_all_end_with_the_same_folds(method):
    def asked(grid, node, t):
        plans = [m for m in grid.sent if m.metadata.dst_node_id == node]
        return [m for m in plans if m.content[ROUND_PLAN_KEY]["server-round"] == t]

    clients = [Client(0), Client(1), Client(2, misses=(2, 3)), Client(3, loses=(3,))]
    history, grid = train(make(method), clients, 4, begin(1))
    for k, client in enumerate(clients):
        for t, adapter in client.began.items():
            assert bits(adapter) == bits(history[t - 1]), (k, t)
    assert [sorted(c.began) for c in clients] == [[1, 2, 3, 4]] * 2 + [[1, 4], [1, 2, 3, 4]]
    lost = asked(grid, 4, 3)
    assert [m.content[WIRE_KEY]["base"] == "" for m in lost] == [False, True]


@pytest.mark.parametrize("method", FOLDING)
def test_a_node_not_asked_for_some_rounds_is_sent_the_pairs_of_all_of_them(method):
    clients = [Client(k) for k in range(4)]
    history, grid = train(make(method, fraction_train=0.5, seed=2), clients, 5, begin(1))
    for client in clients:
        for t, adapter in client.began.items():
            assert bits(adapter) == bits(history[t - 1])
    rounds = [  # which folds a message brings, where it goes on from what the node holds
        {name.split(".")[-2] for name in m.content["arrays"] if ".fold_" in name}
        for m in grid.sent
        if m.content[WIRE_KEY]["base"]
    ]
    assert max(rounds, key=len) == {"000002", "000003", "000004"}  # asked in rounds 2 and 5


@pytest.mark.parametrize("method", FOLDING)
def test_a_merge_of_folds_keeps_their_sum_and_later_rounds_go_on(method):
    clients = [Client(0), Client(1), Client(2, misses=(3, 4))]
    history, grid = train(make(method, weighting="public-counts"), clients, 9)
    counts = [sum(".fold_B." in name for name in adapter) for adapter in history]
    merges = [t for t in range(2, 10) if counts[t] < counts[t - 1] + len(LAYERS)]
    assert merges and merges[0] < 8
    for t in range(1, 10):
        asked = [client for client in clients if t in client.ended]
        for layer, (m, n) in LAYERS.items():
            target = effective(history[t - 1], layer) - product(history[t - 1], layer)
            p = shares(asked, "public-counts")
            target = target + mean_product(asked, p, t, layer)
            assert_close(effective(history[t], layer), target, 1e-5)
            left = [v for name, v in history[t].items() if name.startswith(f"{layer}.fold_B.")]
            assert sum(v.shape[1] for v in left) <= 2 * min(m, n)
        if t in merges:
            assert counts[t] == len(LAYERS)
            bases = {
                m.content[WIRE_KEY]["base"]
                for m in grid.sent
                if m.content[ROUND_PLAN_KEY]["server-round"] == t + 1
            }
            assert bases <= {""}  # names are gone: everything is sent
    for client in clients:
        for t, adapter in client.began.items():
            assert bits(adapter) == bits(history[t - 1])


# --- FlexLoRA: ranks by client ---------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["uniform", "public-counts"])
@pytest.mark.parametrize("ranks", [(4,), (2, 1), (4, 2, 1, 3, 2)])
@pytest.mark.parametrize("largest", [4, 6])
def test_flex_lora_keeps_the_best_approximation_of_the_scaled_mean(weighting, ranks, largest):
    """``s_R B A`` is the dense SVD of ``sum_k p_k s_k B_k A_k`` cut to R, and each view to r.

    R = 6 is above min(m, n) = 5 of some layers: there the sum is kept whole.
    """
    clients = [Client(k, rank=rank) for k, rank in enumerate(ranks)]
    strategy = make("flex-lora", len(clients), weighting=weighting)
    history, _ = train(strategy, clients, 4, begin(largest))
    p = shares(clients, weighting)
    for t in range(1, 5):
        for layer in LAYERS:
            total = sum(
                w * ALPHA / client.rank * product(client.ended[t], layer)
                for w, client in zip(p, clients, strict=True)
            )
            u, s, vt = np.linalg.svd(total, full_matrices=False)
            best = {r: (u[:, :r] * s[:r]) @ vt[:r] for r in (*ranks, largest)}
            assert_close(ALPHA / largest * product(history[t], layer), best[largest])
            for client in clients if t < 4 else ():
                b, a = factors(client.began[t + 1], layer)
                assert (b.shape[1], a.shape[0]) == (client.rank, client.rank)
                assert_close(ALPHA / client.rank * b @ a, best[client.rank])
        assert_close(history[t][HEAD], mean_of(clients, p, t, HEAD))
        assert {n: v.shape for n, v in history[t].items()} == {
            n: v.shape for n, v in history[0].items()
        }


@pytest.mark.parametrize("rank", [5, 0, -1, 2**40, "2", 2.0, True, [2], b"2"])
def test_flex_lora_refuses_a_node_with_a_rank_that_there_is_not(rank):
    def stranger(message, _context):
        wire = ConfigRecord({"need-full": True, "version": "", "rank": rank})
        return Message(RecordDict({WIRE_KEY: wire}), reply_to=message)

    strategy, clients = make("flex-lora"), [Client(0, rank=4), Client(1, rank=2)]
    history, grid = train(strategy, [*clients, stranger], 2, begin(4))
    report = strategy.last_round
    assert (report.valid, report.applied, len(report.failures)) == (2, True, 1)
    assert report.failures[0].startswith("node 3: could not go on")
    assert sum(m.metadata.dst_node_id == 3 for m in grid.sent) == 2  # nothing more was sent
    assert all(np.isfinite(v).all() for v in history[-1].values())


def test_flex_lora_refuses_an_update_of_another_rank_than_was_sent():
    def turncoat(message, context):
        reply = clients[1](message, context)
        if "arrays" in reply.content:
            reply.content[WIRE_KEY]["rank"] = 4
        return reply

    clients = [Client(0, rank=4), Client(1, rank=2), Client(2, rank=1)]
    strategy = make("flex-lora")
    train(strategy, [clients[0], turncoat, clients[2]], 2, begin(4))
    assert strategy.last_round.valid == 2
    assert "another version" in strategy.last_round.failures[0]


def test_flex_lora_needs_one_rank_in_all_layers():
    start = begin(4)
    for name, array in begin(2).items():
        if name.startswith("m.1.q"):
            start[name] = array
    with pytest.raises(ValueError, match="one rank in all layers"):
        train(FlexLoRA(local_steps=2), [Client(0), Client(1)], 1, start)
