"""Settings of the backbone, its head and its adapters: ``model.*`` and ``lora.*``."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from .base import COMMIT, Settings, is_local, refusal, split_list


class ModelSettings(Settings):
    """Which pretrained backbone is used, and its head (keys ``model.*``)."""

    source: Literal["embedded", "timm", "transformers"] = Field(
        default="embedded",
        description="Where the backbone comes from: embedded (a small image model that the project "
        "pretrains itself on public data), timm (images) or transformers (text).",
    )
    name: str = Field(
        default="",
        description="Name on the hub, or a local folder (starts with '/', './', '../' or '~') "
        "with config.json and safetensors weights. Empty for embedded.",
    )
    revision: str = Field(
        default="",
        description="Commit of the hub repository, 40 hexadecimal digits: required for a hub name, "
        "empty for a local folder and for embedded.",
    )
    head: Literal["train", "frozen"] = Field(
        default="train",
        description="train: the new classification head is trained and shared like the adapters; "
        "frozen: it keeps its seeded random start.",
    )
    image_size: int = Field(
        default=0,
        ge=0,
        le=4096,
        description="Side of the square input image in pixels; 0: the backbone's own. Image "
        "models only.",
    )
    max_length: int = Field(
        default=128,
        ge=2,
        le=131072,
        description="Longest text in tokens, special tokens included; longer texts are cut. Text "
        "models only.",
    )

    gradient_checkpointing: bool = Field(
        default=False,
        description="Compute each block's activations again in the backward pass instead of "
        "keeping them: a third more time, a fraction of the memory.",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="bfloat16: training runs under autocast, for GPUs with tensor cores. Clipping "
        "and noise are float32 in any case, and so is the server's evaluation.",
    )

    @model_validator(mode="after")
    def _name_fits_source(self) -> Self:
        if self.source == "embedded":
            self.must_be_unset("model", ("name", "revision"), "model.source is 'embedded'")
        elif not self.name.strip():
            raise refusal("model.name", self.name, "a name on the hub or a local folder")
        elif is_local(self.name):
            self.must_be_unset("model", ("revision",), "model.name is a local folder")
        elif not COMMIT.fullmatch(self.revision):
            raise refusal(
                "model.revision",
                self.revision,
                "the commit of the hub repository, 40 hexadecimal digits in lower case (a branch "
                "or a tag can move; a local folder starts with '/', './', '../' or '~')",
            )
        if self.source == "transformers":
            self.must_be_unset("model", ("image_size",), "model.source is 'transformers' (text)")
        return self


class LoRASettings(Settings):
    """The low-rank adapters, in PEFT's words (keys ``lora.*``)."""

    r: int = Field(default=8, ge=1, le=1024, description="Rank of the adapters.")
    lora_alpha: int = Field(
        default=8,
        ge=1,
        le=65536,
        description="Scaling numerator: an adapter adds (lora-alpha / r) * B * A to its weight.",
    )
    client_ranks: str = Field(
        default="",
        description="flex-lora: ranks of simulated clients, comma-separated, given to partitions "
        "in turn; none above lora.r. Empty: all have lora.r. A site sets lora-r in its node "
        "config.",
    )
    lora_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout in front of A, as a probability in [0, 1)."
    )
    target_modules: str = Field(
        default="auto",
        description="auto: the attention projections usual for the family (ViT and Swin attn.qkv, "
        "attn.proj; BERT and RoBERTa query, value; DistilBERT q_lin, v_lin; Llama-like q_proj, "
        "v_proj); otherwise name endings of linear layers, comma-separated.",
    )

    @property
    def ranks_by_client(self) -> tuple[int, ...]:
        """:attr:`client_ranks` as numbers."""
        return tuple(int(item) for item in split_list(self.client_ranks))

    @model_validator(mode="after")
    def _ranks_are_ranks(self) -> Self:
        for item in split_list(self.client_ranks):
            if not item.isdecimal() or not 1 <= int(item) <= self.r:
                raise refusal(
                    "lora.client-ranks",
                    self.client_ranks,
                    f"whole numbers from 1 to lora.r = {self.r}, comma-separated",
                )
        return self

    @model_validator(mode="after")
    def _some_target(self) -> Self:
        if not split_list(self.target_modules):
            raise refusal(
                "lora.target-modules", self.target_modules, "auto, or comma-separated name endings"
            )
        return self
