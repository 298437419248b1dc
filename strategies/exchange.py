"""Sending a round's messages and taking the replies one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from logging import WARNING

from flwr.app import Message
from flwr.common import log
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

_PUSHED_AT_ONCE = 64
# What Flower's parsers raise on bytes that are no message.
_UNREADABLE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    EOFError,
    RecursionError,
    DecodeError,
)
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 3.0
# A round that waits for its next look after the last reply leaves every node idle, and each look
# costs a request per open message: so a hundredth of the round so far, more for many nodes.
_PAUSE_OF_ELAPSED, _PAUSE_PER_MESSAGE, _LONG_PAUSE_FROM = 0.01, 0.002, 0.25


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    *,
    timeout: float | None,
    follow_up: Callable[[Message], Message | None],
    in_order: bool = False,
) -> Iterator[Message]:
    """Send messages and yield each reply as it comes, so that none needs to be kept.

    ``Grid.send_and_receive`` holds all replies of a round at once; here memory does not grow
    with their number, as long as the caller drops each.

    Parameters
    ----------
    grid : Grid
        Flower's connection to the nodes.
    messages : iterable of Message
        What to send.
    timeout : float or None
        Seconds to wait for replies; what comes later is lost.  ``None``: no limit.
    follow_up : callable
        ``follow_up(reply)`` gives a message to send in answer, and the reply is not yielded then;
        or ``None``.
    in_order : bool (default: False)
        Take replies in the order of the messages and not as they come, so that sums over them
        have the same bits in every run.  Slow: all wait for the slowest.
    """
    start = time.monotonic()
    end = None if timeout is None else start + timeout
    open_ids = dict.fromkeys(_push(grid, messages))
    del messages  # the tensors in them are not needed while replies come in
    pause = _SHORTEST_PAUSE
    while open_ids:
        late = end is not None and time.monotonic() >= end
        progress = False
        # The last look takes whatever has come.
        for message_id in list(islice(open_ids, 1)) if in_order and not late else list(open_ids):
            for reply in _pull(grid, message_id, open_ids):
                open_ids.pop(reply.metadata.reply_to_message_id, None)
                progress = True
                again = None if late else follow_up(reply)  # too late to train now
                if again is None:
                    yield reply
                else:
                    sent = dict.fromkeys(_push(grid, [again]))
                    # In order, it keeps its node's place.
                    open_ids = {**sent, **open_ids} if in_order else {**open_ids, **sent}
                del reply, again
        if late:
            return
        pause = _SHORTEST_PAUSE if progress else min(1.5 * pause, _longest(start, open_ids))
        if not progress:
            left = pause if end is None else end - time.monotonic()
            time.sleep(max(0.0, min(pause, left)))


def _longest(start: float, open_ids: dict[str, None]) -> float:
    elapsed = time.monotonic() - start
    wanted = (_PAUSE_OF_ELAPSED * elapsed, _PAUSE_PER_MESSAGE * len(open_ids), _LONG_PAUSE_FROM)
    return min(max(wanted), _LONGEST_PAUSE)


def _pull(grid: Grid, message_id: str, open_ids: dict[str, None]) -> Iterable[Message]:
    """Fetch the replies to one message; one that cannot be read costs its sender only."""
    try:
        return grid.pull_messages([message_id])
    except _UNREADABLE as error:
        # Not the network's errors: those are no client's doing, and end the run.
        log(WARNING, "A reply cannot be read (%s)", type(error).__name__)
        open_ids.pop(message_id, None)
        return []


def _push(grid: Grid, messages: Iterable[Message]) -> list[str]:
    """Send in slices; ids of what was taken (Flower says which could not be)."""
    ids: list[str] = []
    remaining = iter(messages)
    while some := list(islice(remaining, _PUSHED_AT_ONCE)):
        ids += [message_id for message_id in grid.push_messages(some) if message_id]
    return ids
