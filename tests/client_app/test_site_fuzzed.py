"""With the ledger at its limit no message makes a client release anything, whatever it holds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

import privacy.plan
from client_app.round_handler import handle_train
from federation.messages import FINGERPRINT_KEY, TRAINING_KEY
from strategies import ROUND_PLAN_KEY, WIRE_KEY
from tests.client_app.conftest import everything
from tests.client_app.deployed import Deployed, deploy, released

Random = random.Random
SCALARS: list[Any] = [
    -1, 0, 1, 2, 3, 4, 2**40, -(2**40), 0.0, -0.0, 0.5, 1e-300, 1e30, float("inf"), float("nan"),
    True, False, "", "A", "B", "both", "alternate", "none", "module", "sgd", "adamw", "{}", "[]",
    "x" * 3000, "\x00", "null", b"", b"\xff" * 9, "float32", "int8", "bfloat16", [], [1, 2], ["a"],
]  # fmt: skip
SETTINGS: dict[str, list[Any]] = {
    "privacy.mode": ["none", "record", "", 0],
    "privacy.insecure-test-seed": [0, 7, -1, -2],
    "privacy.target-epsilon": [0.01, 8.0, 7.99, 8.01, 99.0, 1e9, 0.0, -1.0, float("nan")],
    "privacy.target-delta": [1e-12, 1e-5, 1.01e-5, 2e-5, 0.5, 0.0, 1.0],
    "privacy.sample-rate": [1e-6, 0.3, 0.31, 1.0, 0.0, 2.0],
    "privacy.expected-batch-size": [0, 1, 20, 10**9],
    "privacy.max-grad-norm": [1e-9, 1.0, 1e30, float("inf"), 0.0],
    "privacy.max-grad-norm-a": [0.0, 0.5],
    "privacy.evaluation-noise-multiplier": [0.0, 0.5, 1e-3, 40.0, 1e9, -1.0],
    "privacy.engine": ["fused", "hooks", "none"],
    "strategy.weighting": ["uniform", "public-counts", "x"],
    "strategy.method": [
        "la-lora",
        "dp-lora",
        "ffa-lora",
        "as-lora",
        "flex-lora",
        "fedex-lora",
        "x",
    ],
    "strategy.score": ["pairwise", "client", "debiased"],
    "strategy.num-rounds": [1, 2, 3, 10**6],
    "strategy.local-steps": [1, 2, 4, 10**6],
    "lora.r": [1, 2, 3],
    "lora.client-ranks": ["", "1,2"],
    "wire.dtype": ["float32", "int8"],
    "seed": [0, 1, 2**31],
    "data.source": ["npz", "embedded", "csv", "image-folder", "hub"],
    "data.min-records": [1, 59, 60, 61, 10**6],
    "data.num-labels": [3, 4, 1],
    "data.path": ["", "/etc/passwd"],
    "data.image-column": ["image", "other"],
    "data.partitioner": ["iid", "dirichlet"],
    "device": ["cpu", "cuda:7", "auto"],
    "output-dir": ["", "/nowhere"],
    "resume": ["", "/nowhere"],
    "no.such": [1],
}


def cheap_calibration(**wishes: Any) -> float:
    """Some noise for any wish, at once: what is refused must not rest on a search for it."""
    return max(0.2, 40 / wishes["target_epsilon"])


class Fuzzer:
    """Makes train messages and run configs out of good ones.

    Parameters
    ----------
    seed : int
        Of all choices.
    messages : list of callable
        Each makes the content of a good message.
    """

    def __init__(self, seed: int, messages: list[Callable[[], RecordDict]]) -> None:
        self.random = Random(seed)
        self._messages = messages
        self._changes = [
            self._plan, self._plan, self._training, self._wire, self._arrays, self._record,
            self._drop, self._round, self._settings, self._settings, self._fingerprint,
        ]  # fmt: skip

    def case(self) -> tuple[RecordDict, dict[str, Any]]:
        """A message's content, and settings that differ from the run's."""
        content = self.random.choice(self._messages)()
        settings: dict[str, Any] = {}
        for _ in range(self.random.choice([0, 1, 1, 1, 2, 2, 3, 5])):
            self.random.choice(self._changes)(content, settings)
        return content, settings

    def _config(self, content: RecordDict, key: str) -> ConfigRecord:
        record = content.get(key)
        return record if isinstance(record, ConfigRecord) else ConfigRecord()

    def _put(self, record: ConfigRecord, key: str) -> None:
        value = self.random.choice(SCALARS)
        if self.random.random() < 0.1:
            record.pop(key, None)
        else:
            record[key] = value

    def _plan(self, content: RecordDict, _settings: dict) -> None:
        plan = self._config(content, ROUND_PLAN_KEY)
        if plan:
            self._put(plan, self.random.choice([*plan, "clip-norm"]))

    def _round(self, content: RecordDict, _settings: dict) -> None:
        plan = self._config(content, ROUND_PLAN_KEY)
        good = {
            "server-round": [1, 2, 3, 10**6], "local-steps": [1, 2, 4, 6],
            "mode": ["A", "B", "both", "alternate"], "optimizer": ["sgd", "adamw"],
            "lr-a": [0.0, 0.1, 1e30], "scores": ["none", "module"], "low-pass": [True, False],
            "layer-modes": ["{}", json.dumps({"blocks.0.attn.qkv": "B"})],
        }  # fmt: skip
        key = self.random.choice(list(good))
        plan[key] = self.random.choice(good[key])

    def _training(self, content: RecordDict, _settings: dict) -> None:
        ids = ["f" * 32, "0" * 8, "short", "0123456789abcdef", "x" * 65, "../../etc", "", "A" * 64]
        random_id = "".join(self.random.choices("0123456789abcdef", k=16))
        config = self._config(content, "config")
        config[TRAINING_KEY] = self.random.choice([*ids, random_id, random_id])

    def _fingerprint(self, content: RecordDict, _settings: dict) -> None:
        self._put(self._config(content, "config"), FINGERPRINT_KEY)

    def _wire(self, content: RecordDict, _settings: dict) -> None:
        wire = self._config(content, WIRE_KEY)
        self._put(wire, self.random.choice(["base", "version", "rank", "dtype", "need-full"]))
        if self.random.random() < 0.3:
            wire["dtype"] = self.random.choice(["float32", "int8", "bfloat16", "float16"])

    def _arrays(self, content: RecordDict, _settings: dict) -> None:
        arrays = content.get("arrays")
        if not isinstance(arrays, ArrayRecord) or not arrays:
            return
        name = self.random.choice(list(arrays))
        shape = arrays[name].shape
        size = self.random.choice([shape, shape, (1,), (0,), (), (*shape, 1), (3, 5)])
        scale = self.random.choice([0.0, 1.0, 1e30, np.nan, np.inf])
        kind = self.random.choice([np.float32, np.float32, np.float32, np.float64, np.int64])
        with np.errstate(all="ignore"):
            value = np.asarray(np.random.default_rng(1).normal(size=size) * scale, kind)
        changed = dict(arrays)
        what = self.random.random()
        if what < 0.1:
            del changed[name]
        elif what < 0.2:
            changed["other"] = arrays[name]
        elif what < 0.3:
            changed[name] = Array("float32", shape, "numpy.ndarray", self.random.randbytes(40))
        else:
            changed[name] = Array(value)
        content["arrays"] = ArrayRecord(changed)
        if self.random.random() < 0.8:  # consistent, so that more of the client sees it
            content[WIRE_KEY] = everything(content["arrays"])

    def _record(self, content: RecordDict, _settings: dict) -> None:
        key = self.random.choice([*content, "evil"])
        content[key] = self.random.choice(
            [ConfigRecord(), MetricRecord({"a": 1}), ArrayRecord(), ConfigRecord({"a": "b"})]
        )

    def _drop(self, content: RecordDict, _settings: dict) -> None:
        if content:
            del content[self.random.choice(list(content))]

    def _settings(self, _content: RecordDict, settings: dict) -> None:
        key = self.random.choice(list(SETTINGS))
        settings[key] = self.random.choice(SETTINGS[key])


def asked(deployed: Deployed, context: Context | None, message: Message, settings) -> Message:
    """The reply to a message of a run with other settings; of a new run without a context."""
    context = context or deployed.context()
    original = dict(context.run_config)
    context.run_config = {**original, **settings}
    try:
        return handle_train(message, context)
    finally:
        context.run_config = original


@pytest.fixture
def cheap(monkeypatch) -> None:
    monkeypatch.setattr(privacy.plan, "calibrate_noise_multiplier", cheap_calibration)


CASES = [
    pytest.param(300, id="300 messages"),
    pytest.param(6000, id="6000 messages", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("cases", CASES)
def test_at_its_limit_a_client_releases_nothing_new(site, tmp_path: Path, monkeypatch, cases):
    deployed = deploy(tmp_path, site.config, max_epsilon=8.0)
    context = deployed.context()
    earlier = set()
    for number in (1, 2):
        content = released(handle_train(site.message(server_round=number), context))
        assert content is not None
        earlier.add(content)
    (plan,) = deployed.ledger.book().plans.values()
    assert plan.steps == plan.most_steps == 4
    own = {"target_epsilon": 8.0, "target_delta": 1e-5, "sample_rate": 0.3, "steps": 4}
    monkeypatch.setattr(
        privacy.plan,
        "calibrate_noise_multiplier",
        lambda **wishes: (
            plan.noise_multiplier if own.items() <= wishes.items() else cheap_calibration(**wishes)
        ),
    )
    before = deployed.entries(), (tmp_path / "second" / "head.json").read_bytes()
    fuzzer = Fuzzer(1, [lambda: site.content(server_round=1), lambda: site.content(server_round=2)])
    outcomes: dict[str, int] = {}
    contexts = [context, context, None]
    for _ in range(cases):
        case = fuzzer.case()
        message = site.message(case[0])
        reply = asked(deployed, fuzzer.random.choice(contexts), message, case[1])
        content = released(reply)
        assert content is None or content in earlier
        outcome = str(reply.error.code) if reply.has_error() else "repeated" if content else "need"
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        assert (deployed.entries(), (tmp_path / "second" / "head.json").read_bytes()) == before
    print(dict(sorted(outcomes.items())))
    # The cases reach every part of the client: the ledger's own refusals are among them.
    assert outcomes.keys() >= {"1001", "1005", "1007", "1009", "repeated"}
    assert outcomes["1005"] > cases / 20
    fresh = site.content(server_round=3)
    fresh["config"][TRAINING_KEY] = "a" * 32
    for epsilon in (8.0, 0.01):
        settings = {"privacy.target-epsilon": epsilon}
        assert released(asked(deployed, None, site.message(fresh), settings)) is None


@pytest.mark.parametrize(
    "cases",
    [pytest.param(60, id="60 messages"), pytest.param(1200, id="1200", marks=pytest.mark.slow)],
)
@pytest.mark.usefixtures("cheap")
def test_below_its_limit_whatever_leaves_was_charged(site, tmp_path: Path, cases):
    deployed = deploy(tmp_path, site.config, max_epsilon=1e5)
    deployed.config["strategy.num-rounds"] = 1000
    context = deployed.context()
    fuzzer = Fuzzer(2, [lambda: site.content(server_round=1), lambda: site.content(server_round=2)])
    seen: set[bytes] = set()
    charged = new = 0
    for _ in range(cases):
        case = fuzzer.case()
        plan = case[0].get(ROUND_PLAN_KEY)
        message, where = site.message(case[0]), fuzzer.random.choice([context, None])
        content = released(asked(deployed, where, message, case[1]))
        now = deployed.steps()
        if content is not None and content not in seen:
            assert isinstance(plan, ConfigRecord)
            assert now - charged == plan["local-steps"] >= 1
            seen.add(content)
            new += 1
        elif content is not None:
            assert now == charged, "a repeated reply was paid for again"
        assert now >= charged
        charged = now
    print(f"{new} replies, {charged} steps")
    assert new > cases / 10
    assert all(plan.noise_multiplier > 0 for plan in deployed.ledger.book().plans.values())
