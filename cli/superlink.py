"""A SuperLink of our own for one simulated run, started and stopped with it.

``flwr run`` would start a daemon that outlives the command, keeps the environment of its first
start and listens on a fixed port.  A child process with a free port has none of these surprises.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

CONNECTION = "make-run"
_START_SECONDS = 60.0
_STOP_SECONDS = 10.0


class SuperLinkError(RuntimeError):
    """The SuperLink did not start."""


def flower_executable(name: str) -> Path:
    """Path of one of Flower's commands, beside the Python that runs this."""
    return Path(sys.executable).parent / name


def flower_environment(home: Path) -> dict[str, str]:
    """Environment in which Flower stays offline, quick and inside ``home``."""
    environment = dict(os.environ)
    # The commands of the environment that runs this file, whether it is activated or not.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    if not environment.get("OMP_NUM_THREADS"):
        # Ray gives each worker its share of threads only where the variable is not there at all.
        environment.pop("OMP_NUM_THREADS", None)
    environment.update(
        FLWR_HOME=str(home),
        FLWR_TELEMETRY_ENABLED="0",
        FLWR_DISABLE_UPDATE_CHECK="1",
        FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
        HF_HUB_DISABLE_TELEMETRY="1",
        TOKENIZERS_PARALLELISM="false",
    )
    return environment


@contextlib.contextmanager
def simulation_superlink(home: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Run a SuperLink in simulation mode for the time of the ``with`` block.

    Parameters
    ----------
    home : Path
        ``FLWR_HOME``; gets the connection's address and the log.
    environment : mapping of str to str
        The process's environment.

    Yields
    ------
    str
        Name of the connection, for ``flwr run . NAME``.

    Raises
    ------
    SuperLinkError
        If it does not answer within a minute; the text names the log.
    """
    home.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    log_file = home / "superlink.log"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "127.0.0.1:{port}"\ninsecure = true\n',
        encoding="utf-8",
    )
    command = [
        str(flower_executable("flower-superlink")),
        *("--insecure", "--simulation", "--isolation", "subprocess"),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    with log_file.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, env=dict(environment), stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait_until_healthy(process, port, log_file)
            yield CONNECTION
        finally:
            _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log_file: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SuperLinkError(f"the SuperLink ended with code {process.poll()}: see {log_file}")
        if _is_healthy(port):
            return
        time.sleep(0.1)
    raise SuperLinkError(f"the SuperLink did not answer within {_START_SECONDS:g} s: {log_file}")


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:  # URLError is one: not there yet
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the SuperLink and what it started: they share its process group."""
    for stop_signal in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, stop_signal)
        try:
            process.wait(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        if stop_signal is signal.SIGKILL:
            return
        # The leader is gone; its group may need a moment more before the last signal.
        time.sleep(0.2)
