"""``python -m cli.run``: what it asks of Flower, how it fails, what it prints at the end."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from cli import run as command
from cli.run import main, print_result, simulation_config
from cli.superlink import SuperLinkError
from federation.run_files import RunFolder

# GPUs.


def share(config: str) -> float:
    numbers = dict(pair.split("=") for pair in config.split())
    return float(numbers.get("client-resources-num-gpus", 0.0))


def test_without_a_gpu_only_cores_are_asked_for():
    assert simulation_config(5, 0) == "num-supernodes=5 client-resources-num-cpus=1"


@pytest.mark.parametrize(
    ("clients", "gpus", "cores", "expected"),
    [
        (5, 1, 2, 0.5),  # two workers at a time share one GPU
        (5, 1, 16, 0.2),
        (5, 2, 2, 1.0),
        (4, 2, 16, 0.5),
        (1, 2, 16, 1.0),  # never more than one
        (2, 8, 16, 1.0),
    ],
)
def test_workers_share_the_gpus_fairly(monkeypatch, clients, gpus, cores, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    config = simulation_config(clients, gpus)
    assert config.startswith(f"num-supernodes={clients} client-resources-num-cpus=1 ")
    assert share(config) == pytest.approx(expected, abs=1e-4)


def workers_that_fit(config: str, gpus: int) -> int:
    """As Ray places them: a share lies on one GPU, in units of 1e-4."""
    return gpus * (10_000 // round(share(config) * 10_000))


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 5, 8, 10, 16])
def test_every_worker_finds_its_share_of_one_gpu(monkeypatch, clients):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert workers_that_fit(simulation_config(clients, 1), 1) >= clients


@pytest.mark.parametrize(("clients", "gpus"), [(6, 1), (7, 1), (5, 2), (7, 4)])
def test_every_worker_finds_its_share_of_a_gpu(monkeypatch, clients, gpus):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert workers_that_fit(simulation_config(clients, gpus), gpus) >= clients


# The end of a run.

RESULT = {
    "method": "la-lora",
    "rounds": 20,
    "clients": 4,
    "accuracy_start": 0.101,
    "accuracy_end": 0.923,
    "epsilon": 7.998,
    "delta": 1e-5,
    "bytes_up": 1_500_000,
    "bytes_down": 2_500_000,
    "seconds": 61.2,
    "adapter": "/runs/x/adapter",
}


def printed(tmp_path, capsys, **changes) -> str:
    folder = RunFolder(tmp_path)
    folder.write_result({**RESULT, **changes})
    print_result(folder, 5)
    return capsys.readouterr().out


def test_the_last_line_is_the_path_of_the_result(tmp_path, capsys):
    lines = printed(tmp_path, capsys).splitlines()
    assert lines[-1] == str(tmp_path / "result.json") and Path(lines[-1]).is_file()
    text = "\n".join(lines)
    words = (
        "la-lora on 5 clients, 20 rounds", "10.1%", "92.3%", "epsilon 8.00 at delta 1e-05",
        "1.5 MB up", "2.5 MB down", "/runs/x/adapter", str(tmp_path / "metrics.jsonl"),
    )  # fmt: skip
    assert [word for word in words if word not in text] == []


def test_a_run_without_privacy_prints_no_guarantee(tmp_path, capsys):
    text = printed(tmp_path, capsys, epsilon=None)
    assert "NOT PRIVATE" in text and "delta" not in text


# Failing loudly.


@pytest.fixture
def nothing_starts(monkeypatch):
    """Make any attempt to start something a failure of the test."""

    def start(*_args, **_kwargs):
        raise AssertionError("started something")

    for owner, name in (
        (subprocess, "Popen"),
        (subprocess, "run"),
        (command, "_run"),
        (command, "_prepare_backbone"),
    ):
        monkeypatch.setattr(owner, name, start)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "fed-avg"], ["strategy.method", "'fed-avg'", "'la-lora'"]),
        (["--rounds", "0"], ["strategy.num-rounds", "got 0"]),
        (["--epsilon", "much"], ["EPSILON", "'much'"]),
        (["--config", "lora.rank=3"], ["lora.rank", "no such setting", "lora-alpha"]),
        (["--config", "strategy.local-steps=3"], ["strategy.local-steps", "even"]),
        (["--config", "{"], ["CONFIG", "'{'"]),
    ],
)
def test_bad_settings_fail_before_anything_is_started(nothing_starts, capsys, arguments, words):
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and "FAILED" in err
    assert [word for word in words if word not in err] == []


@pytest.mark.parametrize("clients", ["1", "0", "-3"])
def test_fewer_clients_than_a_round_needs_are_refused_at_once(nothing_starts, clients):
    assert main(["--clients", clients]) == 1


@pytest.mark.parametrize("error", [SuperLinkError("no port"), command.RunFailed("status")])
def test_a_run_that_fails_is_told_by_text_and_status(monkeypatch, capsys, error):
    def fail(*_args):
        raise error

    monkeypatch.setattr(command, "_prepare_backbone", lambda _settings: None)
    monkeypatch.setattr(command, "_run", fail)
    assert main([]) == 1
    assert f"FAILED: {error}" in capsys.readouterr().err


def test_interrupting_is_no_traceback(monkeypatch, capsys):
    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_prepare_backbone", interrupt)
    assert main([]) == 130
    assert "Stopped" in capsys.readouterr().err


def test_a_run_that_completes_ends_with_0(monkeypatch, capsys, tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_result(RESULT)
    seen = []

    def complete(options, settings, changes):
        seen.append((options.clients, settings.strategy.num_rounds, changes["strategy.method"]))
        return folder

    monkeypatch.setattr(command, "_prepare_backbone", lambda _settings: None)
    monkeypatch.setattr(command, "_run", complete)
    assert main(["--clients", "7", "--rounds", "2", "--method", "ffa-lora"]) == 0
    assert seen == [(7, 2, "ffa-lora")]
    assert capsys.readouterr().out.splitlines()[-1] == str(folder.result)
