"""What a round cost and who took part."""

from __future__ import annotations

import dataclasses

from flwr.app import ArrayRecord, RecordDict

from .round_plan import RoundPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundReport:
    """What happened in a round, from the server's side; public.

    Parameters
    ----------
    server_round : int
        Round, from 1.
    plan : RoundPlan
        What it trained.
    asked, valid : int
        Nodes asked, and replies that entered the mean.
    failures : tuple of str
        Node and reason of every reply that did not.
    applied : bool
        Whether the adapter moved.
    private : bool
        Whether every reply came with a statement of its privacy; without one a round is an
        ordinary, non-private one.
    bytes_down, bytes_up : int
        Bytes of the tensors in the round's messages, as serialised.
    """

    server_round: int
    plan: RoundPlan
    asked: int
    valid: int
    failures: tuple[str, ...]
    applied: bool
    private: bool
    bytes_down: int
    bytes_up: int


def payload_bytes(content: RecordDict) -> int:
    """Bytes of the tensors in a message, as serialised (each with its short npy header)."""
    # Not content.array_records: that view refers back to the content, which then waits for the
    # garbage collector instead of going when it is dropped.
    arrays = (record for record in content.values() if isinstance(record, ArrayRecord))
    return sum(len(array.data) for record in arrays for array in record.values())
