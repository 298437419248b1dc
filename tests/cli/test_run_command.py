"""``python -m cli.run``: what it asks of Flower, how it fails, what it prints at the end."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args
from hypothesis import example, given
from hypothesis import strategies as st

from cli import run as command
from cli import superlink
from cli.run import _parser, _toml, main, parse_overrides, print_result, simulation_config
from cli.superlink import SuperLinkError, flower_environment, simulation_superlink
from federation.run_files import RunFolder
from federation.settings import Settings, SettingsError


def overrides(*arguments: str) -> dict:
    return parse_overrides(_parser().parse_args(list(arguments)))


# Options.


def test_without_options_only_the_output_folder_is_set():
    assert overrides() == {"output-dir": str(command.ROOT / "runs")}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--method", "ro-lora"], {"strategy.method": "ro-lora"}),
        (["--rounds", "3"], {"strategy.num-rounds": 3}),
        (["--seed", "0"], {"seed": 0}),
        (["--epsilon", "1"], {"privacy.target-epsilon": 1.0}),
        (["--epsilon", "0.5"], {"privacy.target-epsilon": 0.5}),
        (["--epsilon", "none"], {"privacy.mode": "none"}),
        (["--config", "strategy.lr-a=0.25"], {"strategy.lr-a": 0.25}),
        (["--config", 'device="cpu"'], {"device": "cpu"}),
        (["--config", "privacy.target-delta=1e-6"], {"privacy.target-delta": 1e-6}),
        (
            ["--config", "strategy.lr-a=0.25 seed=3   device='cpu'"],
            {"strategy.lr-a": 0.25, "seed": 3, "device": "cpu"},
        ),
        (["--config", "seed=3", "--config", "lora.r=2"], {"seed": 3, "lora.r": 2}),
        (["--config", "seed=3\nlora.r=2"], {"seed": 3, "lora.r": 2}),
        (["--config", ""], {}),
        (["--config", 'data.path="two words.csv"'], {"data.path": "two words.csv"}),
        # What is said last and most exactly wins.
        (["--rounds", "3", "--config", "strategy.num-rounds=5"], {"strategy.num-rounds": 5}),
    ],
)
def test_each_option_becomes_its_setting(arguments, expected):
    got = overrides(*arguments)
    del got["output-dir"]
    assert got == expected
    assert {k: type(v) for k, v in got.items()} == {k: type(v) for k, v in expected.items()}


def test_the_output_folder_is_absolute_because_flower_runs_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert overrides("--output-dir", "here") == {"output-dir": str(tmp_path / "here")}


@pytest.mark.parametrize("epsilon", ["much", "1,5", "None", "-"])
def test_an_epsilon_that_is_no_number_is_refused(epsilon):
    with pytest.raises(SettingsError, match=rf"EPSILON: got '{epsilon}'.*number above 0, or none"):
        overrides(f"--epsilon={epsilon}")


@pytest.mark.parametrize("epsilon", ["0", "-1", "nan", "inf", "1e9"])
def test_an_epsilon_out_of_range_is_refused_by_the_settings(epsilon):
    changes = overrides(f"--epsilon={epsilon}")
    with pytest.raises(SettingsError, match=r"privacy\.target-epsilon: got"):
        Settings.from_run_config({**command.default_run_config(), **changes})


@pytest.mark.parametrize("text", ["seed", "seed=", "device=cpu", "seed=1 seed=2", "=3", "a=1, b=2"])
def test_config_that_is_not_toml_is_refused_by_its_text(text):
    with pytest.raises(SettingsError) as refused:
        overrides("--config", text)
    assert "CONFIG" in str(refused.value) and repr(text) in str(refused.value)


def test_a_quoted_value_may_hold_an_equals_sign():
    assert overrides("--config", 'data.path="a b=c.csv"')["data.path"] == "a b=c.csv"


@pytest.mark.parametrize("rounds", ["two", "1.5", ""])
def test_rounds_that_are_no_number_end_the_command(rounds, capsys):
    with pytest.raises(SystemExit) as ended:
        overrides("--rounds", rounds)
    assert ended.value.code == 2 and "--rounds" in capsys.readouterr().err


values = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.booleans(),
    # Flower splits at blanks outside of quotes and knows no escaped quote.
    st.text(st.characters(blacklist_categories=["Cs", "Cc", "Zl", "Zp"],
            blacklist_characters="\"'\\", max_codepoint=0xFFFF), max_size=8),
)  # fmt: skip


@given(changes=st.dictionaries(st.sampled_from(sorted(command.default_run_config())), values))
@example(changes={"output-dir": "/tmp/with blank/é", "seed": 3, "strategy.lr-a": 1e-05})
@example(changes={"data.path": "a=b c = d"})
def test_flower_understands_the_overrides_as_they_were_meant(changes):
    text = " ".join(f"{key}={_toml(value)}" for key, value in changes.items())
    got = parse_config_args([text])
    assert got == changes
    assert {k: type(v) for k, v in got.items()} == {k: type(v) for k, v in changes.items()}


def test_flower_understands_characters_beyond_16_bits():
    assert parse_config_args([f"output-dir={_toml('/tmp/😀')}"]) == {"output-dir": "/tmp/😀"}


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


# With scripts in the place of Flower's commands.


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
        return command._run(argparse.Namespace(clients=3), settings, {"seed": 1})

    return run


def write_run(tmp_path: Path, *, result: bool) -> str:
    """Shell that writes a run's folder as the server would."""
    row = (
        '{"round": %d, "accuracy": 0.5, "epsilon": 1.0, "bytes_up": 0, "bytes_down": 0, '
        '"clients": 3, "failures": 0, "seconds": 1.0}'
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
