"""Somebody else's ClientApp behind the mod, and the helper that freezes factors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)

from strategies import (
    ROUND_PLAN_KEY,
    WIRE_KEY,
    ASLoRA,
    FedExLoRA,
    FFALoRA,
    NeedFull,
    RoLoRA,
    RoundPlan,
    active_factors,
    ask_for_everything,
    kind_of,
    layer_of,
    receive_adapter,
    update_records,
)
from task.torchvision_ops import declare_missing_torchvision_ops
from tests.fake_grid import FakeGrid

declare_missing_torchvision_ops()

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict  # noqa: E402

ROUNDS = 4


class Net(torch.nn.Module):
    """Two blocks of one adapted layer each, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({"q": torch.nn.Linear(3, 3)}) for _ in range(2)
        )
        self.head = torch.nn.Linear(3, 2)


def make_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"])
        return get_peft_model(Net(), config)


def adapter() -> ArrayRecord:
    tensors = get_peft_model_state_dict(make_model())
    return ArrayRecord({name: Array(value.numpy()) for name, value in tensors.items()})


NAMES = tuple(adapter())
LAYERS = tuple(dict.fromkeys(layer_of(name) for name in NAMES if layer_of(name)))


def trained(name: str, before, node: int, server_round: int):
    """What a node's training makes of a tensor."""
    rng = np.random.default_rng((node, server_round, NAMES.index(name)))
    return before + rng.standard_normal(before.shape).astype(np.float32)


def train_all(message: Message, context: Context) -> Message:
    """An app that knows nothing of active factors: it trains and returns everything."""
    number = message.content["config"]["server-round"]
    after = {
        name: Array(trained(name, array.numpy(), context.node_id, number))
        for name, array in message.content["arrays"].items()
    }
    metrics = MetricRecord({"num-examples": 3, "mine": 0.5})
    return Message(RecordDict({"arrays": ArrayRecord(after), "m": metrics}), reply_to=message)


def behind_the_mod(app):
    return lambda message, context: active_factors(message, context, app)


def by_hand(message: Message, context: Context) -> Message:
    """The same training by an app that speaks the wire itself."""
    try:
        held = receive_adapter(message, context.state)
    except NeedFull:
        return Message(ask_for_everything(context.state), reply_to=message)
    plan = RoundPlan.from_record(message.content[ROUND_PLAN_KEY])
    update = {
        name: trained(name, held[name], context.node_id, plan.server_round) - held[name]
        for name in plan.uploaded(held)
    }
    rng = np.random.default_rng((plan.server_round, context.node_id))
    return Message(
        RecordDict(update_records(message, context.state, update, rng)), reply_to=message
    )


def start(strategy, handler, rounds: int = ROUNDS):
    grid = FakeGrid([handler] * 2)
    result = strategy.start(grid, adapter(), num_rounds=rounds, timeout=60)
    return grid, result


def one_message(strategy=None) -> tuple[Message, Context]:
    """The first message of a run, and the context of the node that it is for."""
    strategy = strategy or FFALoRA(local_steps=2)
    grid = FakeGrid([lambda message, _context: None] * 2)
    messages = strategy.configure_train(1, adapter(), ConfigRecord(), grid)
    grid.push_messages(messages)
    return messages[0], grid.contexts[0]


# --- the mod -------------------------------------------------------------------------------------


def test_the_app_sees_the_whole_adapter_though_only_what_changed_travels():
    strategy = RoLoRA(local_steps=2)
    travelled, seen = [], []

    def app(message: Message, context: Context) -> Message:
        arrays = message.content["arrays"]
        assert set(arrays) == set(NAMES)
        for name, value in strategy._adapter.items():
            assert arrays[name].numpy().tobytes() == value.tobytes()
        seen.append(len(arrays))
        return train_all(message, context)

    def handler(message: Message, context: Context) -> Message:
        travelled.append(set(message.content["arrays"]))
        return active_factors(message, context, app)

    start(strategy, handler)
    assert seen == [len(NAMES)] * 2 * ROUNDS
    assert travelled[:2] == [set(NAMES)] * 2
    head = {name for name in NAMES if kind_of(name) == "head"}
    for place, factor in enumerate("BAB", 1):
        changed = head | {name for name in NAMES if kind_of(name) == factor}
        assert travelled[2 * place : 2 * place + 2] == [changed] * 2


def test_the_reply_has_the_change_of_the_active_tensors_and_keeps_other_records():
    message, context = one_message()
    reply = active_factors(message, context, train_all)
    active = {name for name in NAMES if kind_of(name) != "A"}
    assert set(reply.content["arrays"]) == active
    for name in active:
        before = adapter()[name].numpy()
        change = trained(name, before, context.node_id, 1) - before
        assert reply.content["arrays"][name].numpy().tobytes() == change.tobytes()
    assert dict(reply.content["m"]) == {"num-examples": 3, "mine": 0.5}
    assert reply.content[WIRE_KEY]["version"] == message.content[WIRE_KEY]["version"]


