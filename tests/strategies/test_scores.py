"""Scores against quadratic problems whose true decrease is known."""

from __future__ import annotations

import numpy as np
import pytest

from strategies.scores import UpdateEnergies, filtered_numel

NAME = "model.blocks.0.attn.qkv.lora_A.weight"
RANK, LENGTH = 2, 60
# eta E kappa is at most 0.36: to second order the score is the decrease, the rest is below 1 %.
STEPS, LR, NOISE = 200, 0.0006, 0.5
GROUPS = {NAME: "block"}


class Quadratics:
    """Clients with losses ``(x - c_k)^T H (x - c_k) / 2``, H diagonal, x of one factor's shape."""

    def __init__(self, spread: float, clients: int = 4, *, smooth: bool = False) -> None:
        generator = np.random.default_rng(0)
        self.hessian = generator.uniform(0.5, 3.0, (RANK, LENGTH))
        if smooth:  # the filter leaves smooth gradients nearly alone
            self.hessian[:] = self.hessian.mean(axis=1, keepdims=True)
        wave = np.sin(np.arange(LENGTH) / LENGTH * np.pi)[None, :] * np.array([[1.0], [0.6]])
        common = wave if smooth else generator.standard_normal((RANK, LENGTH))
        offsets = generator.standard_normal((clients, RANK, LENGTH))
        offsets -= offsets.mean(axis=0)
        self.centres = common + spread * offsets
        self.weights = np.array([1.0, 2.0, 1.0, 4.0][:clients])
        self.weights /= self.weights.sum()

    def loss(self, x: np.ndarray) -> float:
        gaps = self.hessian * (x - self.centres) ** 2 / 2
        return float(np.tensordot(self.weights, gaps.sum(axis=(1, 2)), 1))

    def walk(self, client: int, noise: np.random.Generator | None, low_pass: bool) -> np.ndarray:
        x = np.zeros((RANK, LENGTH))
        for _ in range(STEPS):
            gradient = self.hessian * (x - self.centres[client])
            if noise is not None:
                gradient = gradient + NOISE * noise.standard_normal(gradient.shape)
            x = x - LR * (filtered(gradient) if low_pass else gradient)
        return x

    def round(self, noise: np.random.Generator | None, low_pass: bool = False):
        """One round: the energies as the strategy sees them, and the mean change."""
        energies = UpdateEnergies(GROUPS)
        mean = np.zeros((RANK, LENGTH))
        for client, weight in enumerate(self.weights):
            change = self.walk(client, noise, low_pass)
            energies.add({NAME: change}, weight, 0.0 if noise is None else NOISE)
            mean += weight * change
        return energies, {NAME: mean}


def filtered(gradient: np.ndarray) -> np.ndarray:
    padded = np.pad(gradient, ((0, 0), (2, 2)), mode="symmetric")
    kernel = np.array([1, 4, 6, 4, 1]) / 16
    return np.stack([np.convolve(row, kernel, mode="valid") for row in padded])


def average(problem: Quadratics, source: str, draws: int, low_pass: bool = False) -> float:
    noise = np.random.default_rng(1)
    scores = []
    for _ in range(draws):
        energies, mean = problem.round(noise, low_pass)
        if source == "debiased":
            scores.append(energies.debiased(mean, {NAME: LR}, STEPS, low_pass=low_pass)["block"])
        else:
            scores.append(energies.pairwise(mean, {NAME: LR}, STEPS)["block"])
    return float(np.mean(scores))


def true_decrease(problem: Quadratics, low_pass: bool = False) -> float:
    """Loss that the round gains without noise, per unit of learning rate and step."""
    _, mean = problem.round(None, low_pass)
    return (problem.loss(np.zeros((RANK, LENGTH))) - problem.loss(mean[NAME])) / (LR * STEPS)


def energy_of_the_mean(problem: Quadratics, low_pass: bool = False) -> float:
    _, mean = problem.round(None, low_pass)
    return float(np.square(mean[NAME] / (LR * STEPS)).sum())


