"""How far a client's word on its own scores is taken."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, Message

from .reply_gate import PRIVACY_KEY
from .round_plan import RoundPlan
from .scores import filtered_numel

# An honest floor is about the energy's own mean; with a few dozen values four times it is beyond
# chance, with fewer a false alarm costs one round's debiased scores.
_FLOOR_OVER_ENERGY = 4.0
_SCORE_OVER_ENERGY = 10.0


def own_energies(
    update: Mapping[str, npt.NDArray[np.float32]], groups: Mapping[str, str], plan: RoundPlan
) -> dict[str, float]:
    """Energy ``||D_k||^2 / (eta E)^2`` of one client's update, by group.

    Parameters
    ----------
    update : mapping of str to array
        The client's change of the active tensors.
    groups : mapping of str to str
        Group of each active factor tensor.
    plan : RoundPlan
        Gives learning rates and steps.
    """
    energies: dict[str, float] = defaultdict(float)
    for name, group in groups.items():
        value = update[name].astype(np.float64)
        rate = plan.learning_rate(name) * plan.local_steps
        energies[group] += float(np.vdot(value, value)) / rate**2
    return dict(energies)


def stated_noise(
    reply: Message,
    update: Mapping[str, npt.NDArray[np.float32]],
    groups: Mapping[str, str],
    plan: RoundPlan,
) -> float | None:
    """Read the noise that a client states, sigma C / b, unless its own update belies it.

    An update holds its noise, so its energy cannot be far below that of the noise alone.  A larger
    statement would push the debiased scores of all clients far below zero, for as long as the
    moving average remembers; it counts as not stated.
    """
    record = reply.content.get(PRIVACY_KEY)
    value = record.get("noise-std") if isinstance(record, ConfigRecord) else None
    if not isinstance(value, float) or not 0 <= value <= 1e100:
        return None
    numel = sum(
        filtered_numel(update[name].shape, name) if plan.low_pass else update[name].size
        for name in groups
    )
    floor = numel * value**2 / plan.local_steps
    energy = sum(own_energies(update, groups, plan).values())
    return value if floor <= _FLOOR_OVER_ENERGY * energy else None


def largest_scores(
    update: Mapping[str, npt.NDArray[np.float32]], groups: Mapping[str, str], plan: RoundPlan
) -> dict[str, float]:
    """How large a score by group counts that comes with this update.

    A score is the update's energy less noise and bend; ten times that energy leaves honest ones
    alone and ties a liar's word to the length of its update, which the norm bound limits.
    """
    energies = own_energies(update, groups, plan)
    return {group: _SCORE_OVER_ENERGY * energy for group, energy in energies.items()}
