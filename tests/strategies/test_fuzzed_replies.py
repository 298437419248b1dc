"""Ten thousand rounds of spoilt replies among honest ones: only the valid ones count."""

from __future__ import annotations

import copy
import functools
import logging
import random

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from strategies import (
    PRIVACY_KEY,
    ROUND_PLAN_KEY,
    SCORES_KEY,
    STRATEGIES,
    WIRE_KEY,
    NeedFull,
    RoundPlan,
    UpdateBound,
    ask_for_everything,
    kind_of,
    receive_adapter,
    update_records,
)
from strategies.selection import group_of
from strategies.wire_dtypes import pack
from tests.fake_grid import FakeGrid
from tests.strategies.reply_faults import FAULTS, Spoiler

RANK, SMALL_RANK = 3, 2
LAYERS = ("m.blocks.0.q", "m.blocks.1.q")
SHAPES = {
    **{f"{layer}.lora_A.weight": (RANK, 4) for layer in LAYERS},
    **{f"{layer}.lora_B.weight": (5, RANK) for layer in LAYERS},
    "m.head.bias": (2,),
}
BEFORE = 3  # honest rounds, so that both of AS-LoRA's factors have scores and modes are mixed
DTYPES = ("float32", "bfloat16", "float16", "int8")
CASES = {
    "as-lora": {},
    "as-lora client": {"score": "client"},
    "dp-lora": {},
    "fedex-lora": {},
    "flex-lora": {},
    "fed-svd": {},
}
BOUND = UpdateBound(max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=4.0)


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # a line per spoilt reply costs more than the round
    yield
    logger.setLevel(level)


def make(case: str, **others):
    return STRATEGIES[case.split()[0]](local_steps=2, min_train_nodes=1, **CASES[case], **others)


