"""What the settings of this room share: form, strictness, and the wording of a refusal."""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath

from pydantic import BaseModel, ConfigDict

COMMIT = re.compile(r"[0-9a-f]{40}")


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def split_list(text: str) -> tuple[str, ...]:
    """Split a comma-separated string; blanks around items and empty items are dropped."""
    return tuple(item.strip() for item in text.split(",") if item.strip())


def is_local(name: str) -> bool:
    """Tell whether a model's name is a local folder, by its spelling alone.

    The disk is not asked: the same run config must mean the same on every machine. A folder
    starts with ``/``, ``.``, ``~`` or a drive letter; everything else is a name on the hub.
    """
    absolute = PurePosixPath(name).is_absolute() or bool(PureWindowsPath(name).drive)
    return absolute or name.startswith((".", "~"))


def refusal(key: str, value: object, accepted: str) -> ValueError:
    """Return the error for a setting: its full key, what it is, what is accepted."""
    return ValueError(f"{key} is {value!r}; accepted: {accepted}")


class Settings(BaseModel):
    """Frozen, strict (a text is no number), kebab-case keys, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=_kebab,
        populate_by_name=True,
        allow_inf_nan=False,
    )

    def must_be_unset(self, prefix: str, fields: tuple[str, ...], because: str) -> None:
        """Raise unless these fields are empty or 0."""
        for field in fields:
            value = getattr(self, field)
            if value:
                raise refusal(f"{prefix}.{_kebab(field)}", value, f"not set, because {because}")