@pytest.mark.parametrize("kind", [MessageType.EVALUATE, MessageType.QUERY, "train.mine"])
def test_messages_that_are_not_for_training_pass(kind):
    content = RecordDict({"arrays": ArrayRecord({"x": Array(np.zeros(1, np.float32))})})
    message = Message(content, dst_node_id=1, message_type=kind)
    _, context = one_message()
    answer = Message(RecordDict(), reply_to=message)
    calls = []

    def app(got: Message, _context: Context) -> Message:
        calls.append((got, list(got.content["arrays"])))
        return answer

    assert active_factors(message, context, app) is answer
    assert calls == [(message, ["x"])]
    assert not context.state


def test_an_apps_error_passes():
    message, context = one_message()
    error = Message(Error(code=77, reason="mine"), reply_to=message)
    assert active_factors(message, context, lambda *_: error) is error
    assert error.error.code == 77


def spoilt(change):
    def app(message: Message, context: Context) -> Message:
        reply = train_all(message, context)
        change(reply.content)
        return reply

    return app


B = next(name for name in NAMES if kind_of(name) == "B")
A = next(name for name in NAMES if kind_of(name) == "A")


def without(name: str):
    return lambda content: content["arrays"].pop(name)


def with_array(name: str, value):
    return lambda content: content["arrays"].update({name: Array(np.asarray(value, np.float32))})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda content: content.pop("arrays"), f"under 'arrays'.*missing: {NAMES[1]}"),
        (without(B), f"missing: {B}"),
        (lambda content: content.update(arrays=MetricRecord({"x": 1})), f"missing: {B}"),
        (with_array(B, np.zeros((2, 3))), rf"{B} has shape \(2, 3\), it was sent \(3, 2\)"),
        (with_array(B, np.full((3, 2), np.nan)), f"{B} must be float32 and finite"),
    ],
)
def test_an_app_that_returns_no_adapter_is_told_what_is_wrong(change, text):
    message, context = one_message()
    with pytest.raises(ValueError, match=text):
        active_factors(message, context, spoilt(change))


def test_what_the_app_does_to_tensors_that_are_not_active_is_dropped():
    message, context = one_message()
    plain = active_factors(message, context, train_all).content["arrays"]
    for change in (without(A), with_array(A, np.full((9, 9), np.nan))):
        message, context = one_message()
        reply = active_factors(message, context, spoilt(change))
        assert {n: a.data for n, a in reply.content["arrays"].items()} == {
            n: a.data for n, a in plain.items()
        }


def test_a_node_that_lacks_something_asks_and_does_not_train():
    calls = []

    def app(message: Message, context: Context) -> Message:
        calls.append(context.node_id)
        return train_all(message, context)

    def handler(message: Message, context: Context) -> Message:
        number = message.content["config"]["server-round"]
        if number == 2 and context.node_id == 1 and message.content[WIRE_KEY]["base"]:
            for key in list(context.state):
                del context.state[key]
            reply = active_factors(message, context, app)
            assert calls == [1, 2], "the app was called"
            assert set(reply.content) == {WIRE_KEY}
            assert reply.content[WIRE_KEY]["need-full"] is True
            return reply
        return active_factors(message, context, app)

    strategy = RoLoRA(local_steps=2)
    start(strategy, handler, 2)
    assert calls == [1, 2, 2, 1]
    assert strategy.last_round.valid == 2


def test_an_app_that_writes_into_the_record_it_was_sent_keeps_the_nodes_adapter():
    """Mistake: the app was handed the node's own state, and every round had to be sent whole."""

    def in_place(message: Message, context: Context) -> Message:
        reply = train_all(message, context)
        for name, array in reply.content["arrays"].items():
            message.content["arrays"][name] = array
        return reply

    strategy = RoLoRA(local_steps=2)
    grid, result = start(strategy, behind_the_mod(in_place))
    assert len(grid.sent) == 2 * ROUNDS, "nodes had to ask for everything"
    _, expected = start(RoLoRA(local_steps=2), by_hand)
    assert {n: a.data for n, a in result.arrays.items()} == {
        n: a.data for n, a in expected.arrays.items()
    }


def test_folds_are_refused_with_a_word_on_what_to_do():
    strategy = FedExLoRA(local_steps=2, min_train_nodes=1)
    start(strategy, behind_the_mod(train_all), 2)
    assert len(strategy.last_round.failures) == 2
    assert "cannot do to your model; take another strategy" in strategy.last_round.failures[0]


@pytest.mark.parametrize("lost", [ROUND_PLAN_KEY, WIRE_KEY, "arrays"])
def test_a_message_of_no_strategy_of_ours_is_refused(lost):
    message, context = one_message()
    del message.content[lost]
    with pytest.raises(ValueError, match=f"'{lost}'"):
        active_factors(message, context, train_all)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_federation_of_stock_apps_equals_one_of_apps_that_speak_the_wire(dtype):
    results, choices = [], []
    for handler in (behind_the_mod(train_all), by_hand):
        strategy = ASLoRA(num_rounds=ROUNDS, local_steps=2, exploration=0.5, wire_dtype=dtype)
        _, result = start(strategy, handler)
        assert strategy.last_round.valid == 2
        results.append(result)
        choices.append(strategy.choice.scores())
    assert choices[0] == choices[1]
    moved = 0
    for name, array in results[0].arrays.items():
        assert results[1].arrays[name].data == array.data
        moved += array.data != adapter()[name].data
    assert moved == len(NAMES)
    assert results[0].train_metrics_clientapp == results[1].train_metrics_clientapp
