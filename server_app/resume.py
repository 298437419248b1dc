"""Going on from a run that was cut off."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from federation.run_files import RunFolder, write_atomically
from federation.settings import Settings, SettingsError
from strategies.atomic_file import replacing

from .client_account import ClientAccount
from .privacy_tracker import PrivacyTracker

# What a run may change in the middle: where it looks and writes, and how long it waits.
_MAY_DIFFER = {
    "resume",
    "output-dir",
    "device",
    "strategy.node-timeout",
    "strategy.round-timeout",
    "strategy.min-train-nodes",
    "strategy.min-available-nodes",
}

_TAKEN_OVER = "resumed-by.txt"


class RunAccount:
    """The clients' privacy statements, as part of a checkpoint.

    Parameters
    ----------
    tracker : PrivacyTracker
        Holds them.
    steps : int
        Private steps of a round.

    Notes
    -----
    A run that goes on counts one more round for every client: the one in which it was cut off may
    have been released, and is asked for again.
    """

    def __init__(self, tracker: PrivacyTracker | ClientAccount, steps: int) -> None:
        self._tracker = tracker
        self._steps = steps

    def state_dict(self) -> dict[str, Any]:
        """The statements so far."""
        return self._tracker.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from them, the lost round counted."""
        self._tracker.load_state_dict(state)
        self._tracker.begin_again(self._steps)


def find_earlier_run(settings: Settings) -> RunFolder:
    """Find the run that ``resume`` names and check that these settings are that run's.

    Raises
    ------
    SettingsError
        If there is no such run, it has no checkpoint, another run went on from it already, or a
        setting differs.
    """
    path = Path(settings.resume).expanduser()
    folder = RunFolder(path.parent if path.suffix == ".npz" else path)
    for file in (folder.settings, folder.checkpoint):
        if not file.is_file():
            raise SettingsError(
                f"resume: got {settings.resume!r}, which has no {file.name}; accepted is the "
                "folder of a run that finished a round"
            )
    if (folder.path / _TAKEN_OVER).is_file():
        later = (folder.path / _TAKEN_OVER).read_text(encoding="utf-8").strip()
        raise SettingsError(
            f"resume: {folder.path} was gone on from already; accepted is the run that did: {later}"
        )
    before, now = _flat(folder.read_settings()), _flat(settings.model_dump(by_alias=True))
    differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    lines = [
        f"  {key}: the earlier run had {before.get(key)!r}, this one has {now.get(key)!r}"
        for key in differing
        if key not in _MAY_DIFFER
    ]
    if lines:
        raise SettingsError(
            "\n".join([f"resume: {folder.path} is of a run with other settings:", *lines])
        )
    return folder


def take_over(earlier: RunFolder, folder: RunFolder) -> None:
    """Begin a run's folder with the checkpoint of another, and note there who goes on.

    Two runs that went on from the same round would each know only what they spent themselves.
    """
    with earlier.checkpoint.open("rb") as source, replacing(folder.checkpoint) as target:
        shutil.copyfileobj(source, target)
    write_atomically(earlier.path / _TAKEN_OVER, f"{folder.path}\n")


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
