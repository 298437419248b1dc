"""AS-LoRA: the server chooses each layer's active factor, round by round."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from logging import INFO, WARNING
from typing import Any, Literal, Self

from flwr.app import ArrayRecord, Message
from flwr.common import log

from .base import LoRAStrategy, Update
from .client_level import energies_of
from .client_scores import ClientScores
from .round_plan import Mode, RoundPlan
from .score_report import describe_round
from .scores import ScoreSource, UpdateEnergies
from .selection import FactorChoice, Granularity, group_of
from .settings import StrategySettings, WireSettings
from .tensor_names import kind_of, layer_of
from .trimmed_mean import TrimmedMean
from .trust import largest_scores, stated_noise


class ASLoRA(LoRAStrategy):
    """AS-LoRA (arXiv 2605.05769): per layer and per round either A or B, chosen by scores.

    After ``max(2, 0.1 T)`` warm-up rounds (B, A, B, ...) each group of layers draws its factor
    by the moving averages of both factors' scores.  Within a round the other factor is the same
    at every client, so the mean is exact, and about half of the tensors travel.

    The scores come from what clients have noised and sent (:mod:`~strategies.scores`), never
    from losses or raw gradients as in the paper's public code, so they cost no privacy.

    Parameters
    ----------
    num_rounds : int (default: 10)
        Rounds T, which set the warm-up.
    granularity : {"block", "module"} (default: "block")
        What shares one choice: a transformer block, or a single adapted module.
    score : {"auto", "debiased", "pairwise", "client"} (default: "auto")
        ``debiased`` needs plain SGD and clients that state their noise; ``auto`` takes it
        where that holds, and ``pairwise`` elsewhere.  ``client``: the paper's form, one number
        per group that each client makes of its own noised gradients and sends.
        Under client-level privacy all scores come from the noised mean alone (``auto`` or
        ``debiased``).
    ema, exploration : float
        See :class:`~strategies.selection.FactorChoice`.
    **others
        As for :class:`~strategies.base.LoRAStrategy`.

    Attributes
    ----------
    last_scores : dict of str to float
        Scores of the latest round's active factors, by group.
    """

    name = "as-lora"
    rule = "A or B by layer and round, by scores of the updates; B first"

    def __init__(
        self,
        *,
        num_rounds: int = 10,
        granularity: Granularity = "block",
        score: Literal["auto", "debiased", "pairwise", "client"] = "auto",
        ema: float = 0.9,
        exploration: float = 0.05,
        **others: Any,
    ) -> None:
        self.warm_up = max(2, round(0.1 * num_rounds))
        self.granularity = granularity
        self.score = score
        self.ema = ema
        self.exploration = exploration
        self.last_scores: dict[str, float] = {}
        self._choice: FactorChoice | None = None
        self._energies: UpdateEnergies | None = None
        self._stated: ClientScores | None = None
        super().__init__(**others)
        if score in ("debiased", "client") and self.optimizer != "sgd":
            raise ValueError(
                f"score {score!r} needs optimizer 'sgd', got {self.optimizer!r}: an adaptive step "
                "has no known noise; take 'pairwise'"
            )

    @classmethod
    def from_settings(
        cls, settings: StrategySettings, wire: WireSettings | None = None, **others: Any
    ) -> Self:
        """Make the strategy that the settings ask for."""
        return super().from_settings(
            settings,
            wire,
            num_rounds=settings.num_rounds,
            granularity=settings.granularity,
            score=settings.score,
            ema=settings.ema,
            exploration=settings.exploration,
            **others,
        )

    @property
    def choice(self) -> FactorChoice | None:
        """Scores so far and the draw that follows; ``None`` before the adapter is known."""
        if self._choice is None and self._adapter:
            factors = [name for name in self._adapter if kind_of(name) != "head"]
            self._choice = FactorChoice(
                list(dict.fromkeys(group_of(name, self.granularity) for name in factors)),
                warm_up=self.warm_up,
                ema=self.ema,
                exploration=self.exploration,
                seed=self.seed,
            )
        return self._choice

    def mode(self, server_round: int) -> Mode:
        """The tied factor of a warm-up round; later B, from which the plan lists exceptions."""
        return "A" if server_round <= self.warm_up and server_round % 2 == 0 else "B"

    def plan(self, server_round: int) -> RoundPlan:
        """Instructions of a round, with the layers whose choice differs from :meth:`mode`."""
        plan = super().plan(server_round)
        if self.score == "client":
            plan = dataclasses.replace(plan, scores=self.granularity)
        if self.choice is None:
            return plan
        chosen = self.choice.choose(server_round)
        modes: dict[str, Mode] = {
            layer_of(name): chosen[group_of(name, self.granularity)]
            for name in self._adapter
            if kind_of(name) in ("A", "B")
        }
        return dataclasses.replace(
            plan, layer_modes={layer: m for layer, m in modes.items() if m != plan.mode}
        )

    def _begin(self, plan: RoundPlan) -> None:
        active = [name for name in plan.uploaded(self._adapter) if kind_of(name) != "head"]
        self._active = {name: group_of(name, self.granularity) for name in active}
        self._round = plan
        self._energies = energies_of(self._active, self.client_level)
        self._stated = ClientScores(self._energies.groups) if self.score == "client" else None

    def _fold(self, update: Update, weight: float, reply: Message, rank: int) -> None:
        if self._stated is not None:
            largest = largest_scores(update, self._active, self._round)
            self._stated.add(reply, weight, largest)  # first: it may refuse the reply
        super()._fold(update, weight, reply, rank)
        if self._energies is not None and self.client_level is None:
            noise = stated_noise(reply, update, self._active, self._round)
            self._energies.add(update, weight, noise)

    def _apply_if_finite(self, plan: RoundPlan) -> bool:
        if not super()._apply_if_finite(plan):
            return False
        self._learn(plan)
        return True

    def _learn(self, plan: RoundPlan) -> None:
        if self._energies is None or self.choice is None:
            return
        # Scores need the ordinary mean: its noise is known, and pairs add up in it.
        mean = self._mean.plain if isinstance(self._mean, TrimmedMean) else self._mean
        source, changes = self._source(self._energies), mean.mean()
        lr = {name: plan.learning_rate(name) for name in changes}
        if self._stated is not None:
            scores = self._stated.mean()
        elif source == "debiased":
            scores = self._energies.debiased(changes, lr, plan.local_steps, low_pass=plan.low_pass)
        else:
            scores = self._energies.pairwise(changes, lr, plan.local_steps)
        chosen = self.choice.choose(plan.server_round)
        for group, score in scores.items():
            # What a round gains is the score times its learning rate; only the ratio matters.
            rate = self.lr_a if chosen[group] == "A" else self.lr_b
            self.choice.observe(group, chosen[group], rate * score)
        self.last_scores = scores
        if scores:
            floors = None
            if self._energies.noise_is_known:
                floors = self._energies.noise_floors(
                    changes, plan.local_steps, low_pass=plan.low_pass
                )
            log(INFO, "%s", describe_round(plan.server_round, chosen, source, scores, floors))

    def state_dict(self) -> dict[str, Any]:
        """Scores so far, besides what every strategy keeps."""
        choice = self.choice
        return {**super().state_dict(), "choice": choice.state_dict() if choice else None}

    def load_state_dict(self, state: Mapping[str, Any], arrays: ArrayRecord) -> None:
        """Go on from :meth:`state_dict`."""
        super().load_state_dict(state, arrays)
        if self.choice is not None and state["choice"] is not None:
            self.choice.load_state_dict(state["choice"])

    def _source(self, energies: UpdateEnergies) -> ScoreSource:
        if self.score == "client":
            return "client"
        if self.client_level is None and (self.score == "pairwise" or self.optimizer != "sgd"):
            return "pairwise"
        if energies.noise_is_known:
            return "debiased"
        if self.score == "debiased":
            log(WARNING, "A client did not state its noise: this round's scores are pairwise")
        return "pairwise"
