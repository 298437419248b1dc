"""The run config as one checked object, put together from the rooms' own settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from privacy.asked_for import AskedFor
from privacy.settings import PrivacySettings
from strategies.settings import StrategySettings, WireSettings
from task.settings import DataSettings, LoRASettings, ModelSettings

from .client_rules import check_sum_mode

Value = str | int | float | bool

_IMAGE_DATA = ("embedded", "npz", "image-folder")


class SettingsError(ValueError):
    """The run config cannot be used; the text names every key at fault, one a line."""


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class Settings(BaseModel):
    """All settings of a run; frozen, checked before anything is loaded.

    Each room owns the model of its own part (``strategy.*``, ``privacy.*``, ``model.*``,
    ``lora.*``, ``data.*``); this class adds the few keys that belong to the run as a whole and
    refuses contradictions between rooms.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, alias_generator=_kebab, populate_by_name=True
    )

    seed: int = Field(
        default=0,
        ge=0,
        lt=2**31,
        description="Public seed of everything but the privacy noise and the Poisson batches.",
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda:(0|[1-9][0-9]*))$",
        description="Where models run: auto, cpu or cuda:N; a site's node config overrides it.",
    )
    output_dir: str = Field(
        default="",
        description="Folder on the server that gets one folder per run; empty: "
        "$FLOWER_DP_LORA_RUNS, else ~/flower-dp-lora/runs.",
    )
    resume: str = Field(
        default="",
        description="Run folder (or its checkpoint.npz) of a run that was cut off, to go on from; "
        "the settings must be those of that run.",
    )
    strategy: StrategySettings = Field(default_factory=StrategySettings)
    wire: WireSettings = Field(default_factory=WireSettings)
    privacy: PrivacySettings = Field(default_factory=lambda: PrivacySettings(sample_rate=0.2))
    model: ModelSettings = Field(default_factory=ModelSettings)
    lora: LoRASettings = Field(default_factory=LoRASettings)
    data: DataSettings = Field(default_factory=DataSettings)

    @model_validator(mode="after")
    def _rooms_agree(self) -> Self:
        if self.model.source == "transformers" and self.data.source in _IMAGE_DATA:
            raise ValueError(
                f"model.source = 'transformers' classifies text, data.source = "
                f"{self.data.source!r} holds images; accepted: a text source (csv, tsv, jsonl, "
                "parquet, hub), or model.source = 'embedded' or 'timm'"
            )
        both = ("dp-lora", "fedex-lora", "flora", "flex-lora")
        if self.strategy.method in both and (
            self.privacy.max_grad_norm_a or self.privacy.max_grad_norm_b
        ):
            raise ValueError(
                "privacy.max-grad-norm-a and -b belong to steps that train one factor; "
                f"strategy.method = {self.strategy.method!r} trains both at once: accepted is 0"
            )
        if self.strategy.score == "client" and not self.counts_are_public:
            raise ValueError(
                "strategy.score = 'client' tells the noise on a client's updates, and so its "
                "record count: accepted with strategy.weighting = 'public-counts' or "
                "privacy.expected-batch-size"
            )
        if self.lora.client_ranks and self.strategy.method != "flex-lora":
            raise ValueError(
                "lora.client-ranks belongs to strategy.method = 'flex-lora', got "
                f"{self.strategy.method!r}: accepted with it is an empty text"
            )
        if self.privacy.engine == "opacus" and self.model.gradient_checkpointing:
            raise ValueError(
                "privacy.engine = 'opacus' cannot follow model.gradient-checkpointing = true; "
                "accepted with it: 'fused' or 'hooks'"
            )
        if self.strategy.early_stopping_patience and not self.data.validation_fraction:
            raise ValueError(
                "strategy.early-stopping-patience needs public records that the result is not "
                "reported on: data.validation-fraction is 0, accepted is more than 0"
            )
        return self

    @model_validator(mode="after")
    def _only_sums(self) -> Self:
        check_sum_mode(self)
        return self

    @property
    def total_steps(self) -> int:
        """Most private steps of a client: rounds x local steps."""
        return self.strategy.num_rounds * self.strategy.local_steps

    @property
    def counts_are_public(self) -> bool:
        """Whether the settings declare the clients' record counts public."""
        return self.strategy.weighting == "public-counts" or self.privacy.expected_batch_size > 0

    @property
    def task(self) -> str:
        """What is learned, as a site's policy names it."""
        kind = "text" if self.model.source == "transformers" else "image"
        return f"{kind}-classification"

    @property
    def asked_for(self) -> AskedFor:
        """What a site's policy is asked to allow."""
        tells = ""
        if self.strategy.weighting == "public-counts":
            tells = "strategy.weighting = 'public-counts'"
        elif self.privacy.expected_batch_size:
            tells = f"privacy.expected-batch-size = {self.privacy.expected_batch_size}"
        return AskedFor(
            task=self.task,
            columns=self.data.columns_read(self.model.source == "transformers"),
            mode=self.privacy.mode,
            seeded_noise=self.privacy.insecure_test_seed >= 0,
            target_epsilon=self.privacy.target_epsilon,
            target_delta=self.privacy.target_delta,
            tells_count=tells,
        )

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Value]) -> Self:
        """Check Flower's flat run config (dotted kebab-case keys).

        Raises
        ------
        SettingsError
            Naming each key at fault, what it got and what it takes.
        """
        nested: dict[str, Any] = {}
        for key, value in run_config.items():
            group, dot, rest = key.partition(".")
            rooms = nested.setdefault(group, {}) if dot else nested
            if not isinstance(rooms, dict) or isinstance(rooms.get(key), dict):
                raise SettingsError(f"{group}: given both as a value and as a group of settings")
            rooms[rest if dot else key] = value
        try:
            return cls.model_validate(nested)
        except ValidationError as error:
            raise SettingsError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    lines = ["the run config is not usable:"]
    for detail in error.errors(include_url=False):
        key = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            lines.append(f"  {key}: no such setting; known are {', '.join(_siblings(detail))}")
        elif detail["type"] == "value_error":  # our validators name keys and values themselves
            lines.append(f"  {detail['ctx']['error']}")
        else:
            lines.append(f"  {key}: got {detail['input']!r}; {detail['msg']}")
    return "\n".join(lines)


def _siblings(detail: Any) -> list[str]:
    owner: Any = Settings
    for part in detail["loc"][:-1]:  # at most one: the room
        owner = Settings.model_fields[str(part)].annotation
    return sorted(_kebab(name) for name in owner.model_fields)
