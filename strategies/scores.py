"""How much a factor would gain: scores from what clients have privatised and sent.

A round of E local SGD steps at learning rate eta moves client k's tensors by
``D_k = -eta E gbar_k``, gbar_k being the mean of its noised gradients.  The squared norm of the
mean over clients estimates, to second order, the loss that one more such round gains per unit of
learning rate and step (after AS-LoRA, arXiv 2605.05769): curvature along the way is in it already,
because gbar is the mean over the way and not the gradient at its start.

Everything here is a function of the updates and of public numbers, so it costs no privacy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

ScoreSource = Literal["debiased", "pairwise", "client"]

_KERNEL = np.array([1.0, 4.0, 6.0, 4.0, 1.0]) / 16


class UpdateEnergies:
    """Sums over a round's clients from which every group's score follows.

    Parameters
    ----------
    groups : mapping of str to str
        Group of each active factor tensor.

    Notes
    -----
    Memory does not grow with the number of clients: each update is added and dropped.
    """

    def __init__(self, groups: Mapping[str, str]) -> None:
        self._groups = groups
        self._weights = 0.0
        self._weights_squared = 0.0
        self._squares: dict[str, float] = defaultdict(float)
        self._noise: float | None = 0.0

    def add(
        self,
        update: Mapping[str, npt.NDArray[np.float32]],
        weight: float,
        noise_std: float | None,
    ) -> None:
        """Add a client's update.

        Parameters
        ----------
        update : mapping of str to array
            The client's change of the active tensors.
        weight : float
            Its weight in the mean, before normalisation.
        noise_std : float or None
            Standard deviation of the noise on each value of each step's mean gradient
            (sigma C / b), if the client states it.
        """
        self._weights += weight
        self._weights_squared += weight**2
        for name, group in self._groups.items():
            value = update[name].astype(np.float64)
            self._squares[group] += weight**2 * float(np.vdot(value, value))
        if noise_std is None:
            self._noise = None
        elif self._noise is not None:
            self._noise += (weight * noise_std) ** 2

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups that the round trained, in order."""
        return tuple(dict.fromkeys(self._groups.values()))

    @property
    def noise_is_known(self) -> bool:
        """Whether every client stated its noise."""
        return self._noise is not None

    def pairwise(
        self, mean: Mapping[str, npt.NDArray[np.float64]], lr: Mapping[str, float], steps: int
    ) -> dict[str, float]:
        """Energy that distinct clients agree on, by group: a U-statistic over client pairs.

        ``(||sum_k p_k D_k||^2 - sum_k p_k^2 ||D_k||^2) / ((eta E)^2 (1 - sum_k p_k^2))``.

        The noises of different clients are independent, so nothing needs to be subtracted and no
        noise level known.  With clients that pull in different directions it lies below the
        energy of their mean, and can be negative.

        Parameters
        ----------
        mean : mapping of str to array
            Weighted mean of the updates.
        lr : mapping of str to float
            Learning rate of each tensor in the round.
        steps : int
            Local steps E.

        Returns
        -------
        dict of str to float
            Score by group; empty with fewer than two clients.
        """
        share = self._weights_squared / self._weights**2
        if share >= 1:
            return {}
        energies = self._mean_energies(mean, lr, steps)
        scores = {}
        for group, energy in energies.items():
            scale = (self._rate_of(group, lr) * steps) ** 2
            own = self._squares[group] / self._weights**2 / scale
            scores[group] = (energy - own) / (1 - share)
        return scores

    def debiased(
        self,
        mean: Mapping[str, npt.NDArray[np.float64]],
        lr: Mapping[str, float],
        steps: int,
        *,
        low_pass: bool,
    ) -> dict[str, float]:
        """Energy of the mean update with the noise's share taken off, by group.

        ``||sum_k p_k D_k||^2 / (eta E)^2 - numel sum_k p_k^2 nu_k / E``, with
        ``nu_k = (sigma_k C / b_k)^2``; with the low-pass filter each coordinate counts with the
        variance that the filter leaves it (70/256 inside).  Unbiased for these clients' mean,
        heterogeneous or not, up to the variance of Poisson sampling; plain SGD only.

        Parameters as in :meth:`pairwise`; ``low_pass`` says whether gradients were filtered.

        Raises
        ------
        ValueError
            If a client did not state its noise.
        """
        floors = self.noise_floors(mean, steps, low_pass=low_pass)
        energies = self._mean_energies(mean, lr, steps)
        return {group: energy - floors[group] for group, energy in energies.items()}

    def noise_floors(
        self, mean: Mapping[str, npt.NDArray[np.float64]], steps: int, *, low_pass: bool
    ) -> dict[str, float]:
        """Expected energy of the noise alone, by group, in the units of the scores."""
        if self._noise is None:
            raise ValueError("a client did not state the noise on its gradients")
        per_value = self._noise / self._weights**2 / steps
        floors: dict[str, float] = defaultdict(float)
        for name, group in self._groups.items():
            shape = mean[name].shape
            count = filtered_numel(shape, name) if low_pass else float(np.prod(shape))
            floors[group] += count * per_value
        return dict(floors)

    def _mean_energies(
        self, mean: Mapping[str, npt.NDArray[np.float64]], lr: Mapping[str, float], steps: int
    ) -> dict[str, float]:
        energies: dict[str, float] = defaultdict(float)
        for name, group in self._groups.items():
            energies[group] += float(np.vdot(mean[name], mean[name])) / (lr[name] * steps) ** 2
        return dict(energies)

    def _rate_of(self, group: str, lr: Mapping[str, float]) -> float:
        return next(lr[name] for name, other in self._groups.items() if other == group)


def filtered_numel(shape: tuple[int, ...], name: str) -> float:
    """Sum over a tensor's coordinates of the variance that the low-pass filter leaves white noise.

    Parameters
    ----------
    shape : tuple of int
        (r, n) for A, filtered along n; (m, r) for B, filtered along m.
    name : str
        The tensor's name.
    """
    length, rows = (shape[1], shape[0]) if ".lora_A." in name else (shape[0], shape[1])
    return rows * _filter_energy(length)


def _filter_energy(length: int) -> float:
    """Squared Frobenius norm of the filter as a matrix, symmetric padding included."""
    if length == 1:
        return 1.0
    # Beyond this length only more inside coordinates come, each with the same gain.
    short = min(length, 8)
    padded = np.pad(np.eye(short), ((2, 2), (0, 0)), mode="symmetric")
    matrix = sum(weight * padded[tap : tap + short] for tap, weight in enumerate(_KERNEL))
    return float(np.square(matrix).sum()) + (length - short) * float(np.square(_KERNEL).sum())
