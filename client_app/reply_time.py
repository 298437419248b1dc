"""When replies leave, so that their time tells nothing of the drawn batches."""

from __future__ import annotations

import math
import time


class ReplyClock:
    """Counts from the moment a message came.

    Attributes
    ----------
    period : float
        Seconds; replies and refusals leave at the first multiple of it that is not past.  0: at
        once.
    """

    def __init__(self) -> None:
        self.period = 0.0
        self._started = time.monotonic()

    def wait(self) -> None:
        """Sleep until the reply may leave."""
        if self.period > 0:
            passed = time.monotonic() - self._started
            periods = max(1, math.ceil(passed / self.period))
            time.sleep(max(0.0, periods * self.period - passed))
