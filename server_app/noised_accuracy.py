"""How good clients find the model that they received, by their noised counts."""

from __future__ import annotations

import math

from flwr.app import Message, MetricRecord

from federation.messages import COUNT_KEY, METRICS_KEY, NOISED_ACCURACY_KEY


class NoisedAccuracy:
    """Mean of what the clients of a round state, by their public record counts or equally.

    It is of the model that the round began with, on records that the model may have been trained
    on; noise makes single statements leave [0, 1], and a client may state anything: a statement
    counts as at most 1 beyond either end.
    """

    def __init__(self) -> None:
        self._sum = self._weights = 0.0

    def observe(self, message: Message) -> None:
        """Take note of a reply."""
        metrics = message.content.get(METRICS_KEY) if message.has_content() else None
        if not isinstance(metrics, MetricRecord):
            return
        stated, count = metrics.get(NOISED_ACCURACY_KEY), metrics.get(COUNT_KEY, 1)
        if not isinstance(stated, float) or not math.isfinite(stated):
            return
        weight = float(count) if isinstance(count, int | float) and 0 < count < 1e9 else 0.0
        self._sum += weight * min(2.0, max(-1.0, stated))
        self._weights += weight

    def take(self) -> float | None:
        """The mean since the last call; ``None`` if nobody stated any."""
        mean = self._sum / self._weights if self._weights else None
        self._sum = self._weights = 0.0
        return mean
