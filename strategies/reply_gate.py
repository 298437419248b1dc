"""What a reply must pass before it is folded in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, Message

from .downlink import Asked, Downlink, needs_full
from .replies import InvalidReply, check_norms, read_update, read_weight
from .round_plan import RoundPlan
from .secure_aggregation import SecureAggregation
from .tensor_names import Kind
from .wire_dtypes import relative_error

if TYPE_CHECKING:
    from .base import LoRAStrategy

PRIVACY_KEY = "privacy"
"""Record of a reply: the client's public statement of the noise on it."""


class ReplyGate:
    """Checks one round's replies.

    Parameters
    ----------
    strategy : LoRAStrategy
        Says how replies are weighted, written and bounded.
    downlink : Downlink
        Knows the versions.
    plan : RoundPlan
        What the round trains.
    """

    def __init__(self, strategy: LoRAStrategy, downlink: Downlink, plan: RoundPlan) -> None:
        self._strategy = strategy
        self._downlink = downlink
        self._plan = plan
        self._shapes: dict[int, dict[str, tuple[int, ...]]] = {}
        self._limits: dict[tuple[int, float | None], Mapping[Kind, float]] = {}

    def check(
        self, asked: Asked, reply: Message
    ) -> tuple[dict[str, npt.NDArray[np.float32]], float]:
        """Read a reply's update and weight.

        Raises
        ------
        InvalidReply
            Saying the first thing wrong.
        """
        one = self._strategy
        if needs_full(reply):
            raise InvalidReply("could not go on from what it was sent, and did not train")
        if one.on_reply is not None:  # whatever is wrong with it, it was released
            one.on_reply(asked.node, reply)
        self._downlink.take_statement(asked, reply)
        shapes = self._shapes_for(asked.rank)
        if isinstance(one.client_level, SecureAggregation):  # a vector that nobody can look at
            one.client_level.take(asked.node, reply, shapes)
            return {}, 1.0
        update = read_update(reply, shapes, one.arrayrecord_key, one.wire_dtype)
        by_count = one.weighting == "public-counts"
        weight = read_weight(reply, one.weighted_by_key) if by_count else 1.0
        if one.update_bound is not None:
            check_norms(update, self._limits_for(asked.rank, weight if by_count else None))
        return update, weight

    def _shapes_for(self, rank: int) -> dict[str, tuple[int, ...]]:
        if rank not in self._shapes:
            tensors = self._downlink.tensors_for(rank)
            uploaded = self._plan.uploaded(tensors)
            self._shapes[rank] = {name: tensors[name].shape for name in uploaded}
        return self._shapes[rank]

    def _limits_for(self, rank: int, count: float | None) -> Mapping[Kind, float]:
        bound = self._strategy.update_bound
        assert bound is not None
        if (rank, count) not in self._limits:
            limits = bound.limits(self._plan, self._shapes_for(rank), count)
            rounding = 1 + relative_error(self._strategy.wire_dtype)
            self._limits[rank, count] = {kind: rounding * limit for kind, limit in limits.items()}
        return self._limits[rank, count]


def states_privacy(reply: Message) -> bool:
    """Whether a reply says that its update carries noise from a secure source."""
    record = reply.content.get(PRIVACY_KEY)
    if not isinstance(record, ConfigRecord) or record.get("secure-noise") is not True:
        return False
    noise = record.get("noise-multiplier")
    return isinstance(noise, float) and noise > 0
