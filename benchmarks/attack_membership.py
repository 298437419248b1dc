"""Membership inference: telling by what a site sent whether it holds a record.

Worlds are played through the production client.  In half of them the site holds the target, in
the others it does not; noise and batches come from the secure source, anew in each.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .attack_bounds import Floats, TradeOff, area_under_curve, operate, trade_off
from .attack_site import (
    LEARNING_RATE,
    LEVELS,
    TRAINED,
    Server,
    ask_site,
    clipped,
    plan_of,
    read_records,
    released_sum,
    round_plan,
    run_config,
    site_context,
    write_records,
)

FALSE_POSITIVE_RATES = (0.1, 0.01, 0.001)
ATTACKERS = ("knows the record", "knows all records")
# In place of the noise where there is none: the rounding of float32 updates.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Game:
    """One arm of the membership attack.

    Parameters
    ----------
    folder : str
        Where :func:`write_sites` put the sites' records and the adapters.
    trained, level : str
        Keys of ``TRAINED`` and ``LEVELS``.
    rounds : int
        Rounds that the attacker sees, which are all of the run.
    targets : int
        Different target records.
    sample_rate, max_grad_norm : float
        Of the run.
    """

    folder: str
    trained: str
    level: str
    rounds: int
    targets: int
    sample_rate: float
    max_grad_norm: float

    @property
    def config(self) -> dict[str, str | int | float | bool]:
        """The run config of the attacked run."""
        return run_config(
            LEVELS[self.level],
            rounds=self.rounds,
            sample_rate=self.sample_rate,
            max_grad_norm=self.max_grad_norm,
        )


def write_sites(
    folder: Path,
    others: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]],
    targets: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]],
) -> None:
    """Write the site's records without any target, and with each."""
    write_records(folder / "without.npz", *others)
    write_records(folder / "targets.npz", *targets)
    for number, (image, label) in enumerate(zip(*targets, strict=True)):
        images = np.concatenate([others[0], image[None]])
        write_records(folder / f"with-{number}.npz", images, np.append(others[1], label))


def write_adapters(folder: Path, adapters: list[dict[str, npt.NDArray[np.float32]]]) -> None:
    """Keep the adapters that the server sends, one a round."""
    for number, adapter in enumerate(adapters, start=1):
        np.savez(folder / f"adapter-{number}.npz", **adapter)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=8)
def read_adapter(folder: str, server_round: int) -> dict[str, npt.NDArray[np.float32]]:
    """The adapter that the server sends in a round."""
    with np.load(Path(folder) / f"adapter-{server_round}.npz") as file:
        return {name: file[name] for name in file.files}


class Evidence:
    """Weighs a released sum for and against each target, at one adapter.

    Parameters
    ----------
    targets, others : numpy.ndarray
        (m, d) and (n, d) gradients at the adapter, clipped as the site clips.
    sample_rate : float
        Poisson rate q.
    noise_std : float
        Standard deviation of the noise on each value of the sum, > 0.

    Notes
    -----
    The sum is ``S = z g + O + noise`` with the target's gradient g, ``z = 1`` if the target is in
    the batch (probability q if the site holds it, 0 if not), and O that of the other records.

    *Knows the record* scores ``<S, g> / |g|``.  If O is a constant, S is ``N(O + z g, s^2 I)``,
    whose likelihood ratio between z = 1 and z = 0 is ``exp((<S - O, g> - |g|^2 / 2) / s^2)``.  By
    the Neyman-Pearson lemma the test that rejects for large values of it has the largest power at
    every false positive rate, and it is a rising function of ``<S, g>``.  That z itself is random
    makes the ratio ``1 - q + q exp(...)``, which rises in ``<S, g>`` too: the same tests.

    *Knows all records* knows the gradients G of the others, too, but not who was in the batch.  It
    takes O for Gaussian with its true mean ``q sum(G)`` and covariance ``q (1 - q) G'G``, so S has
    covariance ``V = s^2 I + q (1 - q) G'G``, and scores the logarithm of
    ``1 - q + q exp(g' V^-1 (S - q sum(G)) - g' V^-1 g / 2)``.  Over rounds these add up, since
    batches and noise are independent.  Optimal if O were Gaussian; exactly so without others.
    """

    def __init__(
        self, targets: Floats, others: Floats, sample_rate: float, noise_std: float
    ) -> None:
        self._rate = sample_rate
        self._directions = targets / np.maximum(
            np.linalg.norm(targets, axis=1, keepdims=True), 1e-300
        )
        self._mean = sample_rate * others.sum(axis=0)
        self._whitened = _solve(targets, others, sample_rate * (1 - sample_rate), noise_std**2)
        self._squared = (self._whitened * targets).sum(axis=1)

    def along(self, total: Floats, target: int) -> float:
        """``<S, g> / |g|``: the score of the attacker who knows the record only."""
        return float(total @ self._directions[target])

    def log_ratio(self, total: Floats, target: int) -> float:
        """Logarithm of the likelihood ratio for the attacker who knows all records."""
        exponent = self._whitened[target] @ (total - self._mean) - self._squared[target] / 2
        if self._rate >= 1:
            return float(exponent)
        return float(np.logaddexp(np.log1p(-self._rate), np.log(self._rate) + exponent))


def _solve(rows: Floats, others: Floats, weight: float, variance: float) -> Floats:
    """``V^-1`` times each row for ``V = variance I + weight G'G``, by Woodbury's identity."""
    if weight <= 0 or len(others) == 0:
        return rows / variance
    inner = others @ others.T + np.eye(len(others)) * (variance / weight)
    return (rows - np.linalg.solve(inner, others @ rows.T).T @ others) / variance


