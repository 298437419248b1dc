"""One planted record, and a search for it in every byte that leaves a site and in every log."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Error, Message

from client_app import private_round, round_handler
from client_app.replay import pack_reply
from client_app.round_handler import handle_train
from client_app.session import forget
from federation.settings import Settings
from privacy import Ledger
from server_app.federation_run import NothingLearned, run_federation
from tests import models
from tests.client_app.replies import CANARY, fail_with
from tests.fake_grid import FakeGrid

SITES = 2
TEXT = f"{CANARY} qzxv 4711"


@pytest.fixture
def sites(tmp_path: Path):
    """Two sites with csv files, policies and ledgers; the canary is a record of the first."""
    generator = np.random.default_rng(0)
    for name, count in (("site-0", 60), ("site-1", 60), ("test", 30)):
        labels = generator.integers(0, 2, count)
        lines = [f"{'good' if label else 'bad'} film {n},{label}" for n, label in enumerate(labels)]
        if name == "site-0":
            lines[7] = f"{TEXT},1"
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    (tmp_path / "roberta").mkdir()
    models.make_text(tmp_path / "roberta", "roberta")
    node_configs = [make_site(tmp_path, f"site-{site}") for site in range(SITES)]
    config = {
        "data.source": "csv",
        "data.test-path": str(tmp_path / "test.csv"),
        "data.num-labels": 2,
        "model.source": "transformers",
        "model.name": str(tmp_path / "roberta"),
        "model.max-length": 16,
        "lora.r": 2,
        "strategy.num-rounds": 2,
        "strategy.local-steps": 2,
        "strategy.weighting": "uniform",
        "privacy.sample-rate": 1.0,  # the canary is in every batch
        "output-dir": str(tmp_path / "runs"),
        "device": "cpu",
    }
    return config, node_configs


def make_site(folder: Path, name: str) -> dict[str, str]:
    policy = folder / f"{name}.toml"
    policy.write_text(
        f'[ledger]\npath = "{folder / name}"\nhead = "{folder / "heads" / name}"\n'
        f'[datasets.{name}]\ndata-paths = ["{folder / name}.csv"]\nmax-epsilon = 8.0\n'
        'max-delta = 2e-5\nmin-records = 10\ntasks = ["text-classification"]\n'
    )
    policy.chmod(0o600)
    Ledger.create(folder / name, folder / "heads" / name)
    return {"data-path": str(folder / f"{name}.csv"), "policy": str(policy)}


def federate(sites, handler=handle_train) -> tuple[Path, FakeGrid]:
    config, node_configs = sites
    forget()
    grid = FakeGrid([handler] * SITES, config)
    for context, node_config in zip(grid.contexts, node_configs, strict=True):
        context.node_config = node_config
    runs = Path(str(config["output-dir"]))
    try:
        return run_federation(grid, Settings.from_run_config(config), run_id=1).path, grid
    except NothingLearned:
        (folder,) = runs.iterdir()
        return folder, grid


def traces_of_the_canary() -> dict[str, bytes]:
    """What a leak could look like: the text, parts of it, its digest."""
    digest = hashlib.sha256(json.dumps(TEXT).encode())
    return {
        "text": TEXT.encode(), "utf-16": TEXT.encode("utf-16-le"), "word": b"qzxv",
        "name": CANARY.encode(), "digest": digest.digest(),
        "hex digest": digest.hexdigest().encode(),
    }  # fmt: skip


def what_left(folder: Path, grid: FakeGrid) -> dict[str, bytes]:
    """Every byte that a server got, and every file that it wrote."""
    left = {
        f"reply {n}": pack_reply(reply.content)
        if reply.has_content()
        else f"{reply.error.code} {reply.error.reason}".encode()
        for n, reply in enumerate(grid.received)
    }
    files = (path for path in folder.rglob("*") if path.is_file())
    return left | {str(path.relative_to(folder)): path.read_bytes() for path in files}


def found(traces: dict[str, bytes], places: dict[str, bytes]) -> list[tuple[str, str]]:
    return [(t, p) for t, trace in traces.items() for p, one in places.items() if trace in one]


@pytest.mark.parametrize("failing", ["", "train_round", "load_client_records", "open_session"])
def test_a_planted_record_is_in_no_reply_no_file_of_the_server_and_no_log(
    sites, monkeypatch, caplog, capfd, failing
):
    """Also when something fails with the record in its text, wherever that is."""
    if failing:
        module = private_round if failing == "train_round" else round_handler
        monkeypatch.setattr(module, failing, fail_with(RuntimeError(f"cannot parse {TEXT}")))
    with caplog.at_level(logging.DEBUG):
        folder, grid = federate(sites)
    assert len(grid.received) == 2 * SITES
    assert all(reply.has_error() == bool(failing) for reply in grid.received)
    out, err = capfd.readouterr()
    logs = {"log": caplog.text.encode(), "stdout": out.encode(), "stderr": err.encode()}
    assert found(traces_of_the_canary(), what_left(folder, grid) | logs) == []


def test_a_bad_cell_of_the_canary_is_not_quoted(sites, caplog, capfd):
    file = Path(sites[1][0]["data-path"])
    file.write_text(file.read_text().replace(f"{TEXT},1", f"{TEXT},{CANARY}"))
    with caplog.at_level(logging.DEBUG):
        folder, grid = federate(sites)
    assert [reply.has_error() for reply in grid.received] == [True, False] * 2
    out, err = capfd.readouterr()
    logs = {"log": caplog.text.encode(), "stdout": out.encode(), "stderr": err.encode()}
    assert found(traces_of_the_canary(), what_left(folder, grid) | logs) == []


def test_the_search_finds_a_leak(sites):
    """The control: an exception's own text as the reply's reason, as Flower would send it."""

    def leaking(message, context):
        handle_train(message, context)
        return Message(Error(code=2, reason=f"cannot parse {TEXT}"), reply_to=message)

    folder, grid = federate(sites, leaking)
    leaks = found(traces_of_the_canary(), what_left(folder, grid))
    assert {trace for trace, _ in leaks} == {"text", "word", "name"}
    assert {place for _, place in leaks} >= {"reply 0", "reply 1"}


def test_the_sites_own_files_hold_the_record_only_as_a_keyed_hash(sites, tmp_path):
    federate(sites)
    own = {str(p): p.read_bytes() for p in (tmp_path / "site-0").rglob("*") if p.is_file()}
    assert len(own) >= 3
    assert found(traces_of_the_canary(), own) == []
