"""Before anything is timed: every arm must compute the same sum, or its time means nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from privacy import joint_norms

from .report import Rows
from .step_arms import Arm, PrivateArm, StepError
from .step_models import SETS

# Relative L2 distances.  Autocast rounds every product to 8 bits, in each arm elsewhere.
SUM_ERROR = {"float32": 1e-4, "bfloat16": 5e-2}
CLIPPED_ERROR = {"float32": 1e-5, "bfloat16": 5e-2}


def same_thing(arms: Mapping[str, Arm], dtype: str) -> Rows:
    """Compare the sums of a model's arms, for each set of trained tensors.

    Unclipped, a private arm's sum is the number of records times the mean gradient that PEFT and
    autograd give.  Clipped, so that half of the records are, all private arms agree.

    Returns
    -------
    list of dict
        A row per comparison, with its relative L2 distance.

    Raises
    ------
    StepError
        Naming the arms that differ.
    """
    rows: Rows = []
    for trained in SETS:
        hooks = arms[f"hooks {trained}"]
        sides = [f"{s} {trained}" for s in ("private", "opacus") if f"{s} {trained}" in arms]
        mean = arms[f"peft {trained}"].summed(math.inf)
        for name in [*sides, f"hooks {trained}"]:
            ours = arms[name].summed(math.inf)
            rows.append(_compare(f"{name}, unclipped, and peft", ours, mean, SUM_ERROR[dtype]))
        norm = median_norm(hooks)
        clipped = hooks.summed(norm)
        for name in sides:
            ours = arms[name].summed(norm)
            what = f"{name} and hooks {trained}, clipped"
            rows.append(_compare(what, ours, clipped, CLIPPED_ERROR[dtype]))
    return rows


def median_norm(arm: Arm) -> float:
    """The norm that half of the batch's records exceed."""
    if not isinstance(arm, PrivateArm):
        raise TypeError(f"a {type(arm).__name__} gives no record's gradient")
    return float(joint_norms(arm.record_gradients()).median())


def _compare(
    what: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], limit: float
) -> dict[str, Any]:
    if ours.keys() != theirs.keys():
        raise StepError(f"{what}: not the same tensors")
    reference = torch.cat([theirs[name].detach().double().flatten() for name in theirs])
    difference = torch.cat([ours[name].detach().double().flatten() for name in theirs]) - reference
    error = float(difference.norm() / reference.norm())
    if not error <= limit:  # NaN, too
        raise StepError(f"{what}: not the same sum (relative difference {error:.2g} > {limit:g})")
    return {"kind": "check", "check": what, "error": error, "limit": limit}
