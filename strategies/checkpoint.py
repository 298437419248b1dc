"""The server's whole state in one file, written after every round."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from flwr.app import Array, ArrayRecord

from .atomic_file import replacing

_FORMAT = 1
_STATE = "state"
_PARTS = {"method", "round", "strategy", "metrics", "companions"}
_TENSOR = "tensor:"  # before a tensor's name: names of arguments of np.savez stay free


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the text names the file and what is wrong."""


class Stateful(Protocol):
    """Something whose state goes into the checkpoint beside the strategy's."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next round depends on, as plain JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        ...


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: plain JSON values, and the adapter's tensors."""

    state: dict[str, Any]
    arrays: ArrayRecord


class Checkpoint:
    """One atomic file that holds a run's server state after its latest whole round.

    Parameters
    ----------
    path : str or PathLike
        The file; its folder exists.
    companions : mapping of str to Stateful, optional
        What else must go on where it stopped (metrics, accounts), by name.

    Notes
    -----
    The file is a numpy ``.npz`` archive without pickled objects: the tensors, and the rest as
    JSON.  It holds no clock times, so equal states are equal files.  It has what the server has
    anyway, privatised updates and public numbers.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        companions: Mapping[str, Stateful] | None = None,
    ) -> None:
        self.path = Path(path)
        self.companions = dict(companions or {})

    @classmethod
    def of(cls, given: Self | str | os.PathLike[str] | None) -> Self | None:
        """Make a checkpoint of a path; leave anything else as it is."""
        return cls(given) if isinstance(given, str | os.PathLike) else given

    def save(self, state: Mapping[str, Any], arrays: ArrayRecord) -> None:
        """Replace the file; a crash leaves the one before."""
        text = json.dumps(
            {
                "format": _FORMAT,
                **state,
                "companions": {name: one.state_dict() for name, one in self.companions.items()},
            }
        )
        members = {_TENSOR + name: array.numpy() for name, array in arrays.items()}
        members[_STATE] = np.frombuffer(text.encode(), np.uint8)
        with replacing(self.path) as file:
            np.savez(file, allow_pickle=False, **members)

    def load(self) -> Saved | None:
        """Read the file and hand the companions their states; ``None`` if there is no file.

        Raises
        ------
        CheckpointError
            If it is damaged, or of another version of this library.
        """
        if not self.path.exists():
            return None
        saved = read_checkpoint(self.path)
        states = saved.state["companions"]
        if set(states) != set(self.companions):
            raise CheckpointError(
                f"{self.path} holds the states of {sorted(states)}; this run has "
                f"{sorted(self.companions)}"
            )
        for name, companion in self.companions.items():
            companion.load_state_dict(states[name])
        return saved


def read_checkpoint(path: Path) -> Saved:
    """Read a checkpoint as it is.

    Raises
    ------
    CheckpointError
        If there is none, or it is damaged or of another format.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            state = json.loads(archive[_STATE].tobytes())
            arrays = {
                name.removeprefix(_TENSOR): Array(archive[name])
                for name in archive.files
                if name.startswith(_TENSOR)
            }
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}") from error
    except Exception as error:  # the parsers of zip, npy and JSON raise many types on damage
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of format {_FORMAT}")
    if lost := sorted(_PARTS - state.keys()):
        raise CheckpointError(f"{path} is no whole checkpoint; missing: {', '.join(lost)}")
    return Saved(state, ArrayRecord(arrays))
