"""Whole federations with the methods that change more than a mean, and with what travels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from client_app.round_handler import handle_train
from federation.messages import ClientFailure
from federation.settings import SettingsError
from server_app import federation_run
from strategies import SCORES_KEY, STRATEGIES, LoRAStrategy, kind_of
from strategies.selection import group_of
from task.data import load_test_records
from task.settings import DataSettings

RATES = {f"strategy__lr_{kind}": 0.1 for kind in ("a", "b", "head")}
LEARNS = {
    "privacy__mode": "none",
    "privacy__insecure_test_seed": 5,
    "strategy__num_rounds": 6,
    "strategy__local_steps": 4,
    **RATES,
}
METHODS = {
    "fed-svd": {},
    "fedex-lora": {},
    "flora": {},
    "flex-lora": {"lora__client_ranks": "2,1"},
}
B_FACTORS = 2 * (96 * 2 + 32 * 2)  # two blocks, qkv and proj, r = 2
HEAD = 3 * 32 + 3


@pytest.fixture
def reports(monkeypatch):
    """The report of every round of every run."""
    kept, aggregate = [], LoRAStrategy.aggregate_train

    def keep(self, *args):
        result = aggregate(self, *args)
        kept.append(self.last_round)
        return result

    monkeypatch.setattr(LoRAStrategy, "aggregate_train", keep)
    return kept


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_model_learns_and_its_exported_adapter_gives_its_logits_in_plain_peft(
    federate, tiny, monkeypatch, method
):
    import timm
    from peft import PeftModel

    models = []
    build = federation_run.build_task_model

    def keep(*args, **kwargs):
        models.append(build(*args, **kwargs))
        return models[-1]

    monkeypatch.setattr(federation_run, "build_task_model", keep)
    folder, _ = federate(**LEARNS, **METHODS[method], strategy__method=method)
    result, rows = folder.read_result(), list(folder.read_metrics())[1:]
    assert all(row["applied"] and row["failures"] == 0 for row in rows)
    # 60 balanced images: chance is 1/3, and 0.65 is more than five deviations above it.
    assert result["accuracy_start"] < 0.5
    assert result["accuracy_end"] > 0.65

    (ours,) = models
    data = DataSettings(source="npz", path=tiny["data.path"], num_labels=3)
    test = load_test_records(data, ours.encoder)
    batch = test.batch(np.arange(len(test)))
    base = timm.create_model(f"local-dir:{tiny['model.name']}", pretrained=True, num_classes=3)
    loaded = PeftModel.from_pretrained(base, folder.adapter)
    loaded.eval()
    ours.model.eval()
    with torch.no_grad():
        expected, got = ours.logits(batch), loaded(batch["pixel_values"])
    assert expected.std() > 0.01
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    right = (got.argmax(1) == batch["labels"]).float().mean().item()
    assert right == pytest.approx(result["accuracy_end"])
    ranks = {m.r["default"] for _, m in loaded.named_modules() if hasattr(m, "lora_A")}
    assert (ranks == {2}) == (method not in ("fedex-lora", "flora"))  # folds are in the export


def test_clients_scores_are_one_float_per_block(federate, reports):
    folder, grid = federate(
        strategy__method="as-lora", strategy__score="client", strategy__num_rounds=5
    )
    active = [set(reply.content["arrays"]) for reply in grid.received]
    assert {frozenset(names) for names in active} != {frozenset(active[0])}  # not B alone
    for reply, names in zip(grid.received, active, strict=True):
        scores = reply.content[SCORES_KEY]
        assert set(scores) == {group_of(n, "block") for n in names if kind_of(n) != "head"}
        assert len(scores) == 2
        assert all(type(value) is float for value in scores.values())
    assert all(report.valid == 3 and report.applied and report.private for report in reports)
    assert folder.read_result()["epsilon"] <= 8.0


@pytest.mark.parametrize(("dtype", "per_value"), [("bfloat16", 2), ("float16", 2), ("int8", 1)])
def test_short_values_learn_and_cost_their_bytes(federate, dtype, per_value):
    folder, grid = federate(**LEARNS, strategy__method="fed-svd", wire__dtype=dtype)
    assert folder.read_result()["accuracy_end"] > 0.65
    values = B_FACTORS + HEAD
    # int8: four bytes of scale for each started 256 values of each of six tensors.
    extra = {"bfloat16": 0, "float16": 4, "int8": 4 * (2 * (1 + 1) + 1 + 1)}[dtype]
    for reply in grid.received:
        (array,) = reply.content["arrays"].values()
        assert len(array.data) == per_value * values + extra
    assert folder.read_result()["bytes_up"] == 6 * 3 * (per_value * values + extra)


def test_a_trimmed_mean_of_three_clients_runs_and_shrugs_one_off(federate):
    changes = {**LEARNS, "strategy__trim": 0.34, "strategy__method": "fed-svd"}
    folder, _ = federate([handle_train, handle_train, scaled(-1000.0)], **changes)
    assert folder.read_result()["accuracy_end"] > 0.65
    rows = list(folder.read_metrics())[1:]
    assert all((row["clients"], row["applied"]) == (3, True) for row in rows)


def scaled(factor: float):
    """A client whose update is ``factor`` times as long."""

    def handle(message, context):
        reply = handle_train(message, context)
        arrays = reply.content["arrays"]
        reply.content["arrays"] = ArrayRecord(
            {n: Array((factor * a.numpy()).astype(np.float32)) for n, a in arrays.items()}
        )
        return reply

    return handle


@pytest.mark.parametrize("method", ["fed-svd", "flora", "la-lora"])
def test_an_update_a_hundred_times_too_long_is_refused_by_the_bound(federate, reports, method):
    handlers = [handle_train, scaled(100.0), handle_train]
    federate(handlers, strategy__method=method)
    for report in reports:
        (failure,) = report.failures
        assert failure.startswith("node 2: the update of the ")
        assert "tensors is longer than" in failure and "public plan allows" in failure
        assert report.valid == 2 and report.applied
    reports.clear()
    federate(handlers, strategy__method=method, strategy__norm_bound="off")
    assert [report.failures for report in reports] == [(), ()]
    assert [report.valid for report in reports] == [3, 3]


VARIANTS = (
    {},
    {"strategy__weighting": "uniform"},
    {"privacy__sample_rate": 0.0, "privacy__expected_batch_size": 17},
    {"privacy__sample_rate": 0.0, "privacy__expected_batch_size": 17, **LEARNS,
     "privacy__mode": "record", "privacy__insecure_test_seed": -1, "wire__dtype": "int8",
     "strategy__weighting": "uniform", "strategy__num_rounds": 3},
)  # fmt: skip


@pytest.mark.parametrize("method", sorted(STRATEGIES))
@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_honest_private_clients_are_never_refused(federate, reports, method, variant):
    """Each limit is exceeded with a probability of at most 6e-12; noise is not seeded here."""
    changes = {**METHODS.get(method, {}), **VARIANTS[variant]}
    federate(strategy__method=method, **changes)
    assert len(reports) >= 2
    for report in reports:
        assert (report.failures, report.valid, report.applied) == ((), 3, True)


@pytest.mark.parametrize("method", ["la-lora", "fedex-lora"])
def test_a_site_with_a_rank_of_its_own_is_refused_outside_flex_lora(federate, reports, method):
    def own_rank(message, context):
        context.node_config["lora-r"] = 1
        return handle_train(message, context)

    _, grid = federate(
        [handle_train, own_rank, handle_train], strategy__method=method, privacy__mode="none"
    )
    errors = [reply.error for reply in grid.received if reply.has_error()]
    assert [error.code for error in errors] == [ClientFailure.SETTINGS] * 2
    assert all(report.failures[0].startswith("node 2: error code 1001") for report in reports)
    with pytest.raises(SettingsError, match=r"lora\.client-ranks belongs to"):
        federate(strategy__method=method, lora__client_ranks="2,1")


def test_a_site_with_a_rank_of_its_own_trains_it_in_flex_lora(federate, reports):
    def own_rank(message, context):
        context.node_config["lora-r"] = 1
        return handle_train(message, context)

    _, grid = federate(
        [handle_train, own_rank, handle_train],
        strategy__method="flex-lora",
        privacy__mode="none",
    )
    assert [report.failures for report in reports] == [(), ()]
    for reply in grid.received:
        if "arrays" in reply.content:
            shapes = {n: a.shape for n, a in reply.content["arrays"].items() if "lora_A" in n}
            rank = 1 if reply.metadata.src_node_id == 2 else 2
            assert shapes and all(shape[0] == rank for shape in shapes.values())
