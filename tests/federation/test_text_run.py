"""The csv of docs/data.md through a whole federation: two columns and a local text model."""

from __future__ import annotations

import numpy as np
import pytest

from client_app.round_handler import handle_train
from client_app.session import forget
from federation.settings import Settings
from server_app.federation_run import run_federation
from tests import models
from tests.fake_grid import FakeGrid

GOOD, BAD = ("good film", "the plot was good"), ("bad film", "the plot was not good")


@pytest.fixture
def csv_config(tmp_path):
    generator = np.random.default_rng(0)
    for name, count in (("train", 120), ("test", 30)):
        lines = ["text,label"]
        for label in generator.integers(0, 2, count):
            text = generator.choice(GOOD if label else BAD)
            lines.append(f"{text},{'positive' if label else 'negative'}")
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "roberta").mkdir()
    models.make_text(tmp_path / "roberta", "roberta")
    return {
        "data.source": "csv",
        "data.path": str(tmp_path / "train.csv"),
        "data.test-path": str(tmp_path / "test.csv"),
        "data.label-names": "negative,positive",
        "data.partitioner": "iid",
        "model.source": "transformers",
        "model.name": str(tmp_path / "roberta"),
        "model.max-length": 16,
        "lora.r": 2,
        "strategy.num-rounds": 2,
        "strategy.local-steps": 2,
        "privacy.sample-rate": 0.3,
        "output-dir": str(tmp_path / "runs"),
        "device": "cpu",
    }


def test_a_csv_of_two_columns_trains_a_text_model(csv_config):
    forget()
    grid = FakeGrid([handle_train] * 3, csv_config)
    folder = run_federation(grid, Settings.from_run_config(csv_config), run_id=1)
    result = folder.read_result()
    assert (result["clients"], result["rounds"]) == (3, 2)
    assert 7.9 < result["epsilon"] <= 8.0
    assert (folder.adapter / "adapter_model.safetensors").is_file()
    sent = {name for reply in grid.received for name in reply.content["arrays"]}
    assert any("query.lora_A" in name for name in sent)
    assert any("classifier" in name for name in sent)
