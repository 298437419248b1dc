"""The server's side of the wire: what each node holds, is sent, and answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard, cast

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from .node_state import WIRE_KEY
from .replies import InvalidReply
from .report import payload_bytes
from .versions import VersionBook

Tensors = Mapping[str, npt.NDArray[np.float32]]


@dataclasses.dataclass(frozen=True)
class Asked:
    """One open message of a round."""

    node: int
    rank: int
    version: str
    everything: bool


@dataclasses.dataclass(frozen=True)
class _Parcel:
    """Records that all nodes in the same position are sent; shared, so they are kept once."""

    arrays: ArrayRecord
    wire: ConfigRecord
    size: int


class Downlink:
    """Sends each node the tensors that it lacks, and knows whom a reply is from.

    A node is believed to hold the version that it stated in its answer to the last message it
    was sent; one that stated none (new, failed, late) is sent everything.

    Parameters
    ----------
    tensors_for : callable
        ``tensors_for(rank)``: the adapter for nodes of that rank.  Arrays must never change in
        place: a tensor that is the same object is not looked at again.
    arrays_key : str
        Name of the ArrayRecord.
    """

    def __init__(self, tensors_for: Callable[[int], Tensors], arrays_key: str) -> None:
        self.bytes_down = 0
        self.tensors_for = tensors_for
        self._arrays_key = arrays_key
        self._held: dict[int, tuple[int, str]] = {}
        self._books: dict[int, VersionBook] = {}
        self._packed: dict[int, dict[str, tuple[npt.NDArray[np.float32], Array]]] = {}
        self._common: Mapping[str, Any] = {}
        self._dtype = "float32"
        self._parcels: dict[tuple[int, str], _Parcel] = {}
        self._sent: list[tuple[Message, Asked]] = []
        self._open: dict[str, Asked] = {}
        self._asked: set[int] = set()
        self._again: set[int] = set()

    def open_round(
        self, nodes: list[int], common: Mapping[str, Any], *, default_rank: int, dtype: str
    ) -> list[Message]:
        """Messages to ``nodes``, with the ``common`` records besides the tensors.

        Parameters
        ----------
        nodes : list of int
            Whom to ask.
        common : mapping of str to record
            Records that all are sent.
        default_rank : int
            Rank of nodes that have not stated any.
        dtype : str
            How updates shall be written.
        """
        self.bytes_down = 0
        self._common, self._dtype = dict(common), dtype
        self._parcels, self._open, self._sent = {}, {}, []
        self._asked, self._again = set(nodes), set()
        for rank in self._books:
            self._advance(rank)
        return [self._message(node, default_rank) for node in nodes]

    def sender(self, reply: Message) -> Asked | None:
        """Whom the open message that this reply answers went to; closes it.

        A dead node's error comes from the SuperLink: only the message answered names the node.
        ``None`` if it answers no open message.
        """
        self._index()
        return self._open.pop(reply.metadata.reply_to_message_id, None)

    def follow_up(self, reply: Message) -> Message | None:
        """Everything for a node that answers ``need-full``, once a round; else ``None``."""
        if not needs_full(reply):
            return None
        self._index()
        asked = self._open.get(reply.metadata.reply_to_message_id)
        rank = cast(ConfigRecord, reply.content[WIRE_KEY]).get("rank")
        if asked is None or asked.node in self._again or not self._has_rank(rank):
            return None
        del self._open[reply.metadata.reply_to_message_id]
        self._again.add(asked.node)
        self._held[asked.node] = (rank, "")
        return self._message(asked.node, rank)

    def take_statement(self, asked: Asked, reply: Message) -> None:
        """Note the version that a node says it holds.

        Raises
        ------
        InvalidReply
            If the node has not trained from this round's version.
        """
        wire = reply.content.get(WIRE_KEY)
        if not isinstance(wire, ConfigRecord):  # a ClientApp that keeps nothing between rounds
            if not asked.everything:
                raise InvalidReply("does not state the version that it trained from")
            return
        if wire.get("version") != asked.version or wire.get("rank", asked.rank) != asked.rank:
            raise InvalidReply("trained from another version than this round's")
        self._held[asked.node] = (asked.rank, asked.version)

    def forget(self, node: int) -> None:
        """Send this node everything next time."""
        if node in self._held:
            self._held[node] = (self._held[node][0], "")

    def close_round(self) -> list[int]:
        """Nodes that did not reply; they are sent everything next time."""
        self._index()
        silent = sorted({asked.node for asked in self._open.values()})
        for node in silent:
            self.forget(node)
        self._sent, self._open, self._parcels, self._common = [], {}, {}, {}
        return silent

    def asked(self) -> int:
        """Nodes asked in the open round."""
        return len(self._asked)

    def state_dict(self) -> dict[str, Any]:
        """What nodes hold, and the versions so far."""
        for rank in self._books:
            self._advance(rank)
        return {
            "held": {str(node): list(held) for node, held in sorted(self._held.items())},
            "books": {str(rank): book.state_dict() for rank, book in sorted(self._books.items())},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; the strategy holds the adapter of then already.

        Raises
        ------
        ValueError
            If that adapter is of another version.
        """
        self._held = {int(n): (int(rank), str(v)) for n, (rank, v) in state["held"].items()}
        self._books, self._packed = {}, {}
        for text, book in state["books"].items():
            rank = int(text)
            self._books[rank] = VersionBook()
            self._books[rank].load_state_dict(book, self._pack(rank))

    def _message(self, node: int, default_rank: int) -> Message:
        rank, held = self._held.get(node, (default_rank, ""))
        parcel = self._parcel(rank, held)
        self.bytes_down += parcel.size
        content = RecordDict(
            {self._arrays_key: parcel.arrays, WIRE_KEY: parcel.wire, **self._common}
        )
        message = Message(content=content, message_type=MessageType.TRAIN, dst_node_id=node)
        asked = Asked(node, rank, self._books[rank].current, parcel.wire["base"] == "")
        self._sent.append((message, asked))
        return message

    def _parcel(self, rank: int, held: str) -> _Parcel:
        key = rank, held
        if key not in self._parcels:
            if rank not in self._books:
                self._advance(rank)
            book, packed = self._books[rank], self._packed[rank]
            lacking = book.lacking(held)
            if lacking is None or len(lacking) == len(packed):
                held, lacking = "", tuple(packed)
            arrays = ArrayRecord({name: packed[name][1] for name in lacking})
            wire = ConfigRecord(
                {"base": held, "version": book.current, "rank": rank, "dtype": self._dtype}
            )
            size = payload_bytes(RecordDict({"arrays": arrays}))
            self._parcels[key] = _Parcel(arrays, wire, size)
        return self._parcels[key]

    def _advance(self, rank: int) -> None:
        self._books.setdefault(rank, VersionBook()).advance(self._pack(rank))

    def _pack(self, rank: int) -> dict[str, Array]:
        """Tensors as they travel; those that did not change are not written anew."""
        before = self._packed.get(rank, {})
        now = {}
        for name, value in self.tensors_for(rank).items():
            known = before.get(name)
            now[name] = known if known and known[0] is value else (value, Array(value))
        self._packed[rank] = now
        return {name: array for name, (_, array) in now.items()}

    def _index(self) -> None:
        # Flower gives a message its id when it is sent, which is after it was made here.
        for message, asked in self._sent:
            self._open[message.metadata.message_id] = asked
        self._sent = []

    def _has_rank(self, rank: object) -> TypeGuard[int]:
        try:
            return type(rank) is int and bool(self.tensors_for(rank))
        except ValueError:
            return False


def needs_full(reply: Message) -> bool:
    """Whether a reply says that its node needs everything, and has not trained."""
    if reply.has_error():
        return False
    wire = reply.content.get(WIRE_KEY)
    return isinstance(wire, ConfigRecord) and wire.get("need-full") is True
