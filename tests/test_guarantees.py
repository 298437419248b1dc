"""Every docstring that states a formal guarantee has a contract test, by docs/privacy.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("privacy", "strategies", "task", "federation", "client_app", "server_app", "benchmarks")
PAGE = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
TABLE = PAGE.split("## Every formal guarantee, and its contract test")[1].split("\n## ")[0]
ROWS = [line.split("|")[1:3] for line in TABLE.splitlines() if line.startswith("| `")]


def guarantees() -> list[str]:
    """Names of the functions and classes whose docstrings state one."""
    found = []
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                owner = isinstance(node, ast.FunctionDef | ast.ClassDef)
                if owner and "Formal guarantee" in (ast.get_docstring(node) or ""):
                    found.append(node.name)
    return found


def test_every_guarantee_has_a_row():
    named = {name for row in ROWS for name in re.findall(r"`(\w+)`", row[0])}
    stated = guarantees()
    assert len(stated) > 30
    assert set(stated) <= named


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip()[:40])
def test_the_tests_of_a_row_exist(row):
    named = re.findall(r"`(tests/[\w/]+(?:\.py)?)(?:::(\w+))?`", row[1])
    assert named
    for file, function in named:
        path = ROOT / file
        assert path.exists(), file
        if function:
            assert f"def {function}(" in path.read_text(encoding="utf-8"), function
