"""A run that was killed goes on as if it had not been; what is no checkpoint is refused."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from strategies import (
    ROUND_PLAN_KEY,
    SCORES_KEY,
    STRATEGIES,
    Checkpoint,
    EarlyStopping,
    NeedFull,
    RoundPlan,
    ask_for_everything,
    kind_of,
    read_checkpoint,
    receive_adapter,
    update_records,
)
from strategies import checkpoint as checkpoint_module
from strategies.selection import group_of
from tests.fake_grid import FakeGrid

SHAPES = {
    **{f"m.blocks.{i}.q.lora_A.weight": (2, 3) for i in range(2)},
    **{f"m.blocks.{i}.q.lora_B.weight": (4, 2) for i in range(2)},
    "m.head.bias": (2,),
}
NODES, ROUNDS = 3, 6
VARIANTS = {name: {} for name in STRATEGIES} | {
    f"as-lora {score}": {"score": score, "exploration": 0.4} for score in ("pairwise", "client")
}


class Killed(BaseException):
    """The server process ends here."""


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.CRITICAL, logger="flwr")


def first_adapter(seed: int = 0, **other: tuple[int, ...]) -> ArrayRecord:
    generator = np.random.default_rng(seed)
    shapes = {**SHAPES, **other}
    values = {n: generator.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    return ArrayRecord({n: Array(v * (kind_of(n) == "A")) for n, v in values.items()})


class Run:
    """Clients whose contexts outlive the server, a metric, and a place to be killed at."""

    def __init__(self, variant: str, path: Path, **options) -> None:
        self.variant, self.path = variant, path
        self.options = {"local_steps": 2, "seed": 5, **VARIANTS[variant], **options}
        self.grid = FakeGrid([self.handle] * NODES)
        self.rank = 1 if variant == "flex-lora" else 0
        self.kill_at: tuple[str, int] | None = None
        self.need_full = 0

    def maybe_die(self, stage: str, server_round: int) -> None:
        if self.kill_at == (stage, server_round):
            self.kill_at = None
            raise Killed

    def handle(self, message: Message, context) -> Message:
        plan = RoundPlan.from_record(message.content[ROUND_PLAN_KEY])
        rank = (2 if context.node_id == 1 else 1) if self.rank else 0
        try:
            held = receive_adapter(message, context.state, rank=rank)
        except NeedFull:
            self.need_full += 1
            reply = ask_for_everything(context.state, rank=rank)
            return Message(reply, reply_to=message)
        rng = np.random.default_rng((context.node_id, plan.server_round))
        names = plan.uploaded(held)
        update = {
            n: (0.1 * held[n] + rng.standard_normal(held[n].shape)).astype(np.float32)
            for n in names
        }
        records = update_records(message, context.state, update, rng)
        groups = {group_of(n, "block") for n in names if kind_of(n) != "head"}
        records[SCORES_KEY] = MetricRecord({g: float(np.sum(update[names[0]])) for g in groups})
        return Message(RecordDict(records), reply_to=message)

    def evaluate(self, server_round: int, arrays: ArrayRecord) -> MetricRecord:
        self.maybe_die("evaluate", server_round)
        total = sum(float(np.sum(array.numpy(), dtype=np.float64)) for array in arrays.values())
        return MetricRecord({"total": total, "round": server_round})

    def strategy(self):
        """A new one, as a new server process would make it."""
        strategy = STRATEGIES[self.variant.split()[0]](**self.options)
        run, configure = self, strategy.configure_train

        def configure_train(server_round, *others):
            run.maybe_die("configure", server_round)
            messages = configure(server_round, *others)
            run.maybe_die("after configure", server_round)
            return messages

        def on_reply(node, _message):
            if node == 2:
                run.maybe_die("replies", strategy._mean and current["round"])

        current = {"round": 0}
        begin = strategy._begin

        def begin_round(plan):
            current["round"] = plan.server_round
            begin(plan)

        strategy._begin = begin_round
        strategy.configure_train, strategy.on_reply = configure_train, on_reply
        return strategy

    def go(self, rounds: int = ROUNDS, **others):
        strategy = self.strategy()
        result = strategy.start(
            self.grid,
            first_adapter(),
            num_rounds=rounds,
            timeout=60,
            evaluate_fn=self.evaluate,
            checkpoint=self.path,
            **others,
        )
        return strategy, result


def dying_save(run: Run, monkeypatch) -> None:
    """Let the run be killed around, and in the middle of, the write of a checkpoint."""
    save, savez, sync = Checkpoint.save, np.savez, checkpoint_module.replacing
    rounds = {"now": 0}

    def before(self, state, arrays):
        rounds["now"] = state["round"]
        run.maybe_die("save", state["round"])
        save(self, state, arrays)
        run.maybe_die("saved", state["round"])

    def half(file, **members):
        if run.kill_at == ("write", rounds["now"]):
            whole = io.BytesIO()
            savez(whole, **members)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        run.maybe_die("write", rounds["now"])
        savez(file, **members)

    def synced(folder):
        run.maybe_die("renamed", rounds["now"])

    monkeypatch.setattr(Checkpoint, "save", before)
    monkeypatch.setattr(np, "savez", half)
    monkeypatch.setattr("strategies.atomic_file._sync_folder", synced)
    assert sync is checkpoint_module.replacing


STAGES = (
    "configure", "after configure", "replies", "evaluate", "save", "write", "renamed", "saved",
)  # fmt: skip
_whole: dict[str, tuple[bytes, dict]] = {}


def whole_run(variant: str, folder: Path) -> tuple[bytes, dict]:
    """The checkpoint file and the metrics of the run that nobody killed."""
    if variant not in _whole:
        run = Run(variant, folder / "whole.npz")
        _, result = run.go()
        _whole[variant] = run.path.read_bytes(), dict(result.train_metrics_clientapp)
    return _whole[variant]


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_ends_in_the_same_file(variant, stage, tmp_path, monkeypatch):
    expected, _ = whole_run(variant, tmp_path)
    run = Run(variant, tmp_path / "run.npz")
    dying_save(run, monkeypatch)
    for at in (1, 4):
        run.kill_at = (stage, at)
        before = run.path.read_bytes() if run.path.exists() else None
        with pytest.raises(Killed):
            run.go()
        left = {path.name for path in tmp_path.iterdir()} - {"run.npz", "whole.npz"}
        assert left == set(), "something half-written was left"
        if stage not in ("renamed", "saved"):
            after = read_checkpoint(run.path).state["round"] if run.path.exists() else 0
            assert after == at - 1
            assert before is not None or after == at - 1
        else:
            assert read_checkpoint(run.path).state["round"] == at
    run.go()
    assert run.path.read_bytes() == expected


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_nodes_that_lost_their_state_at_the_kill_change_only_bytes_down(variant, tmp_path):
    """They ask for everything, so the round after the kill sends more, and nothing else differs."""
    expected, metrics = whole_run(variant, tmp_path)
    (tmp_path / "whole.npz").write_bytes(expected)
    run = Run(variant, tmp_path / "run.npz")
    run.kill_at = ("evaluate", 4)
    with pytest.raises(Killed):
        run.go()
    for context in run.grid.contexts:
        context.state = RecordDict()
    asked = run.need_full
    _, result = run.go()
    whole, resumed = read_checkpoint(tmp_path / "whole.npz"), read_checkpoint(run.path)
    assert {n: a.data for n, a in whole.arrays.items()} == {
        n: a.data for n, a in resumed.arrays.items()
    }
    assert whole.state["strategy"] == resumed.state["strategy"]
    for server_round, record in metrics.items():
        got = dict(result.train_metrics_clientapp[server_round])
        if server_round == 4 and run.need_full > asked:
            assert got.pop("bytes-down") > record["bytes-down"]
        assert got == {name: record[name] for name in got}
    evaluated = [state.state["metrics"]["evaluate_metrics_serverapp"] for state in (whole, resumed)]
    assert evaluated[0] == evaluated[1]


def test_a_finished_run_resumes_to_nothing(tmp_path):
    run = Run("ro-lora", tmp_path / "run.npz")
    _, first = run.go(3)
    sent, saved = len(run.grid.sent), run.path.read_bytes()
    _, again = run.go(3)
    assert len(run.grid.sent) == sent
    assert run.path.read_bytes() == saved
    assert {n: a.data for n, a in again.arrays.items()} == {
        n: a.data for n, a in first.arrays.items()
    }
    assert again.train_metrics_clientapp == first.train_metrics_clientapp
    assert again.evaluate_metrics_serverapp == first.evaluate_metrics_serverapp


# --- early stopping ------------------------------------------------------------------------------


def stops_after(values, tmp_path, resume_at=None, **rule) -> int:
    """Rounds that a run takes whose metric has these values, round 0 first."""
    run = Run("ffa-lora", tmp_path / "run.npz")
    run.evaluate = lambda t, arrays: MetricRecord({"score": values[t]})
    stop = EarlyStopping(metric="score", **rule)
    if resume_at is not None:
        run.go(resume_at, early_stopping=stop)
    _, result = run.go(len(values) - 1, early_stopping=stop)
    return max(result.train_metrics_clientapp, default=0)


@pytest.mark.parametrize(
    ("values", "rule", "rounds"),
    [
        ([0.1, 0.2, 0.2, 0.1, 0.9, 0.9], {"patience": 2}, 3),
        ([0.1, 0.2, 0.2, 0.3, 0.3, 0.3], {"patience": 2}, 5),
        ([0.9, 0.1, 0.1, 0.1, 0.1, 0.1], {"patience": 1}, 1),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], {"patience": 1}, 5),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], {"patience": 2, "min_delta": 0.15}, 5),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], {"patience": 1, "min_delta": 0.15}, 1),
        ([0.9, 0.8, 0.8, 0.7, 0.8, 0.9], {"patience": 2, "mode": "min"}, 5),
        ([0.9, 0.8, 0.8, 0.8, 0.1, 0.1], {"patience": 2, "mode": "min"}, 3),
        ([0.1, float("nan"), float("nan"), 0.9, 1.0, 1.0], {"patience": 2}, 2),
    ],
)
def test_a_run_ends_when_its_metric_has_not_improved(values, rule, rounds, tmp_path):
    assert stops_after(values, tmp_path, **rule) == rounds
    for resume_at in range(1, rounds + 1):
        folder = tmp_path / str(resume_at)
        folder.mkdir()
        assert stops_after(values, folder, resume_at, **rule) == rounds


def test_a_metric_that_evaluate_fn_does_not_return_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"'loss' of evaluate_fn, which has \['round', 'total'\]"):
        Run("ffa-lora", tmp_path / "run.npz").go(
            early_stopping=EarlyStopping(metric="loss", patience=1)
        )


@pytest.mark.parametrize(
    "rule", [{"patience": 0}, {"patience": 1, "min_delta": -1}, {"patience": 1, "mode": "more"}]
)
def test_a_rule_that_never_or_always_stops_is_refused(rule):
    with pytest.raises(ValueError, match=next(reversed(rule)).replace("_", ".")):
        EarlyStopping(metric="x", **rule)
