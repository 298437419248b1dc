"""A ServerApp that was killed goes on where it stopped; a run that stands still ends early."""

from __future__ import annotations

import json

import numpy as np
import pytest

from client_app.replay import pack_reply
from client_app.round_handler import handle_train
from federation.run_files import RunFolder
from federation.settings import SettingsError
from privacy import Ledger
from server_app import federation_run, observer
from strategies import ROUND_PLAN_KEY, CheckpointError, read_checkpoint
from tests.fake_grid import FakeGrid

SEEDED = {"privacy__insecure_test_seed": 5, "strategy__num_rounds": 4}
CLOCK = ("seconds", "round_seconds")


class PowerCut(BaseException):
    """Nothing may catch it."""


def killed_in_round(number: int):
    def handle(message, context):
        if message.content[ROUND_PLAN_KEY]["server-round"] == number:
            raise PowerCut
        return handle_train(message, context)

    return handle


def only_folder(runs) -> RunFolder:
    (path,) = runs.iterdir()
    return RunFolder(path)


def server_state(folder: RunFolder) -> tuple[dict, dict[str, bytes]]:
    """What the next round depends on: all of the checkpoint but times, bytes and the random id.

    Clients of a new run of Flower are sent everything again.
    """
    saved = read_checkpoint(folder.checkpoint)
    state = saved.state
    assert len(state["companions"].pop("training")["id"]) == 32
    del state["metrics"]["train_metrics_clientapp"]
    for row in state["companions"]["observer"]["rows"]:
        for key in (*CLOCK, "bytes_down"):
            row.pop(key)
    return state, {name: array.data for name, array in saved.arrays.items()}


@pytest.mark.parametrize("method", ["as-lora", "la-lora", "fed-svd", "flora"])
@pytest.mark.parametrize("lost", [2, 4])
def test_a_killed_run_ends_as_if_it_had_not_been(federate, runs, tmp_path, method, lost):
    whole, _ = federate(
        **SEEDED, strategy__method=method, output_dir=str(tmp_path / "whole"), run_id=1
    )
    with pytest.raises(PowerCut):
        # Two clients have trained in that round already.
        federate([handle_train, handle_train, killed_in_round(lost)], **SEEDED,
                 strategy__method=method)  # fmt: skip
    cut = only_folder(runs)
    assert not cut.result.exists()
    # A new run of Flower: another id, and clients that kept nothing.
    folder, grid = federate(
        **SEEDED,
        strategy__method=method,
        resume=str(cut.path),
        output_dir=str(tmp_path / "resumed"),
    )
    assert next(m.content[ROUND_PLAN_KEY]["server-round"] for m in grid.sent) == lost
    assert server_state(folder) == server_state(whole)
    first, second = folder.read_result(), whole.read_result()
    for key in ("accuracy_start", "accuracy_end", "rounds", "bytes_up", "clients"):
        assert first[key] == second[key], key
    assert [row["round"] for row in folder.read_metrics()] == [0, 1, 2, 3, 4]


def training_of(folder: RunFolder) -> str:
    return read_checkpoint(folder.checkpoint).state["companions"]["training"]["id"]


def test_the_round_that_was_lost_costs_nothing_twice(federate, runs, tmp_path):
    """Two of three clients had answered; they send the same bytes again, uncharged."""
    whole, _ = federate(strategy__num_rounds=3, output_dir=str(tmp_path / "whole"))
    with pytest.raises(PowerCut):
        federate([handle_train, handle_train, killed_in_round(3)], strategy__num_rounds=3)
    cut = only_folder(runs)
    resumed, _ = federate(
        strategy__num_rounds=3, resume=str(cut.path), output_dir=str(tmp_path / "resumed")
    )
    assert training_of(resumed) == training_of(cut) != training_of(whole)
    epsilons = [row["epsilon"] for row in resumed.read_metrics()]
    assert epsilons == [row["epsilon"] for row in whole.read_metrics()]
    for client in range(3):
        ledger = Ledger(
            resumed.ledgers / f"client-{client}",
            resumed.ledgers / "heads" / f"client-{client}.json",
        )
        (plan,) = ledger.book().plans.values()
        assert (plan.steps, plan.rounds) == (6, [1, 2, 3])


def test_replies_that_were_lost_with_the_server_are_sent_again_bit_for_bit(
    federate, runs, tmp_path
):
    """With secure noise: only a stored reply can have the same bytes."""
    sent: dict[str, list] = {"lost": [], "again": []}

    def noting(where):
        def handle(message, context):
            reply = handle_train(message, context)
            if message.content[ROUND_PLAN_KEY]["server-round"] == 2:
                sent[where].append(pack_reply(reply.content))
            return reply

        return handle

    with pytest.raises(PowerCut):
        federate([noting("lost"), noting("lost"), killed_in_round(2)])
    cut = only_folder(runs)
    federate(
        [noting("again")] * 2 + [handle_train],
        resume=str(cut.path),
        output_dir=str(tmp_path / "resumed"),
    )
    assert len(sent["lost"]) == 2 and sent["lost"] == sent["again"]


