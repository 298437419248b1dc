"""Rounds of which only a noised sum may be used: the seam for privacy of whole clients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
from flwr.serverapp import Grid

from .nodes import wait_for_nodes
from .replies import Float64s
from .scores import UpdateEnergies
from .settings import PRODUCT_METHODS

if TYPE_CHECKING:
    from .base import LoRAStrategy


class NodeDraw(Protocol):
    """What all mechanisms for whole clients have: who is protected, and who is asked."""

    @property
    def unit(self) -> str:
        """What is protected."""
        ...

    @property
    def guards_against(self) -> str:
        """Against whom."""
        ...

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each value of the latest mean."""
        ...

    def draw(self, server_round: int, candidates: int) -> npt.NDArray[np.bool_]:
        """Say of each connected node whether the round asks it."""
        ...


class ClientLevel(NodeDraw, Protocol):
    """What noises a round's sum; ``privacy.ClientLevelMechanism`` is one."""

    @property
    def secure(self) -> bool:
        """Whether nobody can reproduce the noise."""
        ...

    def clip(self, update: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, Float64s]:
        """One client's contribution to the sum."""
        ...

    def release(self, server_round: int, sums: Mapping[str, Float64s]) -> dict[str, Float64s]:
        """The noised mean of a round; each call costs privacy."""
        ...


class ReleasedMean:
    """Sum of clipped updates of which only the noised mean comes out, once.

    Parameters
    ----------
    mechanism : ClientLevel
        Clips each update, noises the sum.
    server_round : int
        The round.
    shapes : mapping of str to tuple of int
        All tensors that the round trains; they are released also if nobody answers.

    Notes
    -----
    A client that fails, is late or is refused adds zero, and the divisor stays what it is: both
    are what the mechanism's guarantee assumes.
    """

    def __init__(
        self,
        mechanism: ClientLevel,
        server_round: int,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.count = 0
        self._mechanism = mechanism
        self._round = server_round
        self._sums = {name: np.zeros(shape) for name, shape in shapes.items()}
        self._released: dict[str, Float64s] | None = None

    def add(self, update: Mapping[str, npt.NDArray[np.float32]], weight: float) -> None:
        """Clip one update, whatever its client did already, and add it; ``weight`` must be 1."""
        if weight != 1.0:
            raise ValueError(f"clients weigh the same under client-level privacy, got {weight}")
        if self._released is not None:
            raise RuntimeError("this round's sum is released already")
        for name, value in self._mechanism.clip(update).items():
            self._sums[name] += value
        self.count += 1

    def mean(self) -> dict[str, Float64s]:
        """The noised mean; drawn at the first call, the same at every later one."""
        if self._released is None:
            self._released = self._mechanism.release(self._round, self._sums)
            self._sums = {}
        return dict(self._released)


def poisson_nodes(
    grid: Grid, mechanism: NodeDraw, server_round: int, *, available: int, timeout: float
) -> list[int]:
    """Ask each connected node with the mechanism's own coin; possibly nobody.

    Flower's sampling, of a fixed number, has another privacy loss than the accountant's.

    Raises
    ------
    NotEnoughNodes
        If fewer than ``available`` nodes connect within ``timeout`` seconds.
    """
    connected = wait_for_nodes(grid, available, timeout)
    asked = mechanism.draw(server_round, len(connected))
    return [node for node, drawn in zip(connected, asked, strict=True) if drawn]


def check_client_level(strategy: LoRAStrategy, *, one_step: bool = False) -> None:
    """Refuse what needs single updates, or weights that differ.

    Parameters
    ----------
    strategy : LoRAStrategy
        What is checked.
    one_step : bool (default: False)
        Whether sums are of gradients: then a round is one step of SGD, which the server takes.

    Raises
    ------
    ValueError
        Saying what, and what is accepted.
    """
    if strategy.name in PRODUCT_METHODS:
        raise ValueError(
            f"{strategy.name} needs each client's own factors, of which client-level privacy "
            "releases the noised sum only; accepted are methods that average the factors"
        )
    wanted: dict[str, object] = {
        "weighting": "uniform",
        "trim": 0.0,
        "update_bound": None,
        "fraction_train": 1.0,
        "low_pass": False,  # before the noise it only bends the update
    }
    if one_step:
        wanted |= {"local_steps": 1, "optimizer": "sgd"}
    for name, accepted in wanted.items():
        if (value := getattr(strategy, name)) != accepted:
            raise ValueError(
                f"{name} must be {accepted!r} under client-level privacy, got {value!r}"
            )
    score = getattr(strategy, "score", "auto")
    if score not in ("auto", "debiased"):
        raise ValueError(
            f"score {score!r} looks at single updates; under client-level privacy 'auto' and "
            "'debiased' are accepted"
        )


class ReleasedEnergies(UpdateEnergies):
    """AS-LoRA's debiased scores from a released mean alone: no single update is looked at.

    ``(||mean||^2 - numel std^2) / (eta E)^2`` by group: the noise on the mean is known exactly,
    whatever optimizer the clients use, and is put on after any filter.

    Parameters
    ----------
    groups : mapping of str to str
        Group of each active factor tensor.
    mechanism : NodeDraw
        Knows the noise on each value of the mean.
    """

    def __init__(self, groups: Mapping[str, str], mechanism: NodeDraw) -> None:
        super().__init__(groups)
        self._mechanism = mechanism

    @property
    def noise_is_known(self) -> bool:
        """It is the mechanism's own."""
        return True

    def add(
        self, update: Mapping[str, npt.NDArray[np.float32]], weight: float, noise_std: float | None
    ) -> None:
        """Refused: single updates must leave no trace but in the sum."""
        raise RuntimeError("single updates are not looked at under client-level privacy")

    def debiased(
        self,
        mean: Mapping[str, Float64s],
        lr: Mapping[str, float],
        steps: int,
        *,
        low_pass: bool,
    ) -> dict[str, float]:
        """Energy of the released mean with its noise taken off, by group."""
        self._lr = lr
        return super().debiased(mean, lr, steps, low_pass=low_pass)

    def noise_floors(
        self, mean: Mapping[str, Float64s], steps: int, *, low_pass: bool
    ) -> dict[str, float]:
        """Expected energy of the noise alone, by group, in the units of the scores."""
        floors: dict[str, float] = defaultdict(float)
        for name, group in self._groups.items():
            # The noise of a mean gradient is in the scores' units already.
            of_gradients = getattr(self._mechanism, "of_gradients", False)
            scale = 1.0 if of_gradients else self._lr[name] * steps
            floors[group] += mean[name].size * (self._mechanism.noise_std / scale) ** 2
        return dict(floors)


def energies_of(groups: Mapping[str, str], mechanism: NodeDraw | None) -> UpdateEnergies:
    """What AS-LoRA learns from in a round: all updates, or their released mean alone."""
    return UpdateEnergies(groups) if mechanism is None else ReleasedEnergies(groups, mechanism)


def describe_client_level(mechanism: NodeDraw | None, otherwise: str) -> Sequence[str]:
    """Lines of the summary: unit and, under client-level privacy, against whom."""
    if mechanism is None:
        return [f"Unit: {otherwise}"]
    return [f"Unit: {mechanism.unit}", f"Guards against: {mechanism.guards_against}"]
