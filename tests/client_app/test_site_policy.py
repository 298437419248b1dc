"""What a site's own policy and ledger let a server do, through real messages."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from client_app import round_handler
from client_app.round_handler import handle_train
from federation.messages import TRAINING_KEY, ClientFailure
from privacy import Ledger
from strategies import ROUND_PLAN_KEY, WIRE_KEY
from tests.client_app.deployed import Deployed, deploy, released, write_data, write_policy
from tests.client_app.replies import fail_with, failure_of


@pytest.fixture
def deployed(site, tmp_path: Path) -> Deployed:
    return deploy(tmp_path, site.config)


def train(site, deployed: Deployed, *, training: str = "", server_round: int = 1, **changes):
    content = site.content(server_round=server_round)
    if training:
        content["config"][TRAINING_KEY] = training
    return handle_train(site.message(content), deployed.context(**changes))


def test_a_site_takes_part_and_its_account_outlives_the_process(site, deployed):
    assert released(train(site, deployed))
    assert released(train(site, deployed, server_round=2))  # another process, another context
    assert deployed.steps() == 4
    (plan,) = deployed.ledger.book().plans.values()
    assert (plan.dataset, plan.rounds) == ("records", [1, 2])


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy__mode": "none"},
        {"privacy__insecure_test_seed": 0},
        {"strategy__weighting": "public-counts"},
        {"privacy__sample_rate": 0.0, "privacy__expected_batch_size": 20},
        {"privacy__target_epsilon": 8.5},
        {"privacy__target_delta": 1.1e-5},
    ],
)
def test_what_the_policy_refuses_is_refused_before_data_are_read(
    site, deployed, monkeypatch, changes
):
    monkeypatch.setattr(round_handler, "load_client_records", fail_with(AssertionError("read")))
    assert failure_of(train(site, deployed, **changes)) is ClientFailure.POLICY
    assert deployed.entries() == 0


def test_a_task_that_the_policy_does_not_name_is_refused(site, tmp_path):
    deployed = deploy(tmp_path, site.config, tasks=["text-classification"])
    assert failure_of(train(site, deployed)) is ClientFailure.POLICY


@pytest.mark.parametrize("policy", ["", "  ", 3, True, "/no/such/policy.toml"])
def test_without_a_policy_nothing_is_released(site, deployed, policy):
    place = {"data-path": str(deployed.folder / "data.npz"), "policy": policy}
    for node_config in (place, {"data-path": place["data-path"]}):
        context = deployed.context(node_config=node_config)
        assert failure_of(handle_train(site.message(), context)) is ClientFailure.POLICY
    assert deployed.entries() == 0


def test_data_that_the_policy_does_not_name_are_not_read(site, deployed, monkeypatch):
    shutil.copy(deployed.folder / "data.npz", deployed.folder / "other.npz")
    monkeypatch.setattr(round_handler, "load_client_records", fail_with(AssertionError("read")))
    for path in ("other.npz", ".", "../x"):
        place = deployed.context().node_config | {"data-path": str(deployed.folder / path)}
        context = deployed.context(node_config=place)
        assert failure_of(handle_train(site.message(), context)) is ClientFailure.POLICY


def test_a_partition_beside_a_data_path_is_no_way_around_the_policy(site, deployed):
    place = deployed.context().node_config | {"partition-id": 0, "num-partitions": 1}
    context = deployed.context(node_config=place)
    assert failure_of(handle_train(site.message(), context)) is ClientFailure.DATA
    assert deployed.entries() == 0


def test_too_few_records_are_refused(site, tmp_path):
    deployed = deploy(tmp_path, site.config, records=60, min_records=61)
    assert failure_of(train(site, deployed)) is ClientFailure.POLICY
    assert deployed.steps() == 0


def test_a_ledger_that_is_not_there_is_never_made_by_a_client(site, deployed):
    shutil.rmtree(deployed.folder / "ledger")
    (deployed.folder / "second" / "head.json").unlink()
    before = sorted(deployed.folder.rglob("*"))
    assert failure_of(train(site, deployed)) is ClientFailure.LEDGER
    assert sorted(deployed.folder.rglob("*")) == before


def test_a_ledger_that_was_put_back_is_refused(site, deployed):
    shutil.copytree(deployed.folder / "ledger", deployed.folder / "copy")
    assert released(train(site, deployed))
    shutil.rmtree(deployed.folder / "ledger")
    shutil.copytree(deployed.folder / "copy", deployed.folder / "ledger")
    for training in ("", "another-training".replace("-", "0")):
        reply = train(site, deployed, training=training, server_round=2)
        assert failure_of(reply) is ClientFailure.LEDGER


def test_runs_of_other_servers_share_the_budget(site, deployed):
    assert released(train(site, deployed)) and released(train(site, deployed, server_round=2))
    for epsilon in (8.0, 1.0):
        reply = train(site, deployed, training="b" * 32, privacy__target_epsilon=epsilon)
        assert failure_of(reply) is ClientFailure.BUDGET_EXHAUSTED
    assert deployed.steps() == 4


def test_a_copy_of_the_data_under_another_name_shares_the_budget(site, deployed):
    """The operator renames the file and calls it another data set: the records are known."""
    assert released(train(site, deployed)) and released(train(site, deployed, server_round=2))
    shutil.copy(deployed.folder / "data.npz", deployed.folder / "renamed.npz")
    policy = deployed.folder / "policy.toml"
    renamed = policy.read_text()
    renamed = renamed[renamed.index("[datasets") :].replace("records]", "others]")
    policy.write_text(policy.read_text() + renamed.replace("data.npz", "renamed.npz"))
    place = {"data-path": str(deployed.folder / "renamed.npz"), "policy": str(policy)}
    content = site.content(server_round=1)
    content["config"][TRAINING_KEY] = "b" * 32
    reply = handle_train(site.message(content), deployed.context(node_config=place))
    assert failure_of(reply) is ClientFailure.BUDGET_EXHAUSTED
    assert deployed.ledger.book().group("others") == {"records", "others"}


def test_a_repeated_message_gets_the_same_bytes_from_another_process(site, deployed):
    first = released(train(site, deployed))
    assert first is not None and released(train(site, deployed)) == first
    assert deployed.steps() == 2
    other = site.content(server_round=1)
    name, array = next(iter(other["arrays"].items()))
    other["arrays"][name] = type(array)(array.numpy() + 1)
    from tests.client_app.conftest import everything

    other[WIRE_KEY] = everything(other["arrays"])
    second = released(handle_train(site.message(other), deployed.context()))
    assert second not in (None, first) and deployed.steps() == 4
    plan = site.content(server_round=1)
    plan[ROUND_PLAN_KEY]["lr-b"] = 0.25
    reply = handle_train(site.message(plan), deployed.context())
    assert failure_of(reply) is ClientFailure.BUDGET_EXHAUSTED


def test_data_that_change_in_the_middle_of_a_training_are_refused(site, deployed, caplog):
    assert released(train(site, deployed))
    write_data(deployed.folder / "data.npz", site.config, 59)
    with caplog.at_level(logging.ERROR):
        reply = train(site, deployed, server_round=2)
    assert failure_of(reply) is ClientFailure.PRIVACY
    assert "the records of records changed in the middle of the training" in caplog.text
    # Another training's use of the new data does not open the old one to them.
    assert released(train(site, deployed, training="b" * 32, privacy__target_epsilon=0.1))
    assert failure_of(train(site, deployed, server_round=2)) is ClientFailure.PRIVACY


def test_data_that_change_while_they_are_read_are_refused(site, deployed, monkeypatch, caplog):
    load = round_handler.load_client_records

    def meanwhile(*args, **kwargs):
        records = load(*args, **kwargs)
        write_data(deployed.folder / "data.npz", site.config, 50)
        return records

    for number in (1, 2):  # whether or not the first stamp is known
        with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
            patch.setattr(round_handler, "load_client_records", meanwhile)
            assert failure_of(train(site, deployed)) is ClientFailure.DATA
        assert "changed while they were read" in caplog.text
        caplog.clear()
        write_data(deployed.folder / "data.npz", site.config, 60)
        assert deployed.steps() == 2 * (number - 1)
        assert released(train(site, deployed, server_round=number))


def test_settings_that_leave_the_records_alone_write_nothing_into_the_ledger(site, deployed):
    assert released(train(site, deployed))
    before = deployed.entries()
    for changes in (
        {"data__alpha": 0.7},
        {"data__image_column": "x"},
        {"data__min_records": 3},
        {"data__test_path": "/elsewhere"},
    ):
        assert released(train(site, deployed, **changes))
    assert deployed.entries() == before


def test_a_server_cannot_find_the_count_by_asking_for_more_and_more_records(site, tmp_path):
    """``data.min-records`` is compared with the public figure: the reply is no comparison."""
    deployed = deploy(tmp_path, site.config, records=60, public_records=100)
    for fewest in (1, 59, 60, 61, 100):
        assert released(train(site, deployed, data__min_records=fewest))
    for fewest in (101, 10_000):
        reply = train(site, deployed, data__min_records=fewest)
        assert failure_of(reply) is ClientFailure.DATA
    assert deployed.steps() == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy__weighting": "uniform"},
        {"strategy__weighting": "public-counts"},
        {"privacy__sample_rate": 0.0, "privacy__expected_batch_size": 20},
    ],
)
def test_no_number_of_a_reply_depends_on_the_true_count(site, tmp_path, changes):
    """Two sites whose files have 60 and 90 records and whose policies say 100 of both."""
    said, plans = [], []
    for records in (60, 90):
        folder = tmp_path / str(records)
        folder.mkdir()
        deployed = deploy(folder, site.config, records=records, public_records=100)
        reply = train(site, deployed, **changes)
        assert released(reply)
        content = reply.content
        said.append([dict(content[key]) for key in ("metrics", "privacy", WIRE_KEY)])
        said[-1].append(
            [(name, array.shape, array.dtype) for name, array in content["arrays"].items()]
        )
        (plan,) = deployed.ledger.book().plans.values()
        plans.append((plan.numbers, plan.sample_rate, plan.noise_multiplier))
    assert said[0] == said[1] and plans[0] == plans[1]
    if changes.get("strategy__weighting") == "public-counts":
        assert said[0][0]["num-examples"] == 100
    if "privacy__expected_batch_size" in changes:
        assert said[0][1]["sample-rate"] == 0.2


def test_the_normaliser_is_the_public_figures(site, tmp_path, monkeypatch):
    from client_app import private_round

    made = []
    original = private_round.PrivateGradient

    def keep(*args):
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(private_round, "PrivateGradient", keep)
    deployed = deploy(tmp_path, site.config, records=60, public_records=100)
    assert released(train(site, deployed))
    (gradient,) = made
    assert gradient.plan.expected_batch_size == pytest.approx(0.3 * 100)
    draws = [gradient._sampler.draw() for _ in range(50)]
    assert max(draw.max(initial=0) for draw in draws) < 60  # the coins are the true records'
    assert 10 < np.mean([len(draw) for draw in draws]) < 26


def test_a_site_of_public_records_may_say_so(site, tmp_path):
    write_data(tmp_path / "data.npz", site.config, 60)
    write_policy(tmp_path, only_privatised=False)
    Ledger.create(tmp_path / "ledger", tmp_path / "second" / "head.json")
    deployed = Deployed(tmp_path, {**site.config, "data.path": "", "strategy.weighting": "uniform"})
    assert released(train(site, deployed, privacy__mode="none"))
    assert released(train(site, deployed, privacy__insecure_test_seed=0, training="c" * 16))
    noise = [plan.noise_multiplier for plan in deployed.ledger.book().plans.values()]
    assert noise == [0.0, 0.0]


@pytest.mark.parametrize("only_privatised", [True, False])
def test_a_release_without_a_guarantee_is_never_forgotten(site, tmp_path, only_privatised):
    """Public records that become protected ones: nothing can be promised for them any more."""
    write_data(tmp_path / "data.npz", site.config, 60)
    write_policy(tmp_path, only_privatised=False)
    Ledger.create(tmp_path / "ledger", tmp_path / "second" / "head.json")
    deployed = Deployed(tmp_path, {**site.config, "data.path": "", "strategy.weighting": "uniform"})
    assert released(train(site, deployed, privacy__mode="none"))
    write_policy(tmp_path, max_epsilon=100.0, only_privatised=only_privatised)
    reply = train(site, deployed, training="c" * 16)
    assert failure_of(reply) is ClientFailure.BUDGET_EXHAUSTED