def play(game: Game, worlds: int) -> dict[str, Any]:
    """Play worlds through the production client and score what comes back.

    Each target is in as many worlds as it is out of, so the pooled rates are plain means over the
    targets of points below one concave curve, and lie below it.

    Parameters
    ----------
    game : Game
        The arm.
    worlds : int
        Rounded up to a multiple of twice the number of targets.

    Returns
    -------
    dict
        ``inside`` (worlds,) whether the site held the target; ``scores`` (2, worlds, rounds) of
        each attacker and round; ``noise_multiplier``; ``gradient_norms`` of the targets over C,
        before the clip.
    """
    folder, trained = Path(game.folder), TRAINED[game.trained]
    server = Server(game.config)
    others, targets = (read_records(folder / f"{n}.npz") for n in ("without", "targets"))
    most = len(others[1]) + 1
    plan = plan_of(game.config, most)
    normaliser = plan.expected_batch_size
    evidence, norms = [], []
    for number in range(1, game.rounds + 1):
        adapter = read_adapter(game.folder, number)
        batches = [server.batch(*part) for part in (targets, others)]
        raw = [server.gradients(adapter, trained, batch) for batch in batches]
        norms.append(np.linalg.norm(raw[0], axis=1) / game.max_grad_norm)
        rows = [clipped(part, plan.clip_norm(trained.kind)) for part in raw]
        noise_std = plan.noise_std(trained.kind) or _ROUNDING
        evidence.append(Evidence(rows[0], rows[1], plan.sample_rate, noise_std))
    worlds += -worlds % (2 * game.targets)
    chosen = np.arange(worlds) // 2 % game.targets
    inside = np.arange(worlds) % 2 == 0
    scores = np.empty((len(ATTACKERS), worlds, game.rounds))
    for world in range(worlds):
        name = f"with-{chosen[world]}" if inside[world] else "without"
        context = site_context(game.config, folder / f"{name}.npz")
        # Zero-out adjacency: a site with one record fewer divides by a smaller constant.  With
        # its learning rate made smaller alike it does, step for step, what the full site would
        # do if the target contributed zero.
        rate = LEARNING_RATE if inside[world] else LEARNING_RATE * (most - 1) / most
        for number in range(1, game.rounds + 1):
            adapter = read_adapter(game.folder, number)
            message_plan = round_plan(trained, number, rate)
            update = ask_site(context, message_plan, adapter, server.model.fingerprint)
            total = released_sum(server, trained, update, normaliser)
            here = evidence[number - 1]
            scores[0, world, number - 1] = here.along(total, chosen[world])
            scores[1, world, number - 1] = here.log_ratio(total, chosen[world])
    return {
        "inside": inside,
        "scores": scores,
        "noise_multiplier": plan.noise_multiplier,
        "gradient_norms": np.median(norms),
    }


def rows_of(game: Game, played: dict[str, Any], error: float) -> list[dict[str, Any]]:
    """What an arm shows: a row per attacker and number of rounds seen.

    Parameters
    ----------
    game : Game
        The arm.
    played : dict
        Of :func:`play`.
    error : float
        Probability with which each side of each interval for the check may miss.
    """
    inside, scores = played["inside"], played["scores"]
    rows = []
    for seen in dict.fromkeys((1, game.rounds)):
        bound = None
        if LEVELS[game.level] is not None:
            bound = trade_off(
                sample_rate=game.sample_rate,
                noise_multiplier=played["noise_multiplier"],
                steps=seen,
            )
        for index, attacker in enumerate(ATTACKERS):
            # Batches and noise are independent over rounds, and the adapters are given: each
            # round of a world is a test of one round by itself.
            values, held = scores[index].sum(axis=1), inside
            if seen == 1:
                values, held = scores[index].reshape(-1), np.repeat(inside, game.rounds)
            row = {
                "attack": "membership",
                "trained": game.trained,
                "level": game.level,
                "rounds": seen,
                "attacker": attacker,
                "noise_multiplier": played["noise_multiplier"],
                "gradient_norm_over_clip_norm": float(played["gradient_norms"]),
            }
            rows.append(row | summary(values[held], values[~held], bound, error))
    return rows


def summary(
    inside: Floats, outside: Floats, bound: TradeOff | None, error: float
) -> dict[str, Any]:
    """ROC figures of one test, each beside what the guarantee allows (1 without one).

    A *violation* is a true positive rate whose lower limit is above the bound at the false
    positive rate's upper limit: where the guarantee holds, either limit fails with probability at
    most ``error``.
    """
    auc, deviation = area_under_curve(inside, outside)
    points = []
    for fpr in FALSE_POSITIVE_RATES:
        shown = operate(inside, outside, fpr, 0.025)
        checked = operate(inside, outside, fpr, error)
        allowed = 1.0 if bound is None else bound.power(checked.fpr_high)
        points.append(
            {
                "fpr": fpr,
                "fpr_resolved": shown.resolved,
                "fpr_high": shown.fpr_high,
                "tpr": shown.tpr,
                "tpr_low": shown.tpr_low,
                "tpr_high": shown.tpr_high,
                "bound": 1.0 if bound is None else bound.power(shown.resolved),
                "bound_high": 1.0 if bound is None else bound.power(shown.fpr_high),
                "checked_low": checked.tpr_low,
                "checked_bound": allowed,
                "ok": checked.tpr_low <= allowed,
            }
        )
    return {
        "worlds": [len(inside), len(outside)],
        "auc": auc,
        "auc_low": auc - 1.96 * deviation,
        "auc_high": auc + 1.96 * deviation,
        "auc_bound": 1.0 if bound is None else bound.auc(),
        "points": points,
    }
