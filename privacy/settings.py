"""Settings of the privacy room: the ``privacy.*`` keys of the run config."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .client_settings import check_sum_settings

# Far from where float32 underflows: there a clipped gradient is rounded up to more than C.
SMALLEST_CLIP_NORM = 1e-6
LARGEST_CLIP_NORM = 1e6


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class PrivacySettings(BaseModel):
    """What privacy a run asks for (keys ``privacy.*``).

    These are wishes; the numbers that are finally used (noise multiplier, rate, normaliser)
    are fixed once, in a :class:`~privacy.plan.PrivacyPlan`, and nowhere else.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, alias_generator=_kebab, populate_by_name=True
    )

    mode: Literal["record", "client", "client-distributed", "record-distributed", "none"] = Field(
        default="record",
        description="Unit of protection. record: one record of one client, noised at the client; "
        "client: a whole client, noised by a server that is trusted; client-distributed: a whole "
        "client, noised by the clients under secure aggregation; record-distributed: one record, "
        "noised by all clients together under secure aggregation, one step a round; none: no "
        "privacy at all.",
    )
    target_epsilon: float = Field(
        default=8.0,
        gt=0,
        le=100,
        description="Epsilon of the whole run, all rounds together.",
    )
    target_delta: float = Field(
        default=1e-5, gt=0, lt=1, description="Delta of the whole run; below 1 / records."
    )
    max_grad_norm: float = Field(
        default=1.0,
        ge=SMALLEST_CLIP_NORM,
        le=LARGEST_CLIP_NORM,
        description="Clip norm C of one record's joint gradient over all active tensors.",
    )
    max_grad_norm_a: float = Field(
        default=0.0,
        ge=0,
        le=LARGEST_CLIP_NORM,
        description="C of A-only steps, 1e-06 or more; 0: max-grad-norm.",
    )
    max_grad_norm_b: float = Field(
        default=0.0,
        ge=0,
        le=LARGEST_CLIP_NORM,
        description="C of B-only steps, 1e-06 or more; 0: max-grad-norm.",
    )
    sample_rate: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Poisson rate q, the same at every client; 0: by expected-batch-size.",
    )
    expected_batch_size: int = Field(
        default=0,
        ge=0,
        description="Common expected batch b; each client's rate is min(1, b / records). "
        "The rate is stated to the server and tells the record count, which this declares public. "
        "0: by sample-rate.",
    )
    evaluation_noise_multiplier: float = Field(
        default=0.0,
        ge=0,
        le=1e5,
        description="Each round a client also tells how many of its records the received model "
        "classifies rightly, with Gaussian noise of this standard deviation on the count; "
        "target-epsilon pays for it, too. 0: no evaluation at the clients.",
    )
    engine: Literal["fused", "hooks", "opacus"] = Field(
        default="fused",
        description="How per-example gradients are computed. fused: each LoRA layer as one "
        "operation; hooks: PEFT's layers with hooks; opacus: Opacus's hooks (not for models that "
        "reshape the batch, such as Swin). All give the same clipped sums.",
    )
    max_physical_batch_size: int = Field(
        default=64,
        ge=0,
        description="Most records in the model at once: a larger Poisson batch is computed in "
        "parts, which changes neither sampling nor clipping nor noise. 0: no limit.",
    )
    insecure_test_seed: int = Field(
        default=-1,
        ge=-1,
        description="Tests only: 0 or more draws noise and batches from this seed, which voids "
        "the guarantee; -1: the operating system's secure generator.",
    )

    max_update_norm: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="client modes: clip norm S of a client's whole update, over all tensors that "
        "travel; it must be above 0 there and 0 elsewhere.",
    )
    registered_clients: int = Field(
        default=0,
        ge=0,
        description="client and distributed modes: public number of clients that may take part; "
        "with client-sample-rate it makes the constant by which sums of updates are divided.  "
        "0 elsewhere.",
    )
    client_sample_rate: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="client and distributed modes: probability with which the server asks each "
        "client in a round, independently (Poisson sampling, in place of "
        "strategy.fraction-train).  1 elsewhere.",
    )
    participation: Literal["public", "secret"] = Field(
        default="public",
        description="client: who takes part in a round is public (every client is accounted as in "
        "every round), or known to nobody but the server (amplification by sampling is credited).",
    )

    least_clients: int = Field(
        default=0,
        ge=0,
        description="distributed modes: fewest clients whose sum is ever unmasked; the noise is "
        "calibrated for so many shares.  0 elsewhere.",
    )
    colluding_clients: int = Field(
        default=0,
        ge=0,
        description="distributed modes: how many clients may tell the server their noise without "
        "harm to the others' guarantee; below least-clients.",
    )

    registered_records: int = Field(
        default=0,
        ge=0,
        description="record-distributed: public number of records of all clients together; with "
        "the rates it makes the constant by which sums of gradients are divided.  0 elsewhere.",
    )

    @model_validator(mode="after")
    def _keys_of_the_mode(self) -> Self:
        check_sum_settings(self)
        return self

    @model_validator(mode="after")
    def _clip_norms_are_normal_numbers(self) -> Self:
        for name in ("max_grad_norm_a", "max_grad_norm_b"):
            norm = getattr(self, name)
            if 0 < norm < SMALLEST_CLIP_NORM:
                raise ValueError(
                    f"privacy.{_kebab(name)}: got {norm}; accepted are 0 and "
                    f"{SMALLEST_CLIP_NORM:g} to {LARGEST_CLIP_NORM:g}"
                )
        return self

    @model_validator(mode="after")
    def _one_sampling_rule(self) -> Self:
        if (self.sample_rate > 0) == (self.expected_batch_size > 0):
            raise ValueError(
                "exactly one of privacy.sample-rate and privacy.expected-batch-size must be "
                f"above 0, got {self.sample_rate} and {self.expected_batch_size}"
            )
        return self
