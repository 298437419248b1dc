"""A node's side of the wire: the adapter that it holds between rounds, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast, get_args

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from .versions import version_of
from .wire_dtypes import WireDtype, pack

WIRE_KEY = "wire"
"""Record of a message that says which version its tensors make, or which one a node holds."""

_STATE_KEY = "dp-lora.adapter"


class NeedFull(Exception):
    """What was sent does not go on from what this node holds; nothing was changed."""


class UnusableMessage(ValueError):
    """A train message that no node could use."""


def receive_adapter(
    message: Message, state: RecordDict, *, rank: int = 0, arrays_key: str = "arrays"
) -> dict[str, npt.NDArray[np.float32]]:
    """Bring this node's adapter to the version of a train message and return all of it.

    Parameters
    ----------
    message : Message
        Carries the tensors that the server believes this node lacks.
    state : RecordDict
        ``context.state``, in which the adapter is kept for the run.
    rank : int (default: 0)
        Rank of this node's adapter, for methods with ranks by client; 0 for all others.

    Returns
    -------
    dict of str to array
        Equal to the server's adapter bit for bit.

    Raises
    ------
    NeedFull
        If this node lacks more than was sent.  Answer with :func:`ask_for_everything`.
    UnusableMessage
        If the message is not one of our strategies', or was damaged.
    """
    arrays, wire = message.content.get(arrays_key), message.content.get(WIRE_KEY)
    if not isinstance(arrays, ArrayRecord) or not isinstance(wire, ConfigRecord):
        raise UnusableMessage(
            f"the train message has no ArrayRecord {arrays_key!r} or no {WIRE_KEY!r} record"
        )
    if wire.get("dtype") not in get_args(WireDtype):  # now, and not after the work is done
        raise UnusableMessage(f"the wire's dtype must be one of {', '.join(get_args(WireDtype))}")
    base, version = wire.get("base"), wire.get("version")
    if wire.get("rank") != rank:
        raise NeedFull
    held = held_arrays(state)
    stated = held_version(state)
    tensors: Mapping[str, Array]
    if base == "":
        tensors = arrays
    elif stated == version:  # a round that the server has forgotten, or tensors sent twice
        tensors = held
    elif stated == base:
        tensors = {**held, **arrays}
    else:
        raise NeedFull
    if version_of(tensors) != version:
        if base == "":
            raise UnusableMessage("the tensors are not of the version that the message states")
        raise NeedFull
    try:
        values = {name: array.numpy() for name, array in tensors.items()}
    except (ValueError, OSError, EOFError, TypeError) as error:
        raise UnusableMessage(f"a tensor cannot be read ({type(error).__name__})") from error
    state[_STATE_KEY] = ArrayRecord(dict(tensors))
    state[WIRE_KEY] = ConfigRecord({"version": version, "rank": rank})
    return values


def held_arrays(state: RecordDict) -> ArrayRecord:
    """The adapter in this node's state, as it travelled; empty if it holds none."""
    return state.array_records.get(_STATE_KEY, ArrayRecord())


def held_version(state: RecordDict) -> str:
    """Version of the adapter in this node's state; empty if it holds none."""
    record = state.config_records.get(WIRE_KEY)
    return str(record["version"]) if record is not None else ""


def ask_for_everything(state: RecordDict, *, rank: int = 0) -> RecordDict:
    """Content of the answer to a message that gave :class:`NeedFull`; nothing was trained."""
    wire = ConfigRecord({"need-full": True, "version": held_version(state), "rank": rank})
    return RecordDict({WIRE_KEY: wire})


def update_records(
    message: Message,
    state: RecordDict,
    update: Mapping[str, npt.NDArray[np.float32]],
    rng: np.random.Generator,
    arrays_key: str = "arrays",
) -> dict[str, ArrayRecord | ConfigRecord]:
    """Records of a reply: the update in the dtype asked for, and the version it started from.

    Parameters
    ----------
    message : Message
        The train message that is answered.
    state : RecordDict
        As left by :func:`receive_adapter`.
    update : mapping of str to array
        Change of exactly the tensors that the round plan made active, float32.
    rng : numpy.random.Generator
        For stochastic rounding; need not be secret.
    """
    dtype = cast(WireDtype, message.content.config_records[WIRE_KEY]["dtype"])
    held = state.config_records[WIRE_KEY]
    return {
        arrays_key: ArrayRecord(pack(update, dtype, rng)),
        WIRE_KEY: ConfigRecord({"version": held["version"], "rank": held["rank"]}),
    }
