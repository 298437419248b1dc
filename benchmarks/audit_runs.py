"""Runs of the audit with canaries: what they score, and lower bounds on epsilon from that."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from privacy import PrivacyPlan, PrivateGradient, SeededTestSource, clip_and_sum
from privacy.audit import (
    Canaries,
    accounted_epsilon_bound,
    best_bound,
    epsilon_bound,
    epsilon_from_score_gap,
    gaussian_epsilon_bound,
    recorded,
    threshold_bound,
)

from .audit_site import Reply, Site, released

CLIP_NORM = 1.0
CANARY_NORM = 100.0
CONFIDENCE = 0.99
ANY_MECHANISM = "one run, any mechanism"
OTHERS = 60  # records beside the canaries


@dataclasses.dataclass(frozen=True)
class CanaryRun:
    """A run's scores and coins, and what the client claimed."""

    scores: npt.NDArray[np.float64]
    included: npt.NDArray[np.bool_]
    claimed: float
    reply: Reply

    def bounds(self) -> dict[str, float]:
        """Lower bounds on epsilon by estimator; cheap ones only."""
        delta = float(self.reply.statement["target-delta"])  # type: ignore[arg-type]
        both = (self.scores, self.included)
        return {
            ANY_MECHANISM: best_bound(
                *both, lambda g, risk: epsilon_bound(g, delta=delta, risk=risk),
                confidence=CONFIDENCE,
            ),
            "one run, Gaussian": best_bound(
                *both, lambda g, risk: gaussian_epsilon_bound(g, delta=delta, risk=risk),
                confidence=CONFIDENCE,
            ),
            "score gap": epsilon_from_score_gap(*both, delta=delta, confidence=CONFIDENCE),
        }  # fmt: skip

    def accounted_bound(self) -> float:
        """The bound that knows the claimed rate and number of steps; some seconds."""
        said = {key: float(self.reply.statement[key]) for key in self.reply.statement}  # type: ignore[arg-type]
        return best_bound(
            self.scores,
            self.included,
            lambda guesses, risk: accounted_epsilon_bound(
                guesses,
                sample_rate=said["sample-rate"],
                noise_multiplier=said["noise-multiplier"],
                steps=int(said["steps"]),
                delta=said["target-delta"],
                risk=risk,
            ),
            confidence=CONFIDENCE,
        )


def canary_run(site: Site, *, canaries: int, epsilon: float, seed: int) -> CanaryRun:
    """Train over all rounds with canaries among the records, and score what left the client."""
    drawn = Canaries.draw(site.shapes, np.arange(canaries), seed=seed, norm=CANARY_NORM * CLIP_NORM)
    context = site.context(site.config(records=canaries + OTHERS, epsilon=epsilon))
    state = dict(site.start)
    summed = {name: np.zeros(shape) for name, shape in site.shapes.items()}
    with recorded(drawn):
        for server_round in range(1, site.rounds + 1):
            plan = site.plan(server_round)
            reply = site.train(context, plan, state)
            for name, value in released(reply, plan).items():
                summed[name] += value
                state[name] = state[name] + reply.update[name]
    return CanaryRun(drawn.scores(summed), drawn.included, reply.claimed_epsilon(), reply)


def two_world_bound(trials: int, noise_multiplier: float, seed: int) -> tuple[float, float]:
    """Lower bound from single private steps with and without one record, and the claim.

    The step is :class:`~privacy.PrivateGradient` on one record, with an engine that hands the
    production clipping a made-up gradient: thousands of trials of the client's whole path would
    take hours.
    """
    plan = PrivacyPlan(
        sample_rate=1.0, expected_batch_size=1.0, max_grad_norm=CLIP_NORM,
        noise_multiplier=noise_multiplier, steps=1, target_delta=1e-5,
    )  # fmt: skip
    source = SeededTestSource((seed, trials))

    def scores(present: bool) -> npt.NDArray[np.float64]:
        gradient = torch.full((1, 1), CANARY_NORM * CLIP_NORM * present)

        def losses(indices: object) -> Tensor:
            return gradient

        def once() -> float:
            step = PrivateGradient(plan, _MadeUp(gradient), 1, losses, source, charged=1)
            return float(step.step(["w"], "mixed")["w"])

        return np.array([once() for _ in range(trials)])

    delta = plan.target_delta
    bound = threshold_bound(scores(True), scores(False), delta=delta, confidence=CONFIDENCE)
    return bound, plan.epsilon()


class _MadeUp:
    def __init__(self, gradient: Tensor) -> None:
        self._gradient = gradient

    def clipped_sum(
        self, active: object, losses: object, num_records: int, max_grad_norm: float
    ) -> dict[str, Tensor]:
        return clip_and_sum({"w": self._gradient[:num_records]}, max_grad_norm)
