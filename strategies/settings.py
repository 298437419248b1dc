"""Settings of the strategies room: the ``strategy.*`` keys of the run config."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .wire_dtypes import WireDtype

Method = Literal[
    "dp-lora",
    "ffa-lora",
    "ro-lora",
    "la-lora",
    "as-lora",
    "fed-svd",
    "fedex-lora",
    "flora",
    "flex-lora",
]
# Their mean is one of products of factors, not of values that could be trimmed one by one.
PRODUCT_METHODS = ("fedex-lora", "flora", "flex-lora")


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class WireSettings(BaseModel):
    """How updates travel up (keys ``wire.*``)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, alias_generator=_kebab, populate_by_name=True
    )

    dtype: WireDtype = Field(
        default="float32",
        description="How clients write their updates: float32, bfloat16, float16, or int8 with "
        "stochastic rounding.  What travels down is float32.",
    )


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
    trim: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="Share of the clients whose values are dropped at either end, coordinate by "
        "coordinate (trimmed mean); 0: the ordinary mean.",
    )
    norm_bound: Literal["auto", "off"] = Field(
        default="auto",
        description="Refuse updates longer than signal plus noise of the public plan allow; auto: "
        "where privacy.mode is record.",
    )
    evaluate_every: int = Field(
        default=1,
        ge=1,
        description="Rounds from one evaluation on the server to the next, during which clients "
        "wait; the start and the last round are always evaluated.",
    )
    early_stopping_patience: int = Field(
        default=0,
        ge=0,
        description="Evaluations without better accuracy on public validation records after which "
        "the run ends; 0: never.  Needs data.validation-fraction.",
    )
    early_stopping_min_delta: float = Field(
        default=0.0, ge=0, description="Smallest gain in accuracy that counts as better."
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
    score: Literal["auto", "debiased", "pairwise", "client"] = Field(
        default="auto",
        description="as-lora: where scores come from; debiased needs sgd and clients that state "
        "their noise, auto takes it where it can and pairwise elsewhere; client: each client "
        "sends its own (sgd).",
    )
    ema: float = Field(
        default=0.9, ge=0, lt=1, description="as-lora: weight of the past in the moving averages."
    )
    exploration: float = Field(
        default=0.05, ge=0, le=0.5, description="as-lora: smallest probability of either factor."
    )

    def arguments(self) -> dict[str, Any]:
        """Arguments that every strategy takes, by their names."""
        names = (
            *("local_steps", "lr_a", "lr_b", "lr_head", "lr_decay", "optimizer", "weighting"),
            *("trim", "fraction_train", "min_train_nodes", "min_available_nodes", "node_timeout"),
        )
        low_pass = None if self.low_pass == "auto" else self.low_pass == "on"
        return {**{name: getattr(self, name) for name in names}, "low_pass": low_pass}

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
        if self.score in ("debiased", "client") and self.optimizer != "sgd":
            raise ValueError(
                f"strategy.score = {self.score!r} needs strategy.optimizer = 'sgd', got "
                f"{self.optimizer!r}; accepted with it are auto and pairwise"
            )
        if self.trim and self.method in PRODUCT_METHODS:
            raise ValueError(
                f"strategy.trim must be 0 for {self.method}, which averages products of factors, "
                f"got {self.trim:g}"
            )
        return self
