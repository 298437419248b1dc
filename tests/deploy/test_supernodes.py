"""Real processes on loopback: a SuperLink, two SuperNodes, each with data of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cli.superlink import flower_environment, flower_executable
from privacy import Ledger
from tests.federation.tiny import changed, make_tiny

pytestmark = pytest.mark.deploy
ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started(*command: str, log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    """Run a command in a process group of its own, which ends with the block."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(flower_executable(command[0])), *command[1:]],
            env=environment, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            for stop in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, stop)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=10)


def wait_for_http(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"nothing answers on port {port}")


def flags(config: dict) -> str:
    return " ".join(
        f"{key}={json.dumps(value) if isinstance(value, str) else value}"
        for key, value in config.items()
    )


def make_site(folder: Path, data: Path) -> str:
    """A site's policy and empty ledger; the node config that names them."""
    policy = folder / f"{data.stem}.toml"
    place, head = folder / f"ledger-{data.stem}", folder / "heads" / f"{data.stem}.json"
    policy.write_text(
        f'[ledger]\npath = "{place}"\nhead = "{head}"\n'
        f'[datasets.{data.stem}]\ndata-paths = ["{data}"]\nmax-epsilon = 8.0\nmax-delta = 2e-5\n'
        'min-records = 50\ntasks = ["image-classification"]\n'
    )
    policy.chmod(0o600)
    Ledger.create(place, head)
    return f'data-path="{data}" policy="{policy}" device="cpu"'


def spent(folder: Path, name: str) -> list[tuple[int, int]]:
    """Steps and rounds of each training, by a site's ledger."""
    ledger = Ledger(folder / f"ledger-{name}", folder / "heads" / f"{name}.json")
    return [(plan.steps, len(plan.rounds)) for plan in ledger.book().plans.values()]


def test_sites_train_on_their_own_files_and_not_beyond_their_own_budget(tmp_path):
    config = make_tiny(tmp_path)
    arrays = np.load(str(config["data.path"]))
    sites = []
    for site in range(2):  # disjoint records, each on its site's own disk
        sites.append(tmp_path / f"site-{site}.npz")
        np.savez(sites[-1], x=arrays["x_train"][site::2], y=arrays["y_train"][site::2])
    test_file = tmp_path / "test.npz"
    np.savez(test_file, x=arrays["x_test"], y=arrays["y_test"])
    config = changed(
        config,
        **{
            "data__path": "",
            "data__test_path": str(test_file),
            "output_dir": str(tmp_path / "out"),
            "strategy__weighting": "uniform",
        },
    )
    environment = flower_environment(tmp_path / "home")
    (tmp_path / "home").mkdir()
    port = free_port()
    (tmp_path / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n"
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(started(
            "flower-superlink", "--insecure", "--port", str(port),
            "--disable-runtime-dependency-installation",
            log=tmp_path / "superlink.log", environment=environment,
        ))  # fmt: skip
        wait_for_http(port)
        for site, path in enumerate(sites):
            stack.enter_context(started(
                "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}",
                "--port", str(free_port()), "--node-config", make_site(tmp_path, path),
                log=tmp_path / f"supernode-{site}.log", environment=environment,
            ))  # fmt: skip
        logs, statuses = "", []
        for _ in range(2):  # the second run asks for as much again
            done = subprocess.run(
                [str(flower_executable("flwr")), "run", str(ROOT), "here", "--stream", "-c",
                 flags(config)],
                env=environment, capture_output=True, text=True, timeout=400,
            )  # fmt: skip
            listed = subprocess.run(
                [str(flower_executable("flwr")), "ls", "here", "--format", "json"],
                env=environment, capture_output=True, text=True, timeout=60,
            )  # fmt: skip
            logs += done.stdout
            statuses.append(sorted(r["status"] for r in json.loads(listed.stdout)["runs"]))
    logs += "".join(log.read_text() for log in tmp_path.glob("*.log"))
    assert statuses == [
        ["finished:completed"],
        ["finished:completed", "finished:failed"],
    ], logs
    assert "the client's privacy budget does not allow this round" in logs
    assert "over its largest epsilon 8 at delta 2e-05" in logs  # in the site's own log
    (result,) = (tmp_path / "out").glob("*/result.json")
    got = json.loads(result.read_text())
    assert (got["clients"], got["rounds"]) == (2, 2), logs
    # Both rounds' steps were charged, each in a ClientApp process of its own; then no more.
    assert 7.9 < got["epsilon"] <= 8.0
    assert [spent(tmp_path, f"site-{site}") for site in range(2)] == [[(4, 2)], [(4, 2)]]