class RenamingGrid(FakeGrid):
    """Flower's simulation gives nodes new ids in every run."""

    def get_node_ids(self):
        return [node + 100 for node in super().get_node_ids()]

    def push_messages(self, messages):
        messages = list(messages)
        for message in messages:
            message.metadata.__dict__["_dst_node_id"] -= 100
        return super().push_messages(messages)


@pytest.mark.parametrize("grid_type", [FakeGrid, RenamingGrid])
def test_a_crash_loop_costs_what_a_whole_run_does(federate, runs, tmp_path, grid_type):
    """Four rounds of two steps; the third is lost three times and then taken."""
    whole, _ = federate(strategy__num_rounds=4, output_dir=str(tmp_path / "whole"))
    lost = [handle_train, handle_train, killed_in_round(3)]
    with pytest.raises(PowerCut):
        federate(lost, strategy__num_rounds=4)
    folder = only_folder(runs)
    for attempt in ("second", "third"):
        with pytest.raises(PowerCut):
            federate(
                lost,
                strategy__num_rounds=4,
                resume=str(folder.path),
                output_dir=str(tmp_path / attempt),
                grid_type=grid_type,
            )
        folder = only_folder(tmp_path / attempt)
    last, _ = federate(
        strategy__num_rounds=4,
        resume=str(folder.path),
        output_dir=str(tmp_path / "last"),
        grid_type=grid_type,
    )
    assert last.read_result()["epsilon"] == whole.read_result()["epsilon"] <= 8.0


def test_a_run_is_resumed_from_its_checkpoint_file_and_left_as_it_was(federate, runs, tmp_path):
    with pytest.raises(PowerCut):
        federate([handle_train, handle_train, killed_in_round(3)], **SEEDED)
    cut = only_folder(runs)
    before = {path: path.read_bytes() for path in cut.path.rglob("*") if path.is_file()}
    folder, _ = federate(**SEEDED, resume=str(cut.checkpoint), output_dir=str(tmp_path / "b"))
    assert folder.result.exists()
    after = {path: path.read_bytes() for path in cut.path.rglob("*") if path.is_file()}
    # But for a note of who went on: two runs from one round would each know half of the account.
    assert after.pop(cut.path / "resumed-by.txt").decode() == f"{folder.path}\n"
    assert after == before
    with pytest.raises(SettingsError, match=r"was gone on from already.*-la-lora-8"):
        federate(**SEEDED, resume=str(cut.path))


def test_a_run_killed_before_it_wrote_anything_new_can_be_resumed_again(federate, runs, tmp_path):
    with pytest.raises(PowerCut):
        federate([handle_train, handle_train, killed_in_round(2)], **SEEDED)
    first = only_folder(runs)
    with pytest.raises(PowerCut):
        federate(
            [handle_train, handle_train, killed_in_round(2)],
            **SEEDED,
            resume=str(first.path),
            output_dir=str(tmp_path / "second"),
        )
    second = only_folder(tmp_path / "second")
    folder, _ = federate(**SEEDED, resume=str(second.path), output_dir=str(tmp_path / "third"))
    assert [row["round"] for row in folder.read_metrics()] == [0, 1, 2, 3, 4]


def test_a_finished_run_resumes_to_its_own_result(federate, tmp_path):
    whole, _ = federate(**SEEDED)
    again, grid = federate(**SEEDED, resume=str(whole.path), output_dir=str(tmp_path / "again"))
    assert grid.sent == []
    assert again.read_result()["accuracy_end"] == whole.read_result()["accuracy_end"]
    names = {path.name for path in again.adapter.iterdir()}
    assert names == {path.name for path in whole.adapter.iterdir()}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"strategy__lr_a": 0.25}, r"strategy\.lr-a: the earlier run had 0\.5, this one has 0\.25"),
        ({"privacy__target_epsilon": 3.0}, r"privacy\.target-epsilon"),
        ({"strategy__num_rounds": 6}, r"strategy\.num-rounds"),
        ({"seed": 1}, "seed"),
    ],
)
def test_other_settings_are_refused_by_name(federate, changes, named):
    folder, _ = federate(**SEEDED)
    with pytest.raises(SettingsError, match=named):
        federate(**{**SEEDED, **changes}, resume=str(folder.path))


def test_where_a_run_looks_and_how_long_it_waits_may_change(federate, tmp_path):
    folder, _ = federate(**SEEDED)
    again, _ = federate(**SEEDED, resume=str(folder.path), strategy__round_timeout=60.0,
             output_dir=str(tmp_path / "elsewhere"))  # fmt: skip
    assert again.read_settings()["strategy"]["round-timeout"] == 60.0
    assert again.read_result()["rounds"] == folder.read_result()["rounds"]


