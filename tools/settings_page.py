"""Write docs/settings.md from the settings' models; ``--check`` only compares."""

import pathlib
import sys
import tomllib
import types
from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from federation.settings import Settings  # noqa: E402

PAGE = ROOT / "docs" / "settings.md"
HEAD = """# Settings

Made by `python tools/settings_page.py` from the pydantic models; do not edit by hand.

Set them in `[tool.flwr.app.config]` of `pyproject.toml`, or for one run with
`flwr run . -c 'strategy.method="ro-lora" privacy.target-epsilon=3.0'`, or with
`make run CONFIG='strategy.lr-b=0.2'`. Unknown keys, wrong types and contradictions are refused
before anything is loaded. "App" is the value in `pyproject.toml`, which is the demo's.
"""


def kind_of(field: FieldInfo) -> str:
    """Type and range of a field, for people."""
    annotation = field.annotation
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if isinstance(annotation, types.UnionType):
        raise TypeError(f"a setting of a union type is not documented: {annotation}")
    name = {str: "text", int: "whole number", float: "number", bool: "true or false"}[annotation]
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    limits = [
        f"{sign} {getattr(rule, short):g}"
        for rule in field.metadata
        for short, sign in signs.items()
        if getattr(rule, short, None) is not None
    ]
    patterns = [f"`{p}`" for rule in field.metadata if (p := getattr(rule, "pattern", None))]
    return " ".join([name, ", ".join(limits + patterns)]).strip().replace("|", "\\|")


def rows(model: type[BaseModel], prefix: str, app: dict) -> list[str]:
    """One table row per field."""
    lines = ["| key | takes | app | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue
        key = name.replace("_", "-")
        value = app[key]
        shown = f'`"{value}"`' if isinstance(value, str) else f"`{str(value).lower()}`"
        lines.append(f"| `{prefix}{key}` | {kind_of(field)} | {shown} | {field.description} |")
    return lines


def page() -> str:
    """The whole page."""
    app = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"][
        "app"
    ]["config"]
    parts = [HEAD, "## The run as a whole\n", *rows(Settings, "", app)]
    for name, field in Settings.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            first_line = (model.__doc__ or "").strip().splitlines()[0]
            parts += [f"\n## `{name}.*`\n", f"{first_line}\n", *rows(model, f"{name}.", app[name])]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
            sys.exit("docs/settings.md is out of date: run python tools/settings_page.py")
    else:
        PAGE.write_text(page(), encoding="utf-8")