def first_adapter() -> ArrayRecord:
    generator = np.random.default_rng(0)
    values = {n: generator.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    return ArrayRecord({n: Array(v * (kind_of(n) == "A")) for n, v in values.items()})


def random_update(shapes, rng, scale: float = 0.01):
    return {n: (scale * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}


def scores_of(names, rng) -> MetricRecord:
    groups = {group_of(n, "block") for n in names if kind_of(n) != "head"}
    return MetricRecord({group: float(rng.standard_normal()) for group in sorted(groups)})


def keeps_wire(rank: int):
    """An honest node with a state, for the rounds before the fuzzed one."""

    def handle(message: Message, context) -> Message:
        try:
            held = receive_adapter(message, context.state, rank=rank)
        except NeedFull:
            return Message(ask_for_everything(context.state, rank=rank), reply_to=message)
        plan = RoundPlan.from_record(message.content[ROUND_PLAN_KEY])
        rng = np.random.default_rng((context.node_id, plan.server_round))
        update = random_update({n: held[n].shape for n in plan.uploaded(held)}, rng)
        records = update_records(message, context.state, update, rng)
        records[SCORES_KEY] = scores_of(update, rng)
        return Message(RecordDict(records), reply_to=message)

    return handle


@functools.cache
def after_some_rounds(case: str):
    """A strategy that knows nodes 1 and 2; node 2 has a smaller rank if the method lets it."""
    ranks = (RANK, SMALL_RANK) if case == "flex-lora" else (0, 0)
    strategy = make(case)
    result = strategy.start(
        FakeGrid([keeps_wire(rank) for rank in ranks]), first_adapter(), num_rounds=BEFORE
    )
    later = make(case)
    later.load_state_dict(strategy.state_dict(), result.arrays)
    return later


# --- one case ----------------------------------------------------------------------------------

AROUND = ("ok", "ok", "ok", "error", "silent", "twice", "stranger")
REPLIES = st.lists(st.sampled_from((*AROUND, *FAULTS)), min_size=3, max_size=5)
SEEDS = st.integers(0, 2**32)
OPTIONS = st.sampled_from(
    [
        {"wire_dtype": dtype, "weighting": weighting, "update_bound": bound}
        for dtype in DTYPES
        for weighting in ("uniform", "public-counts")
        for bound in (None, BOUND)
    ]
)


class Case:
    """A strategy some rounds into its run, and what its nodes will send in the next round."""

    def __init__(self, case: str, options: dict) -> None:
        self.case, self.options = case, options
        self.arrays = after_some_rounds(case).arrays
        self.valid: list[tuple[int, dict]] = []
        self.failing: list[int] = []

    def strategy(self):
        """As after ``load_state_dict``, which takes as long as a round."""
        before, strategy = after_some_rounds(self.case), make(self.case, **self.options)
        strategy._adapter, strategy._record = dict(before._adapter), before._record
        for name in ("_held", "_books", "_packed"):
            setattr(strategy._downlink, name, dict(getattr(before._downlink, name)))
        if self.case.startswith("as-lora"):
            strategy.choice.load_state_dict(before.choice.state_dict())
        return strategy

    def records(self, strategy, message: Message, fault: str, seed: int) -> dict:
        """Records of a node's reply; takes note of whether they should count."""
        wire, node = message.content[WIRE_KEY], message.metadata.dst_node_id
        plan = RoundPlan.from_record(message.content[ROUND_PLAN_KEY])
        held = strategy._tensors_for(wire["rank"])
        shapes = {name: held[name].shape for name in plan.uploaded(held)}
        rng = np.random.default_rng(seed)
        update = pack(random_update(shapes, rng), self.options["wire_dtype"], rng)
        records = {
            "arrays": ArrayRecord(update),
            "metrics": MetricRecord({"num-examples": int(rng.integers(1, 9))}),
            WIRE_KEY: ConfigRecord({"version": wire["version"], "rank": wire["rank"]}),
            PRIVACY_KEY: ConfigRecord(
                {"noise-std": 0.1, "secure-noise": True, "noise-multiplier": 1.0}
            ),
            SCORES_KEY: scores_of(shapes, rng),
        }
        spoiler = Spoiler(
            records,
            shapes,
            random.Random(seed),
            self.options,
            scored=self.case == "as-lora client",
            everything=wire["base"] == "",
        )
        if fault not in FAULTS or FAULTS[fault](spoiler):
            self.valid.append((node, records))
        else:
            self.failing.append(node)
        return records

    def answers(self, strategy, message: Message, fault: str, seed: int) -> list[Message]:
        node = message.metadata.dst_node_id
        if fault in ("error", "silent"):
            self.failing.append(node)
            return [Message(Error(2, "no"), reply_to=message)] if fault == "error" else []
        records = self.records(strategy, message, fault, seed)
        replies = [Message(RecordDict(records), reply_to=message)]
        if fault == "twice":
            self.failing.append(node)
            replies *= 2
        if fault == "stranger":
            self.failing.append(node)
            unknown = Message(RecordDict(), dst_node_id=node, message_type=MessageType.TRAIN)
            unknown.metadata.__dict__["_message_id"] = f"unknown {node}"
            replies.insert(seed % 2, Message(RecordDict(records), reply_to=unknown))
        return replies

    def alone(self, nodes: int):
        """The same strategy, and the valid replies for it, in their order."""
        alone = self.strategy()
        grid = FakeGrid([lambda message, _context: None] * nodes)
        asked = alone.configure_train(BEFORE + 1, self.arrays, ConfigRecord(), grid)
        grid.push_messages(asked)
        to = {message.metadata.dst_node_id: message for message in asked}
        valid = [Message(RecordDict(records), reply_to=to[node]) for node, records in self.valid]
        return alone, valid

    def check(self, strategy, alone, valid: list[Message]) -> None:
        """Compare with the same strategy that sees the valid replies alone."""
        alone.aggregate_train(BEFORE + 1, valid)
        report, expected = strategy.last_round, alone.last_round
        named = sorted(int(text.split(":")[0].removeprefix("node ")) for text in report.failures)
        assert named == sorted(self.failing)
        assert (report.valid, report.applied) == (len(valid), expected.applied)
        assert report.private == expected.private
        assert len(strategy.arrays) == len(alone.arrays)
        for name, array in alone.arrays.items():
            assert strategy.arrays[name].data == array.data, name
        if self.case.startswith("as-lora"):
            assert strategy.choice.scores() == alone.choice.scores()


def in_one_go(case: str, options: dict, faults: list[str], seed: int) -> None:
    """All replies straight into ``aggregate_train``."""
    run = Case(case, options)
    strategy = run.strategy()
    grid = FakeGrid([lambda message, _context: None] * len(faults))
    asked = strategy.configure_train(BEFORE + 1, run.arrays, ConfigRecord(), grid)
    grid.push_messages(asked)
    alone = run.strategy()
    for name, value in vars(strategy._downlink).items():  # it asked the same, before any reply
        if name != "tensors_for":
            setattr(alone._downlink, name, copy.copy(value))
    sent, valid = [], []
    for place, (message, fault) in enumerate(zip(asked, faults, strict=True)):
        count = len(run.valid)
        answers = run.answers(strategy, message, fault, seed + place)
        sent += answers
        own = [a for a in answers if a.metadata.reply_to_message_id == message.metadata.message_id]
        valid += own[: len(run.valid) - count]
    strategy.aggregate_train(BEFORE + 1, iter(sent))
    run.check(strategy, alone, valid)


def by_start(case: str, options: dict, faults: list[str], seed: int) -> None:
    """The same through ``start``: a node that asks for everything gets it, and then trains."""
    run = Case(case, options)
    strategy = run.strategy()
    silent = "silent" in faults
    again = set()

    def handler(node: int, fault: str):
        def handle(message: Message, _context) -> list[Message]:
            honest = run.answers(strategy, message, "ok", seed + node)
            if fault != "need_full" or silent or node in again:
                if fault in ("ok", "need_full"):
                    return honest
                run.valid.pop()
                return run.answers(strategy, message, fault, seed + node)
            run.valid.pop()
            again.add(node)
            wire = {"need-full": True, "rank": message.content[WIRE_KEY]["rank"]}
            return [Message(RecordDict({WIRE_KEY: ConfigRecord(wire)}), reply_to=message)]

        return handle

    grid = FakeGrid([handler(node, fault) for node, fault in enumerate(faults, 1)])
    strategy.plan = functools.partial(_later_plan, strategy.plan)
    strategy.start(grid, run.arrays, num_rounds=1, timeout=0.002 if silent else 60)
    run.check(strategy, *run.alone(len(faults)))


def _later_plan(plan, _server_round: int) -> RoundPlan:
    return plan(BEFORE + 1)


# 9,000, and 1,000 whole rounds; fewer where each takes an SVD.
EXAMPLES = {
    "as-lora": 1700,
    "as-lora client": 1700,
    "dp-lora": 2300,
    "fed-svd": 1300,
    "fedex-lora": 1000,
    "flex-lora": 1000,
}
FUZZ = {"deadline": None, "derandomize": True, "database": None, "phases": [Phase.generate]}


@pytest.mark.parametrize("case", sorted(CASES))
def test_the_adapter_is_that_of_the_valid_replies_alone(case):
    @settings(max_examples=EXAMPLES[case], **FUZZ)
    @given(OPTIONS, REPLIES, SEEDS)
    def rounds(options, faults, seed):
        in_one_go(case, options, faults, seed)

    rounds()


@settings(max_examples=1000, **FUZZ)
@given(st.sampled_from(sorted(CASES)), OPTIONS, REPLIES, SEEDS)
def test_a_whole_round_of_a_run_takes_the_valid_replies_alone(case, options, faults, seed):
    by_start(case, options, faults, seed)