def test_what_is_no_run_is_refused(federate, tmp_path):
    with pytest.raises(SettingsError, match=r"resume: got .* no settings\.json"):
        federate(resume=str(tmp_path))
    folder, _ = federate(**SEEDED)
    folder.checkpoint.write_bytes(folder.checkpoint.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"checkpoint\.npz"):
        federate(**SEEDED, resume=str(folder.path))


def test_the_checkpoint_holds_what_the_server_has_and_no_more(federate):
    """Plain numbers and tensors by PEFT's names: nothing pickled, nothing of a client's data."""
    folder, _ = federate(strategy__weighting="uniform")
    with np.load(folder.checkpoint, allow_pickle=False) as archive:
        kinds = {archive[name].dtype.kind for name in archive.files}
        text = archive["state"].tobytes().decode()
    assert kinds <= {"f", "u"}
    assert "num-examples" not in text and "data-path" not in text
    assert set(json.loads(text)["companions"]) == {"observer", "account", "training"}


def constant_accuracies(monkeypatch, validation, test):
    """Give the observer these accuracies on its validation and its test records."""
    given = {"validation": iter(validation), "test": iter(test)}

    def evaluate(_model, records):
        which = "validation" if len(records) == 15 else "test"
        return {"accuracy": next(given[which]), "loss": 1.0}

    monkeypatch.setattr(observer, "evaluate", evaluate)


def test_a_run_stops_when_validation_stands_still_and_reports_the_last_round(federate, monkeypatch):
    """Mistakes: stopping by the test split; reporting the best round instead of the last."""
    constant_accuracies(
        monkeypatch, [0.1, 0.5, 0.5, 0.5, 0.9, 0.9, 0.9], [0.1, 0.9, 0.2, 0.3, 0.8, 0.8, 0.8]
    )
    folder, grid = federate(
        privacy__mode="none",
        strategy__num_rounds=6,
        strategy__early_stopping_patience=2,
        data__validation_fraction=0.25,
    )
    result = folder.read_result()
    assert (result["rounds"], result["stopped_early"]) == (3, True)
    assert result["accuracy_end"] == 0.3
    assert len(grid.sent) == 9
    rows = list(folder.read_metrics())
    assert [row["validation_accuracy"] for row in rows] == [0.1, 0.5, 0.5, 0.5]


def test_a_run_that_stops_early_spends_only_what_it_took(federate, monkeypatch):
    constant_accuracies(monkeypatch, [0.5] * 5, [0.5] * 5)
    folder, _ = federate(
        strategy__num_rounds=4,
        strategy__early_stopping_patience=1,
        data__validation_fraction=0.25,
    )
    result = folder.read_result()
    assert (result["rounds"], result["stopped_early"]) == (1, True)
    assert 0 < result["epsilon"] < 6.0  # 8 was calibrated for four rounds


def test_early_stopping_without_validation_records_is_refused(federate):
    with pytest.raises(SettingsError, match=r"data\.validation-fraction is 0"):
        federate(strategy__early_stopping_patience=2)


def test_validation_and_test_records_are_disjoint_and_seeded(tiny):
    from federation.settings import Settings
    from task.data import load_test_records
    from tests.federation.tiny import changed

    settings = Settings.from_run_config(changed(tiny))
    model = federation_run.build_task_model(settings.model, settings.lora, 3, seed=0)
    records = load_test_records(settings.data, model.encoder)
    whole = records.batch(np.arange(len(records)))["pixel_values"]

    def rows(part):
        return {part.batch([i])["pixel_values"].numpy().tobytes() for i in range(len(part))}

    validation, test = observer.split_validation(records, 0.25, seed=0)
    assert (len(validation), len(test)) == (15, 45)
    assert rows(validation).isdisjoint(rows(test))
    assert len(rows(validation) | rows(test)) == len(whole)
    assert rows(observer.split_validation(records, 0.25, seed=0)[0]) == rows(validation)
    assert rows(observer.split_validation(records, 0.25, seed=1)[0]) != rows(validation)
    none, every = observer.split_validation(records, 0.0, seed=0)
    assert (len(none), len(every)) == (0, 60)
    with pytest.raises(ValueError, match=r"data\.validation-fraction is 0\.001 of 60"):
        observer.split_validation(records, 0.001, seed=0)


def test_grid_contexts_of_a_resumed_run_are_new(federate):
    """The fixture is what it says: a new Flower run knows nothing of the one before."""
    _, grid = federate(**SEEDED)
    _, other = federate(**SEEDED)
    assert isinstance(grid, FakeGrid) and grid.contexts[0] is not other.contexts[0]
