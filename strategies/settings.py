"""Settings of the strategies room: the ``strategy.*`` keys of the run config."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Method = Literal["dp-lora", "ffa-lora", "ro-lora", "la-lora", "as-lora"]


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class StrategySettings(BaseModel):
    """Which method trains, for how long and with which nodes (keys ``strategy.*``)."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=_kebab,
        populate_by_name=True,
        allow_inf_nan=False,
    )

    method: Method = Field(default="la-lora", description="Rule that chooses the active factors.")
    num_rounds: int = Field(default=10, ge=1, description="Rounds of federated training, T.")
    local_steps: int = Field(default=6, ge=1, description="Private steps per round, E.")
    fraction_train: float = Field(
        default=1.0, gt=0, le=1, description="Share of the available nodes in a round."
    )
    min_train_nodes: int = Field(
        default=2, ge=1, description="Fewest nodes asked, and fewest valid replies applied."
    )
    min_available_nodes: int = Field(
        default=2, ge=1, description="Nodes waited for before a round."
    )
    node_timeout: float = Field(
        default=300.0, gt=0, description="Seconds to wait for min-available-nodes, then give up."
    )
    round_timeout: float = Field(
        default=3600.0, gt=0, description="Seconds to wait for a round's replies."
    )
    weighting: Literal["uniform", "public-counts"] = Field(
        default="public-counts",
        description="Mean over clients: equal weights, or by record counts declared public.",
    )
    optimizer: Literal["sgd", "adamw"] = Field(default="sgd", description="Local optimizer.")
    lr_a: float = Field(default=0.5, gt=0, description="Learning rate of A factors.")
    lr_b: float = Field(default=0.5, gt=0, description="Learning rate of B factors.")
    lr_head: float = Field(default=0.5, gt=0, description="Learning rate of the head.")
    lr_decay: float = Field(
        default=0.99, gt=0, le=1, description="Factor on all learning rates after each round."
    )
    low_pass: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="LA-LoRA's low-pass filter on noised factor gradients; auto: la-lora only.",
    )

    granularity: Literal["block", "module"] = Field(
        default="block",
        description="as-lora: what shares one choice, a transformer block or a single module.",
    )
    score: Literal["auto", "debiased", "pairwise"] = Field(
        default="auto",
        description="as-lora: where scores come from; debiased needs sgd and clients that state "
        "their noise, auto takes it where it can and pairwise elsewhere.",
    )
    ema: float = Field(
        default=0.9, ge=0, lt=1, description="as-lora: weight of the past in the moving averages."
    )
    exploration: float = Field(
        default=0.05, ge=0, le=0.5, description="as-lora: smallest probability of either factor."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.method == "la-lora" and self.local_steps % 2:
            raise ValueError(
                "strategy.local-steps must be even for la-lora, which alternates B and A, got "
                f"{self.local_steps}"
            )
        if self.method == "ro-lora" and self.num_rounds < 2:
            raise ValueError(
                "strategy.num-rounds must be at least 2 for ro-lora, which trains A in even "
                f"rounds, got {self.num_rounds}"
            )
        if self.method == "as-lora" and self.num_rounds < 2:
            raise ValueError(
                "strategy.num-rounds must be at least 2 for as-lora, whose second round trains A, "
                f"got {self.num_rounds}"
            )
        if self.score == "debiased" and self.optimizer != "sgd":
            raise ValueError(
                "strategy.score = 'debiased' needs strategy.optimizer = 'sgd', got "
                f"{self.optimizer!r}; accepted with it are auto and pairwise"
            )
        return self
