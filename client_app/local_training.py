"""A client's round: private steps on the active tensors, and what came of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from privacy import PrivateGradient, StepKind, binomial_low_pass
from strategies import GradientEnergies, RoundPlan, kind_of

from .trace import MessageTrace


class TrainingError(RuntimeError):
    """Training did something that no private step may do."""


def train_round(
    plan: RoundPlan,
    adapter: Mapping[str, nn.Parameter],
    gradient: PrivateGradient,
    energies: GradientEnergies | None = None,
    trace: MessageTrace | None = None,
) -> dict[str, Tensor]:
    """Take the round's private steps and return the change of the tensors it made active.

    Parameters
    ----------
    plan : RoundPlan
        Which tensors each step trains, and how.
    adapter : mapping of str to nn.Parameter
        All adapter tensors, at the values the server sent; trained in place.
    gradient : PrivateGradient
        Gives noised gradients.  Everything done with them here is post-processing.
    energies : GradientEnergies, optional
        Is given each step's noised, filtered gradients, from which it makes scores.
    trace : MessageTrace, optional
        Is told the time that steps take.

    Returns
    -------
    dict of str to Tensor
        ``theta_after - theta_before`` on the CPU, float32, of ``plan.uploaded(...)``.

    Raises
    ------
    TrainingError
        If a tensor that should not move did, or, under noise, one that should did not.
    """
    before = _copy(adapter)
    optimizer = _make_optimizer(plan, adapter)
    for step in range(1, plan.local_steps + 1):
        active = plan.active(step, adapter)
        start = _copy(adapter) if step <= 2 else {}  # every pattern of active tensors shows by then
        with (trace or MessageTrace()).span("steps"):
            released = gradient.step(active, step_kind(active))
            for name, value in released.items():
                kind = kind_of(name)
                if plan.low_pass and (kind == "A" or kind == "B"):
                    value = binomial_low_pass(value, kind)
                released[name] = adapter[name].grad = value
            if energies is not None:
                energies.add(step, {n: v.to("cpu").numpy() for n, v in released.items()})
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # frozen tensors are skipped: no gradient at all
        if start:
            _check_movement(start, adapter, active, must_move=gradient.plan.is_private)
    uploaded = plan.uploaded(adapter)
    _check_movement(before, adapter, uploaded, must_move=False)
    return {n: (adapter[n].detach() - before[n]).to("cpu", torch.float32) for n in uploaded}


def step_kind(active: Sequence[str]) -> StepKind:
    """Which factors a step trains, which chooses its clip norm."""
    kinds = {kind_of(name) for name in active} - {"head"}
    return "A" if kinds == {"A"} else "B" if kinds == {"B"} else "mixed"


def _make_optimizer(plan: RoundPlan, adapter: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    # Steps that leave a tensor without gradient leave its state alone: under alternation each
    # factor keeps moments of its own.  States start afresh every round, as clients may miss some.
    groups = [
        {"params": [adapter[name]], "lr": plan.learning_rate(name)}
        for name in plan.uploaded(adapter)
    ]
    if plan.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=0.0)
    return torch.optim.SGD(groups)


def _copy(adapter: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in adapter.items()}


def _check_movement(
    before: Mapping[str, Tensor],
    adapter: Mapping[str, nn.Parameter],
    active: Sequence[str],
    *,
    must_move: bool,
) -> None:
    for name, p in adapter.items():
        moved = not torch.equal(before[name], p.detach())
        if moved and name not in active:
            raise TrainingError(f"{name} moved, though the round does not train it")
        if must_move and name in active and not moved:
            raise TrainingError(f"{name} did not move, though it is trained")
