"""AS-LoRA's ``client`` scores: one number per group of layers, made where the noise is added."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from flwr.app import Message, MetricRecord

from .replies import InvalidReply
from .round_plan import RoundPlan
from .scores import filtered_numel
from .selection import group_of
from .tensor_names import kind_of

SCORES_KEY = "scores"
_LARGEST_SCORE = 1e100  # sums of more could leave a float's range


class GradientEnergies:
    """A client's own scores from the privatised gradients of one round.

    With gbar the mean of the round's E noised gradients of a group's active tensors, g1 and g2
    the means of its first and its last ``floor(E / 2)``, and kappa the curvature along gbar::

        q     = ||gbar||^2 - numel (sigma C / b)^2 / E      noise taken off
        kappa = <gbar, g1 - g2> / (eta ceil(E / 2) q)       secant between the two halves
        score = q (1 - eta kappa / 2)

    (AS-LoRA, arXiv 2605.05769, its score to second order.)  On a quadratic this is the round's
    decrease per unit of learning rate and step.  The noise of the halves cancels in kappa's
    numerator, and q cancels in the product, so the score is unbiased and divides by nothing.

    Parameters
    ----------
    plan : RoundPlan
        Says which steps train what, and ``scores``: what shares one number.
    noise_std : float
        Standard deviation of the noise on each value of a step's mean gradient, sigma C / b.

    Notes
    -----
    Formal guarantee: a function of gradients that are noised already and of public numbers, so
    post-processing; no loss and no raw gradient is looked at.  For clients that pull in different
    directions the mean of their scores lies above the gain of their mean update.
    """

    def __init__(self, plan: RoundPlan, noise_std: float) -> None:
        self._plan = plan
        self._noise_std = noise_std
        self._halves: dict[str, list[npt.NDArray[np.float64]]] = {}

    def add(self, step: int, gradients: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Add the privatised, and where asked for filtered, gradients of a step (from 1)."""
        steps, half = self._plan.local_steps, self._plan.local_steps // 2
        for name, value in gradients.items():
            if kind_of(name) not in ("A", "B"):
                continue
            if name not in self._halves:
                self._halves[name] = [np.zeros(value.shape) for _ in range(3)]
            total, first, last = self._halves[name]
            total += value
            if step <= half:
                first += value
            if step > steps - half:
                last += value

    def scores(self) -> dict[str, float]:
        """The score of each group that the round trained."""
        steps = self._plan.local_steps
        half, apart = steps // 2, steps - steps // 2
        result: dict[str, float] = defaultdict(float)
        for name, (total, first, last) in self._halves.items():
            mean = total / steps
            numel = filtered_numel(mean.shape, name) if self._plan.low_pass else mean.size
            energy = float(np.vdot(mean, mean)) - numel * self._noise_std**2 / steps
            # eta kappa q / 2, kappa q being <gbar, H gbar>.
            bend = float(np.vdot(mean, first - last)) / half / apart / 2 if half else 0.0
            group = group_of(name, "block" if self._plan.scores == "block" else "module")
            result[group] += energy - bend
        return dict(result)


class ClientScores:
    """The server's weighted mean of what clients score.

    Parameters
    ----------
    groups : sequence of str
        Groups that the round trains: each client must score exactly these.
    """

    def __init__(self, groups: Sequence[str]) -> None:
        self._sums = dict.fromkeys(groups, 0.0)
        self._weight = 0.0

    def add(
        self, reply: Message, weight: float, largest: Mapping[str, float] | None = None
    ) -> None:
        """Add a client's scores with its weight in the mean.

        Parameters
        ----------
        reply : Message
            Has the scores.
        weight : float
            The client's weight.
        largest : mapping of str to float, optional
            How large a score of each group counts, whatever is stated.

        Raises
        ------
        InvalidReply
            Unless there is one finite number for each group.
        """
        record = reply.content.get(SCORES_KEY)
        if not isinstance(record, MetricRecord) or set(record) != set(self._sums):
            raise InvalidReply(f"no {SCORES_KEY!r} of exactly the groups that it trained")
        values = {}
        for group, value in record.items():
            if not isinstance(value, int | float) or not abs(value) <= _LARGEST_SCORE:
                raise InvalidReply(f"a score is not a number within {_LARGEST_SCORE:g}")
            limit = _LARGEST_SCORE if largest is None else largest[group]
            values[group] = min(max(float(value), -limit), limit)
        for group, value in values.items():
            self._sums[group] += weight * value
        self._weight += weight

    def mean(self) -> dict[str, float]:
        """``sum_k p_k s_k`` by group."""
        return {group: total / self._weight for group, total in self._sums.items()}
