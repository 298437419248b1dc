"""What one process keeps of a simulation's data between messages.

Only simulations use it: there every virtual client reads the same file. A site's own records are
never kept in a global, where another client's code could reach them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class ProcessCache:
    """A few values, the longest unused of which is dropped first.

    Parameters
    ----------
    limit : int (default: 4)
        Values kept at most.
    """

    def __init__(self, limit: int = 4) -> None:
        self._limit = limit
        self._values: OrderedDict[Hashable, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, build: Callable[[], T]) -> T:
        """Return the value kept under ``key``, or build and keep it."""
        if key not in self._values:
            self._values[key] = build()
            if len(self._values) > self._limit:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        value: T = self._values[key]
        return value

    def clear(self) -> None:
        """Drop everything."""
        self._values.clear()


simulation_cache = ProcessCache()
"""The cache that :func:`task.data.load_client_records` uses in a simulation."""
