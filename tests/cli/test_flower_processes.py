"""What the command starts, follows and stops, with scripts in the place of Flower's commands."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli import run as command
from cli import superlink
from cli.superlink import SuperLinkError, flower_environment, simulation_superlink
from federation.run_files import RunFolder
from federation.settings import Settings


@pytest.fixture
def flower(tmp_path, monkeypatch):
    """Put a shell script in the place of each of Flower's commands."""

    def script(name: str, text: str) -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    find = lambda name: tmp_path / "bin" / name  # noqa: E731
    monkeypatch.setattr(superlink, "flower_executable", find)
    monkeypatch.setattr(command, "flower_executable", find)
    monkeypatch.setattr(superlink, "_STOP_SECONDS", 2.0)
    return script


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process ended (a zombie that nobody reaps has)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


def read_pid(path: Path) -> int:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if path.exists() and path.read_text().endswith("\n"):
            return int(path.read_text())
        time.sleep(0.02)
    raise AssertionError("the script did not start")


def test_a_superlink_that_dies_at_once_is_an_error_that_names_its_log(flower, tmp_path):
    flower("flower-superlink", "echo the port is taken; exit 3")
    home = tmp_path / "home"
    with (
        pytest.raises(SuperLinkError, match=r"ended with code 3.*superlink\.log"),
        simulation_superlink(home, dict(os.environ)),
    ):
        pytest.fail("entered without a SuperLink")
    assert "the port is taken" in (home / "superlink.log").read_text()


def test_a_superlink_that_never_answers_is_given_up_and_stopped(flower, tmp_path, monkeypatch):
    monkeypatch.setattr(superlink, "_START_SECONDS", 0.5)
    flower("flower-superlink", f"echo $$ > {tmp_path}/pid; exec sleep 60")
    with (
        pytest.raises(SuperLinkError, match=r"did not answer within 0\.5 s"),
        simulation_superlink(tmp_path / "home", dict(os.environ)),
    ):
        pytest.fail("entered without a SuperLink")
    assert gone(read_pid(tmp_path / "pid"))


@pytest.mark.parametrize("raises", [False, True])
def test_a_healthy_superlink_is_used_and_stopped_after(flower, tmp_path, raises):
    flower(
        "flower-superlink",
        f'echo "$@" > {tmp_path}/arguments\necho $$ > {tmp_path}/pid\n'
        f"mkdir -p {tmp_path}/web && echo ok > {tmp_path}/web/health\n"
        f'while [ "$1" != --port ]; do shift; done\n'
        f'exec {sys.executable} -m http.server "$2" --bind 127.0.0.1 --directory {tmp_path}/web',
    )
    home = tmp_path / "home"
    try:
        with simulation_superlink(home, dict(os.environ)) as connection:
            pid = read_pid(tmp_path / "pid")
            assert not gone(pid, 0.1)
            config = (home / "config.toml").read_text()
            port = (tmp_path / "arguments").read_text().split()[-1]
            assert f"[superlink.{connection}]" in config
            assert f'address = "127.0.0.1:{port}"' in config
            if raises:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert raises
    assert gone(pid)
    assert "--simulation" in (tmp_path / "arguments").read_text()


@pytest.mark.parametrize("stubborn", [False, True])
def test_stopping_ends_the_whole_process_group(flower, tmp_path, monkeypatch, stubborn):
    """The SuperLink's children (Ray among them) must not outlive the command."""
    monkeypatch.setattr(superlink, "_STOP_SECONDS", 0.5)
    ignore = "trap '' TERM\n" if stubborn else ""
    script = flower(
        "leader", f"{ignore}sleep 60 &\necho $! > {tmp_path}/child\nwhile :; do sleep 0.1; done"
    )
    process = subprocess.Popen([str(script)], start_new_session=True)
    try:
        child = read_pid(tmp_path / "child")
        assert not gone(child, 0.1)
        superlink._stop(process)
        assert process.returncode == -(signal.SIGKILL if stubborn else signal.SIGTERM)
        assert gone(child)
    finally:
        process.kill()


