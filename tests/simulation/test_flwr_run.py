"""Real runs: Flower's SuperLink, Ray workers, the embedded default.  Marked slow."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cli.superlink import flower_executable
from client_app.trace import read_trace

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def run_command(*arguments: str, runs: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli.run", "--output-dir", str(runs), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540)


def flower_processes() -> set[int]:
    found = set()
    for process in psutil.process_iter(["pid", "cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if re.search(r"flower-super(link|exec)|flwr-simulation|raylet|gcs_server", line):
            found.add(process.info["pid"])
    return found


def test_the_default_federation_learns_privately_and_leaves_nothing_running(tmp_path, monkeypatch):
    """The command behind `make run`, shortened to four rounds of a tighter budget."""
    monkeypatch.setenv("DP_LORA_TRACE", str(tmp_path / "trace"))
    before = flower_processes()
    done = run_command("--rounds", "4", "--epsilon", "4", "--seed", "3", runs=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.strip().splitlines()
    path = Path(lines[-1])
    assert path.name == "result.json"
    result = json.loads(path.read_text())
    assert (result["method"], result["rounds"], result["clients"]) == ("la-lora", 4, 5)
    assert result["accuracy_start"] <= 0.25
    assert result["accuracy_end"] >= 0.70
    assert 3.9 < result["epsilon"] <= 4.0
    assert (Path(result["adapter"]) / "adapter_model.safetensors").is_file()
    assert sum(line.strip().startswith("round") for line in lines) == 5
    assert flower_processes() <= before
    messages = read_trace(tmp_path / "trace")
    assert sorted((m["round"], m["node"]) for m in messages) == [
        (server_round, node) for server_round in (1, 2, 3, 4) for node in range(5)
    ]
    # Five clients, each worker with a core of its own and one backbone for all that it plays.
    assert {m["backbone_loads"] for m in messages} == {1}
    assert {m["threads"] for m in messages} == {1}
    assert len({m["pid"] for m in messages}) <= os.cpu_count()


def test_a_run_that_cannot_work_fails_loudly(tmp_path):
    """All clients refuse: `flwr run --stream` ends with 0, the command must not."""
    done = run_command(
        *("--clients", "2", "--rounds", "2"),
        *("--config", "data.min-records=100000 strategy.local-steps=2"),
        runs=tmp_path,
    )
    assert done.returncode == 1
    assert "FAILED" in done.stderr
    assert "finished:failed" in done.stderr
    assert "none of the 2 rounds had 2 valid replies" in done.stderr
    assert not list(tmp_path.glob("*/result.json"))


def simulation_of(before: set[int], runs: Path) -> int:
    """Wait until the new run has finished two rounds; its process, which holds the ServerApp."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        lines = [f.read_text().count("\n") for f in runs.glob("*/metrics.jsonl")]
        if lines and lines[0] >= 3:
            for pid in flower_processes() - before:
                if "flwr-simulation" in " ".join(psutil.Process(pid).cmdline()):
                    return pid
        time.sleep(0.2)
    raise AssertionError("the run did not get to its second round")


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_killed_server_app_is_resumed(tmp_path):
    """docs/resume.md: SIGKILL in the middle of the run, then the command with ``resume``."""
    asked = ("--method", "as-lora", "--rounds", "8", "--seed", "3", "--clients", "3")
    before = flower_processes()
    command = [sys.executable, "-m", "cli.run", "--output-dir", str(tmp_path / "a"), *asked]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as run:  # fmt: skip
        os.kill(simulation_of(before, tmp_path / "a"), signal.SIGKILL)
        assert run.wait(timeout=200) != 0
    (cut,) = (tmp_path / "a").iterdir()
    assert not (cut / "result.json").exists() and (cut / "checkpoint.npz").exists()
    done = run_command(*asked, "--config", f'resume="{cut}"', runs=tmp_path / "b")
    assert done.returncode == 0, done.stdout + done.stderr
    path = Path(done.stdout.strip().splitlines()[-1])
    result, rows = json.loads(path.read_text()), metrics_of(path.parent)
    assert result["rounds"] == 8
    assert [row["round"] for row in rows] == list(range(9))
    assert rows[:3] == metrics_of(cut)[:3]
    assert result["accuracy_end"] >= 0.8
    # Clients that had answered in the round that was cut off sent the same replies again.
    assert 7.9 < result["epsilon"] <= 8.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_plain_flwr_run_works_offline_without_any_preparation(tmp_path):
    """Flower runs `uv sync` on the app for each run; offline with an empty cache it must do."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "UV_"))}
    port = free_port()
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}",
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_TELEMETRY_ENABLED": "0",  # a test sends nothing anywhere
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "UV_OFFLINE": "1",
        "UV_CACHE_DIR": str(tmp_path / "uv"),
        "FLOWER_DP_LORA_RUNS": str(tmp_path / "runs"),
    }
    flwr = str(flower_executable("flwr"))
    config = "strategy.num-rounds=2 strategy.local-steps=2"
    try:
        done = subprocess.run(
            [flwr, "run", ".", "--stream", "-c", config],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        listed = subprocess.run(
            [flwr, "ls", "--format", "json"],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    finally:
        for process in psutil.process_iter(["pid", "cmdline"]):
            line = process.info["cmdline"] or []
            if str(port) in line and any("flower-superlink" in word for word in line):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(os.getpgid(process.info["pid"]), signal.SIGTERM)
    assert done.returncode == 0, done.stdout + done.stderr
    status = json.loads(listed.stdout)["runs"][0]["status"]
    assert status == "finished:completed", done.stdout + done.stderr
    results = list((tmp_path / "runs").glob("*/result.json"))
    assert len(results) == 1
    assert json.loads(results[0].read_text())["clients"] == 2


def test_secure_aggregation_goes_through_flowers_own_messages(tmp_path):
    """docs/client-level.md: four messages a round, state that lasts between them, masked words."""
    done = run_command(
        *("--clients", "4", "--rounds", "2", "--method", "ro-lora"),
        "--config",
        'privacy.mode="record-distributed" strategy.weighting="uniform" strategy.local-steps=1 '
        "strategy.min-available-nodes=4 privacy.registered-clients=4 privacy.least-clients=3 "
        "privacy.registered-records=1000",
        runs=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    path = Path(done.stdout.strip().splitlines()[-1])
    result, rows = json.loads(path.read_text()), metrics_of(path.parent)
    assert [(row["clients"], row["applied"]) for row in rows[1:]] == [(4, True)] * 2
    assert 7.8 < result["epsilon"] <= 8.0
    assert "as long as it keeps to the protocol" in done.stdout
