"""Choosing a round's nodes."""

from __future__ import annotations

import random
import time
from logging import INFO

from flwr.common import log
from flwr.serverapp import Grid

_POLL_SECONDS = 0.5
_REMINDER_SECONDS = 15.0


class NotEnoughNodes(TimeoutError):
    """The nodes that a round needs did not connect in time."""


def sample_nodes(
    grid: Grid, *, fraction: float, minimum: int, available: int, timeout: float, seed: object
) -> list[int]:
    """Wait for nodes and sample some of them without replacement.

    Parameters
    ----------
    grid : Grid
        Knows the connected nodes.
    fraction : float
        Share of the connected nodes to take, in (0, 1].
    minimum : int
        Fewest nodes to take.
    available : int
        Nodes that must be connected first (at least ``minimum``).
    timeout : float
        Seconds to wait for them.
    seed : object
        Its ``repr`` seeds the choice.

    Returns
    -------
    list of int
        Node ids, sorted.

    Raises
    ------
    NotEnoughNodes
        When the time is up; Flower's own sampling would wait for ever.
    """
    connected = wait_for_nodes(grid, max(available, minimum), timeout)
    size = max(int(len(connected) * fraction), minimum)
    return sorted(random.Random(repr(seed)).sample(connected, size))


def wait_for_nodes(grid: Grid, needed: int, timeout: float) -> list[int]:
    """Wait until so many nodes are connected; all that are, sorted.

    Raises
    ------
    NotEnoughNodes
        When ``timeout`` seconds are over.
    """
    started = time.monotonic()
    reminded = started
    while len(connected := sorted(grid.get_node_ids())) < needed:
        now = time.monotonic()
        if now - started > timeout:
            raise NotEnoughNodes(
                f"{len(connected)} of the {needed} nodes that strategy.min-available-nodes and "
                f"strategy.min-train-nodes ask for are connected after {timeout:g} s "
                "(strategy.node-timeout)"
            )
        if now - reminded > _REMINDER_SECONDS:
            log(INFO, "Waiting for nodes: %d of %d are connected", len(connected), needed)
            reminded = now
        time.sleep(_POLL_SECONDS)
    return connected