def test_stopping_what_has_ended_is_no_error(flower):
    process = subprocess.Popen([str(flower("leader", "exit 0"))], start_new_session=True)
    process.wait()
    superlink._stop(process)
    assert process.returncode == 0


def test_flower_stays_offline_and_inside_its_home(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    environment = flower_environment(tmp_path)
    assert environment["FLWR_HOME"] == str(tmp_path)
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "1"  # ours is left alone


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('echo \'{"runs": [{"status": "finished:completed"}]}\'', "finished:completed"),
        ('echo \'{"runs": [{"status": "finished:failed"}]}\'', "finished:failed"),
        ("echo '{\"runs\": []}'", "unknown"),
        ("echo no JSON", "unknown"),
        ("echo cannot connect >&2; exit 1", "unknown (flwr ls ended with 1: cannot connect)"),
    ],
)
def test_the_status_is_flowers_word_or_unknown(flower, answer, expected):
    flower("flwr", answer)
    assert command._status(5, "make-run", dict(os.environ)).startswith(expected)


@pytest.fixture
def fake_run(flower, tmp_path, monkeypatch):
    """Run the command with a script for ``flwr`` and no SuperLink."""
    import contextlib

    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(
        command, "simulation_superlink", lambda home, _env: contextlib.nullcontext("make-run")
    )
    (tmp_path / ".flwr").mkdir()

    def run(script: str, status: str) -> RunFolder:
        listing = f'echo \'{{"runs": [{{"status": "{status}"}}]}}\''
        flower("flwr", f'if [ "$1" = ls ]; then {listing}; exit; fi\n{script}')
        settings = Settings.from_run_config(
            {"output-dir": str(tmp_path / "runs"), "strategy.num-rounds": 1}
        )
        return command._run(argparse.Namespace(clients=3, app="."), settings, {"seed": 1})

    return run


def write_run(tmp_path: Path, *, result: bool) -> str:
    """Shell that writes a run's folder as the server would."""
    row = (
        '{"round": %d, "accuracy": 0.5, "epsilon": 1.0, "bytes_up": 0, "bytes_down": 0, '
        '"clients": 3, "failures": 0, "seconds": 1.0, "round_seconds": 1.0}'
    )
    folder = tmp_path / "runs" / "20260101-000000-la-lora-42"
    lines = [
        "echo 'Successfully started run 42'",
        f"mkdir -p {folder}",
        *(f"echo '{row % number}' >> {folder}/metrics.jsonl" for number in (0, 1)),
    ]
    return "\n".join(lines + ([f"echo '{{}}' > {folder}/result.json"] if result else []))


def test_a_completed_run_is_followed_round_by_round(fake_run, tmp_path, capsys):
    folder = fake_run(write_run(tmp_path, result=True), "finished:completed")
    assert folder.path.name.endswith("-42")
    out = capsys.readouterr().out
    assert out.count("round 0/1") == out.count("round 1/1") == 1
    assert "3 simulated clients" in out and "[3/3] Done" in out


@pytest.mark.parametrize(
    ("result", "status"),
    [(True, "finished:failed"), (True, "running"), (False, "finished:completed")],
)
def test_a_run_is_done_only_if_flower_says_so_and_a_result_is_there(
    fake_run, tmp_path, result, status
):
    """``flwr run --stream`` ends with 0 even when the run crashed."""
    with pytest.raises(command.RunFailed) as failed:
        fake_run(write_run(tmp_path, result=result), status)
    assert status in str(failed.value) and "started run 42" in str(failed.value)


def test_a_run_that_never_starts_shows_the_end_of_the_log(fake_run):
    lines = "\n".join(f"echo line {n}." for n in range(60))
    with pytest.raises(command.RunFailed, match="never started") as failed:
        fake_run(f"{lines}\nexit 1", "finished:completed")
    assert "line 59." in str(failed.value) and "line 5." not in str(failed.value)