@pytest.mark.parametrize("low_pass", [False, True])
def test_both_scores_are_the_true_decrease_for_identical_clients(low_pass):
    """Within 2 % over 60 noise draws; the gradient's energy at the start is far off.

    Standard error of either average is below 0.5 %, seed fixed.
    """
    problem = Quadratics(spread=0.0, smooth=low_pass)
    truth = true_decrease(problem, low_pass)
    for source in ("debiased", "pairwise"):
        assert average(problem, source, 60, low_pass) == pytest.approx(truth, rel=0.02)
    first_order = float(np.square(problem.hessian * problem.centres[0]).sum())
    assert first_order > 1.2 * truth


def test_debiased_is_right_for_heterogeneous_clients_and_pairwise_lies_below():
    """``||sum_k p_k gbar_k||^2``, the energy of these clients' mean."""
    problem = Quadratics(spread=1.0)
    truth = energy_of_the_mean(problem)
    assert average(problem, "debiased", 60) == pytest.approx(truth, rel=0.02)
    assert average(problem, "pairwise", 60) < 0.9 * truth


def test_without_the_floor_noise_would_pass_for_progress():
    problem = Quadratics(spread=0.0)
    truth = true_decrease(problem)
    noise = np.random.default_rng(2)
    energies, mean = problem.round(noise)
    naive = float(np.square(mean[NAME] / (LR * STEPS)).sum())
    floor = energies.noise_floors(mean, STEPS, low_pass=False)["block"]
    assert floor == pytest.approx(RANK * LENGTH * (problem.weights**2).sum() * NOISE**2 / STEPS)
    assert naive - floor == pytest.approx(truth, rel=0.05)


def test_pure_noise_scores_zero_on_average():
    """A useless factor: 400 rounds, mean within 4 standard errors of 0, seed fixed."""
    noise = np.random.default_rng(3)
    shape = (RANK, LENGTH)
    for source in ("debiased", "pairwise"):
        scores = []
        for _ in range(400):
            energies, mean = UpdateEnergies(GROUPS), np.zeros(shape)
            for _ in range(3):
                change = -LR * NOISE * noise.standard_normal((STEPS, *shape)).sum(axis=0)
                energies.add({NAME: change}, 1.0, NOISE)
                mean += change / 3
            if source == "debiased":
                got = energies.debiased({NAME: mean}, {NAME: LR}, STEPS, low_pass=False)
            else:
                got = energies.pairwise({NAME: mean}, {NAME: LR}, STEPS)
            scores.append(got["block"])
        error = np.std(scores) / np.sqrt(len(scores))
        assert abs(np.mean(scores)) < 4 * error


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 9, 40])
def test_filtered_variance_equals_the_filters_matrix(length):
    matrix = filtered(np.eye(length)).T if length > 1 else np.eye(1)
    expected = 3 * float(np.square(matrix).sum())
    assert filtered_numel((3, length), "x.lora_A.weight") == pytest.approx(expected)
    assert filtered_numel((length, 3), "x.lora_B.weight") == pytest.approx(expected)


def test_one_client_has_no_pairs_and_unknown_noise_has_no_floor():
    energies = UpdateEnergies(GROUPS)
    change = {NAME: np.ones((RANK, LENGTH))}
    energies.add(change, 5.0, None)
    assert energies.pairwise(change, {NAME: LR}, STEPS) == {}
    assert not energies.noise_is_known
    with pytest.raises(ValueError, match="did not state"):
        energies.debiased(change, {NAME: LR}, STEPS, low_pass=False)


def test_weights_need_no_normalisation():
    one, other = UpdateEnergies(GROUPS), UpdateEnergies(GROUPS)
    changes = np.random.default_rng(4).standard_normal((3, RANK, LENGTH))
    for change, weight in zip(changes, (1.0, 2.0, 3.0), strict=True):
        one.add({NAME: change}, weight, 0.1)
        other.add({NAME: change}, weight * 100, 0.1)
    mean = {NAME: np.tensordot([1 / 6, 2 / 6, 3 / 6], changes, 1)}
    lr = {NAME: LR}
    assert one.pairwise(mean, lr, 5) == pytest.approx(other.pairwise(mean, lr, 5))
    assert one.debiased(mean, lr, 5, low_pass=True) == pytest.approx(
        other.debiased(mean, lr, 5, low_pass=True)
    )
