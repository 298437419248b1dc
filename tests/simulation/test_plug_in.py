"""The plug-in example: somebody else's stock Flower app, before and after it adopts a strategy."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "plug-in"
MOST_CHANGED_LINES = 10


def app_files(name: str) -> dict[str, str]:
    folder = EXAMPLE / name
    paths = [folder / "pyproject.toml", *sorted(folder.rglob("*.py"))]
    return {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in paths}


def changed_lines(old: str, new: str) -> list[str]:
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm="")
    return [line for line in list(lines)[2:] if not line.startswith("@@")]


def test_adopting_a_strategy_changes_a_handful_of_lines():
    before, after = app_files("before"), app_files("after")
    assert set(before) == set(after)
    changed = [line for name in before for line in changed_lines(before[name], after[name])]
    assert 0 < len(changed) <= MOST_CHANGED_LINES, "\n".join(changed)
    for name, text in [*before.items(), *after.items()]:
        tomllib.loads(text) if name.endswith(".toml") else ast.parse(text)


def test_the_page_shows_the_diff_as_it_is():
    page = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```diff\n(.*?)```", page, flags=re.DOTALL)
    before, after = app_files("before"), app_files("after")
    changed = [line for name in before for line in changed_lines(before[name], after[name])]
    assert sorted(line for line in shown.splitlines() if line[:1] in "+-") == sorted(changed)


def test_neither_app_has_uv_sync_fetch_anything():
    for name in ("before", "after"):
        project = tomllib.loads((EXAMPLE / name / "pyproject.toml").read_text(encoding="utf-8"))
        declared = {re.match(r"[\w-]+", d).group() for d in project["project"]["dependencies"]}
        assert set(project["tool"]["uv"]["exclude-dependencies"]) == declared


@pytest.fixture(scope="module")
def her_python(tmp_path_factory) -> Path:
    """Python of an environment with our wheel, her dependencies, and nothing else of ours.

    No network: the dependencies are those of the running interpreter, seen through a .pth file.
    """
    folder = tmp_path_factory.mktemp("her")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)],
        check=True, cwd=folder, timeout=120,
    )  # fmt: skip
    (wheel,) = folder.glob("flower_dp_lora-*.whl")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run(
        [*pip, "--python", str(python), "install", *offline, str(wheel)],
        check=True, cwd=folder, timeout=120,
    )  # fmt: skip
    (site_packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(
        f"{sysconfig.get_paths()['purelib']}\n"
        # She never asked for torchvision; ours may not load beside a CPU torch.
        "import sys; sys.modules['torchvision'] = None\n"
    )
    for script in importlib.metadata.distribution("flwr").entry_points.select(
        group="console_scripts"
    ):
        launcher = python.with_name(script.name)
        launcher.write_text(
            f"#!{python}\nimport sys\nfrom {script.module} import {script.attr}\n"
            f"sys.exit({script.attr}())\n"
        )
        launcher.chmod(0o755)
    return python


def her_environment(python: Path) -> dict[str, str]:
    foreign = ("FLWR_", "UV_", "PYTHON", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    return environment | {"PATH": f"{python.parent}{os.pathsep}{environment['PATH']}"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def flwr_run(name: str, rounds: int, python: Path, folder: Path) -> tuple[str, str]:
    """Run a copy of one of the two apps with plain ``flwr run``; return its status and log."""
    app = shutil.copytree(
        EXAMPLE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*")
    )
    port = free_port()
    environment = her_environment(python) | {
        "FLWR_HOME": str(folder / "home"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_TELEMETRY_ENABLED": "0",  # a test sends nothing anywhere
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "UV_OFFLINE": "1",
        "UV_CACHE_DIR": str(folder / "uv"),
        "OMP_NUM_THREADS": "1",
    }
    flwr = str(python.with_name("flwr"))
    federation = "num-supernodes=3 client-resources-num-cpus=1"
    try:
        done = subprocess.run(
            [flwr, "run", ".", "--stream", "-c", f"num-server-rounds={rounds}",
             "--federation-config", federation],
            cwd=app, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        listed = subprocess.run(
            [flwr, "ls", "--format", "json"],
            cwd=app, env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    finally:
        for process in psutil.process_iter(["pid", "cmdline"]):
            line = process.info["cmdline"] or []
            if str(port) in line and any("flower-superlink" in word for word in line):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(os.getpgid(process.info["pid"]), signal.SIGTERM)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    return json.loads(listed.stdout)["runs"][0]["status"], log


def final_accuracy(log: str) -> float:
    (found,) = re.findall(r"final accuracy (\d\.\d+)", log)
    return float(found)


@pytest.mark.slow
def test_her_environment_has_the_wheel_and_no_other_room_of_ours(her_python, tmp_path):
    def imports(statement: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(her_python), "-c", statement],
            cwd=tmp_path, env=her_environment(her_python), capture_output=True, text=True,
        )  # fmt: skip

    found = imports("import dp_lora.strategies as room; print(room.__file__)")
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()).is_relative_to(her_python.parents[1])
    for room in ("strategies", "privacy", "task", "federation", "client_app", "server_app", "cli"):
        refused = imports(f"import {room}")
        assert refused.returncode == 1
        assert f"ModuleNotFoundError: No module named {room!r}" in refused.stderr


@pytest.mark.slow
def test_the_app_before_adoption_runs(her_python, tmp_path):
    status, log = flwr_run("before", 2, her_python, tmp_path)
    assert status == "finished:completed", log
    assert final_accuracy(log) >= 0.8
    assert "as-lora" not in log


@pytest.mark.slow
def test_the_app_after_adoption_runs_and_says_that_it_is_not_private(her_python, tmp_path):
    """Four rounds: B, A, then two in which scores choose."""
    status, log = flwr_run("after", 4, her_python, tmp_path)
    assert status == "finished:completed", log
    assert "goes on without" not in log, log  # every node's update was valid in every round
    assert final_accuracy(log) >= 0.8
    assert "as-lora" in log
    assert "this run is NOT PRIVATE" in log  # the summary names the words in every run
