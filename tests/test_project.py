"""The project's own files agree with each other."""

from __future__ import annotations

import ast
import io
import os
import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ROOMS = ("strategies", "privacy", "task", "federation", "client_app", "server_app", "cli")

# What a room may import of the other rooms; docs/architecture.md says why.
MAY_IMPORT = {
    "strategies": set(),
    "privacy": set(),
    "task": set(),
    "federation": {"strategies", "privacy", "task"},
    "client_app": {"strategies", "privacy", "task", "federation"},
    "server_app": {"strategies", "privacy", "task", "federation"},
    "cli": {"federation", "task"},
}


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", text).group() for text in requirements}


def imports_of(room: str) -> set[str]:
    found = set()
    for file in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_downwards_only(room):
    assert imports_of(room) & (set(ROOMS) - {room}) <= MAY_IMPORT[room]


def test_privacy_knows_nothing_of_flower_and_strategies_nothing_of_models():
    assert "flwr" not in imports_of("privacy")
    assert imports_of("strategies").isdisjoint({"peft", "timm", "transformers", "opacus"})


def test_flowers_uv_sync_has_nothing_to_resolve():
    """Flower syncs the app's dependencies for every run, extras included; see pyproject.toml."""
    project = PYPROJECT["project"]
    declared = names(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        declared |= names(extra)
    assert set(PYPROJECT["tool"]["uv"]["exclude-dependencies"]) == declared


def test_constraints_name_only_what_is_declared_or_pulled_in():
    lines = (ROOT / "constraints-cpu.txt").read_text(encoding="utf-8").splitlines()
    pinned = names([line for line in lines if line and not line.startswith("#")])
    excluded = set(PYPROJECT["tool"]["uv"]["exclude-dependencies"])
    assert pinned - excluded == {"torchvision", "ray"}  # come with timm and flwr[simulation]


def test_the_settings_page_is_up_to_date():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "settings_page.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_bundle_holds_the_rooms_and_nothing_else(tmp_path):
    from flwr.cli.build import build_fab_from_disk

    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT))) as fab:
        files = [name for name in fab.namelist() if not name.startswith(".info/")]
    tops = {name.split("/")[0] for name in files}
    assert tops == {*ROOMS, "pyproject.toml", "LICENSE"} - {"cli"}
    assert sum(name.endswith(".py") for name in files) == sum(
        len(list((ROOT / room).rglob("*.py"))) for room in ROOMS if room != "cli"
    )


def test_the_wheel_ships_the_two_pluggable_rooms_under_one_name(tmp_path):
    """docs/plug-in.md: what somebody else's app installs, imported from the wheel alone."""
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("flower_dp_lora-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if ".dist-info" not in name]
        archive.extractall(tmp_path / "site")
    assert {tuple(name.split("/")[:2]) for name in files} == {
        ("dp_lora", "strategies"),
        ("dp_lora", "privacy"),
    }
    (script,) = (tmp_path / "site").glob("*.dist-info/entry_points.txt")
    assert "dp-lora = dp_lora.privacy.commands:main" in script.read_text(encoding="utf-8")
    code = (
        "from dp_lora.strategies import LALoRA, RoundPlan, SecureAggregation; "
        "from dp_lora.privacy import FusedEngine, PrivacyPlan, PrivateGradient, check_engine; "
        "from dp_lora.privacy.commands import main; "
        "print(LALoRA().plan(1).mode, PrivateGradient.__module__, main(['plan', '--delta', '2']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["alternate", "dp_lora.privacy.mechanism", "2"], done.stderr
    assert done.stderr.startswith("dp-lora plan: --delta: got '2'; takes")


def test_the_launcher_runs_the_commands_from_any_folder(tmp_path):
    """What `make install` leaves in .venv/bin, also with blanks in both paths."""
    folder = tmp_path / "some where"
    folder.mkdir()
    python = tmp_path / "my python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    for _ in range(2):  # `make install` makes it again
        command = [sys.executable, str(ROOT / "tools" / "launcher.py"), str(folder)]
        subprocess.run(command, check=True, cwd=tmp_path)
    write = runpy.run_path(str(ROOT / "tools" / "launcher.py"))["write"]
    write(folder, str(python))
    launcher = folder / "dp-lora"
    assert [file.name for file in folder.iterdir()] == ["dp-lora"]
    assert launcher.stat().st_mode & 0o777 == 0o755
    for arguments, status, said in (
        (["plan", "--help"], 0, "usage: dp-lora plan"),
        (["plan", "--records", "-1"], 2, "dp-lora plan: --records: got -1; takes"),
    ):
        done = subprocess.run(
            [str(launcher), *arguments],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stderr
        assert (done.stdout + done.stderr).startswith(said)


def test_the_launcher_wants_a_folder(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "launcher.py"), str(tmp_path / "missing")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "takes a folder that exists" in done.stderr


def test_files_named_in_the_docs_exist():
    """Tests and code that a page points to, and the links between pages."""
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ]:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        for path, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
            if test:
                assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), test
