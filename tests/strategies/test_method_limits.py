"""What no method may do: rounds that are not applied, values that overflow, long files."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

import strategies
from strategies import STRATEGIES, FedSVD, StrategySettings
from tests.strategies.random_clients import (
    LAYERS,
    PRODUCTS,
    Client,
    assert_close,
    begin,
    bits,
    effective,
    factors,
    make,
    mean_product,
    product,
    train,
)


@pytest.mark.parametrize("method", sorted(STRATEGIES))
def test_a_round_below_the_minimum_leaves_every_bit_and_nothing_for_the_next(method):
    def run(**misses):
        rank = 2 if method == "flex-lora" else 0
        clients = [Client(0, rank=rank), Client(1, rank=rank, **misses)]
        return train(make(method), clients, 4)[0], clients

    history, clients = run(misses=(2,))
    assert bits(history[2]) == bits(history[1]) != bits(history[0])
    assert list(history[2]) == list(history[1])
    for layer in LAYERS if method in ("fed-svd", *PRODUCTS) else ():
        before = effective(history[2], layer) - product(history[2], layer)
        target = before + mean_product(clients, [0.5, 0.5], 3, layer)
        if method == "flex-lora":
            u, s, vt = np.linalg.svd(target)
            target = (u[:, :2] * s[:2]) @ vt[:2]
        assert_close(effective(history[3], layer), target)


class Flood(Client):
    """A client that sends one huge value everywhere."""

    value = 3e38

    def change(self, shape):
        return np.full(shape, self.value)


@pytest.mark.parametrize("method", sorted(STRATEGIES))
@pytest.mark.parametrize("value", [3e38, float(np.finfo(np.float32).max)])
@pytest.mark.parametrize("honest", [0, 1])
def test_huge_finite_replies_never_make_the_adapter_infinite(method, value, honest):
    """Such a round may be applied while its result is finite; the first that is not is dropped."""
    rank = 2 if method == "flex-lora" else 0
    clients = [Client(k, rank=rank) if k < honest else Flood(k, rank=rank) for k in range(2)]
    for client in clients[honest:]:
        client.value = value
    strategy, history = make(method), []
    train(strategy, clients, 6, begin(size=1e-3), history)
    for adapter in history:
        assert all(np.isfinite(v).all() for v in adapter.values())
    assert not strategy.last_round.applied
    assert strategy.last_round.valid == 2
    assert bits(history[-1]) == bits(history[-2])


@pytest.mark.parametrize("method", PRODUCTS)
def test_products_cannot_be_trimmed(method):
    with pytest.raises(ValueError, match="trim must be 0"):
        STRATEGIES[method](trim=0.2)
    with pytest.raises(ValueError, match=r"strategy\.trim must be 0"):
        StrategySettings(method=method, trim=0.2)


def test_fed_svd_refactors_the_trimmed_mean():
    clients = [Client(0), Client(1), Flood(2)]
    history, _ = train(FedSVD(local_steps=2, trim=0.34), clients, 1)
    for layer in LAYERS:
        b = np.median([factors(c.ended[1], layer)[0] for c in clients], axis=0)
        assert_close(product(history[1], layer), b @ factors(history[0], layer)[1])


def lines_of_code(source: str) -> int:
    """Lines that hold anything but docstrings, comments and blanks."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in {*layout, tokenize.ENDMARKER}:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


@pytest.mark.parametrize("method", sorted(STRATEGIES))
def test_each_method_is_a_file_of_its_own_below_150_lines_of_code(method):
    assert lines_of_code('"""Doc.\n\nMore.\n"""\n\n# no\nx = 1  # yes\ny = """a\nb"""\n') == 3
    file = Path(strategies.__file__).with_name(method.replace("-", "_") + ".py")
    assert f'name = "{method}"' in file.read_text(encoding="utf-8")
    assert 5 < lines_of_code(file.read_text(encoding="utf-8")) < 150


def test_directions_that_no_client_had_keep_a_gradient():
    """FlexLoRA with R = 4 and one client of rank 2: B is zero there, so A must not be."""
    strategy = STRATEGIES["flex-lora"](local_steps=2, min_train_nodes=1, min_available_nodes=1)
    rng = np.random.default_rng(0)
    shapes = {"m.lora_A.weight": (4, 9), "m.lora_B.weight": (7, 4)}
    start = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    strategy.take_arrays(ArrayRecord({n: Array(value) for n, value in start.items()}))
    plan = strategy.plan(1)
    strategy._begin(plan)
    update = {"m.lora_A.weight": np.ones((2, 9), np.float32),
              "m.lora_B.weight": np.ones((7, 2), np.float32)}  # fmt: skip
    view = strategy._tensors_for(2)
    product = (view["m.lora_B.weight"] + 1) @ (view["m.lora_A.weight"] + 1)
    strategy._fold(update, 1.0, None, 2)
    strategy._apply(plan)
    a, b = (strategy._adapter[name].astype(np.float64) for name in shapes)
    np.testing.assert_allclose(a @ a.T, np.eye(4), atol=1e-6)
    np.testing.assert_allclose(b @ a, 2 * product, rtol=1e-5, atol=1e-5)
    assert not b[:, 2:].any()
