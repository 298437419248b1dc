"""Broken clients: each control patches the production code and names who must notice.

A control changes what the client does, never what a detector looks at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
from flwr.app import MetricRecord
from torch import Tensor

from client_app import client_level, private_round
from privacy import (
    Charge,
    DatasetRules,
    Ledger,
    PoissonSampler,
    PrivacyPlan,
    Request,
    SecureSource,
    hook_engine,
    mechanism,
    sampling,
)
from strategies import GradientEnergies, RoundPlan, kind_of
from task.model import TaskModel

Breaks = Callable[[], contextlib.AbstractContextManager[object]]


@dataclasses.dataclass(frozen=True)
class Control:
    """A fault.

    Parameters
    ----------
    name : str
        What the broken client does.
    detector : str
        Key of the check that must fail.
    broken : callable
        Gives a context manager, inside which the production code has the fault.
    """

    name: str
    detector: str
    broken: Breaks


def _noise_times(factor: float) -> Breaks:
    def broken() -> contextlib.AbstractContextManager[object]:
        draw = vars(mechanism)["standard_normal"]
        return mock.patch.object(mechanism, "standard_normal", lambda *a: factor * draw(*a))

    return broken


def _half_the_noise() -> contextlib.AbstractContextManager[object]:
    stated = PrivacyPlan.noise_std
    return mock.patch.object(PrivacyPlan, "noise_std", lambda plan, kind: stated(plan, kind) / 2)


def _head_without_noise() -> contextlib.AbstractContextManager[object]:
    privatize = mechanism.privatize

    def broken(sums: Mapping[str, Tensor], plan: PrivacyPlan, *others: Any) -> dict[str, Tensor]:
        heads = {n: v / plan.expected_batch_size for n, v in sums.items() if kind_of(n) == "head"}
        return {**privatize(sums, plan, *others), **heads}

    return mock.patch.object(mechanism, "privatize", broken)


def _clipping(
    instead: Callable[[Callable[..., dict[str, Tensor]], Mapping[str, Any], float], Any],
) -> Breaks:
    def broken() -> contextlib.AbstractContextManager[object]:
        clip_and_sum = vars(hook_engine)["clip_and_sum"]
        return mock.patch.object(
            hook_engine, "clip_and_sum", lambda g, norm: instead(clip_and_sum, g, norm)
        )

    return broken


def _clip_the_mean(
    clip_and_sum: Callable[..., dict[str, Tensor]], gradients: Mapping[str, Any], norm: float
) -> dict[str, Tensor]:
    total = clip_and_sum(gradients, math.inf)
    records = len(next(iter(gradients.values())).rows())
    length = math.sqrt(sum(float(value.square().sum()) for value in total.values())) / records
    return {n: value * min(1.0, norm / length if length else 1.0) for n, value in total.items()}


@contextlib.contextmanager
def _divide_by_the_drawn_batch() -> Iterator[None]:
    draw, privatize, drawn = PoissonSampler.draw, mechanism.privatize, [0]

    def noted(sampler: PoissonSampler) -> npt.NDArray[np.int64]:
        batch = draw(sampler)
        drawn[0] = len(batch)
        return batch

    def broken(sums: Mapping[str, Tensor], plan: PrivacyPlan, *others: Any) -> dict[str, Tensor]:
        factor = plan.expected_batch_size / max(1, drawn[0])
        return {n: value * factor for n, value in privatize(sums, plan, *others).items()}

    with (
        mock.patch.object(PoissonSampler, "draw", noted),
        mock.patch.object(mechanism, "privatize", broken),
    ):
        yield


def _sample_more_often() -> contextlib.AbstractContextManager[object]:
    coins = vars(sampling)["coins"]
    return mock.patch.object(
        sampling, "coins", lambda source, count, rate: coins(source, count, min(1.0, 1.5 * rate))
    )


def _skip_empty_batches() -> contextlib.AbstractContextManager[object]:
    draw = PoissonSampler.draw

    def broken(sampler: PoissonSampler) -> npt.NDArray[np.int64]:
        batch = draw(sampler)
        while not len(batch):
            batch = draw(sampler)
        return batch

    return mock.patch.object(PoissonSampler, "draw", broken)


def _batches_of_one_size() -> contextlib.AbstractContextManager[object]:
    rng = np.random.default_rng(0)

    def broken(sampler: PoissonSampler) -> npt.NDArray[np.int64]:
        size = max(1, round(sampler._rate * sampler._num_records))
        return np.sort(rng.permutation(sampler._num_records)[:size]).astype(np.int64)

    return mock.patch.object(PoissonSampler, "draw", broken)


@contextlib.contextmanager
def _loss_in_the_reply() -> Iterator[None]:
    per_record_losses = TaskModel.per_record_losses
    update_records = vars(client_level)["update_records"]
    last = [0.0]

    def noted(model: TaskModel, *others: Any, **named: Any) -> Tensor:
        losses = per_record_losses(model, *others, **named)
        last[0] = float(losses.detach().mean())
        return losses

    def broken(*arguments: Any) -> dict[str, Any]:
        return {**update_records(*arguments), "report": MetricRecord({"train-loss": last[0]})}

    with (
        mock.patch.object(TaskModel, "per_record_losses", noted),
        mock.patch.object(client_level, "update_records", broken),
    ):
        yield


@contextlib.contextmanager
def _scores_from_raw_gradients() -> Iterator[None]:
    add, privatize = GradientEnergies.add, mechanism.privatize
    raw: dict[str, npt.NDArray[np.float32]] = {}

    def noted(sums: Mapping[str, Tensor], plan: PrivacyPlan, *others: Any) -> dict[str, Tensor]:
        raw.update({n: (v.detach() / plan.expected_batch_size).numpy() for n, v in sums.items()})
        return privatize(sums, plan, *others)

    def broken(energies: GradientEnergies, step: int, gradients: Mapping[str, Any]) -> None:
        add(energies, step, {name: raw[name] for name in gradients})

    with (
        mock.patch.object(mechanism, "privatize", noted),
        mock.patch.object(GradientEnergies, "add", broken),
    ):
        yield


def _noise_from_a_known_seed() -> contextlib.AbstractContextManager[object]:
    def broken(source: SecureSource, count: int) -> npt.NDArray[np.uint64]:
        generator = source.__dict__.setdefault("generator", np.random.default_rng(0))
        words: npt.NDArray[np.uint64] = generator.integers(0, 2**64, size=count, dtype=np.uint64)
        return words

    return mock.patch.object(SecureSource, "words", broken)


@contextlib.contextmanager
def _more_steps_than_charged() -> Iterator[None]:
    train_round = vars(private_round)["train_round"]
    begin = mechanism.PrivateGradient.__init__

    def broken(plan: RoundPlan, *others: Any, **named: Any) -> dict[str, Tensor]:
        longer = dataclasses.replace(plan, local_steps=plan.local_steps + 2)
        update: dict[str, Tensor] = train_round(longer, *others, **named)
        return update

    def unguarded(step: mechanism.PrivateGradient, *others: Any, **named: Any) -> None:
        begin(step, *others, **named)
        step._charged += 2  # else the step itself refuses

    with (
        mock.patch.object(private_round, "train_round", broken),
        mock.patch.object(mechanism.PrivateGradient, "__init__", unguarded),
    ):
        yield


def _nothing_charged() -> contextlib.AbstractContextManager[object]:
    def broken(ledger: Ledger, request: Request, limits: object) -> Charge:
        return Charge(1, request.key, request.steps, request.steps * request.server_round)

    return mock.patch.object(Ledger, "charge", broken)


def _divide_by_the_private_count() -> contextlib.AbstractContextManager[object]:
    def broken(rules: DatasetRules, records: int) -> int:
        return records

    return mock.patch.object(DatasetRules, "counts", broken)


CONTROLS: Sequence[Control] = (
    Control("no noise", "canaries", _noise_times(0.0)),
    Control("a quarter of the noise", "canaries, Gaussian", _noise_times(0.25)),
    Control("half the noise", "noise", _half_the_noise),
    Control("the head is not noised", "noise", _head_without_noise),
    Control("no clipping", "canaries", _clipping(lambda clip, g, norm: clip(g, math.inf))),
    Control("the batch mean is clipped", "sensitivity", _clipping(_clip_the_mean)),
    Control(
        "each tensor is clipped alone",
        "sensitivity",
        _clipping(lambda clip, g, norm: {n: clip({n: v}, norm)[n] for n, v in g.items()}),
    ),
    Control("divided by the drawn batch", "normaliser", _divide_by_the_drawn_batch),
    Control("divided by the private record count", "record count", _divide_by_the_private_count),
    Control("sampled 1.5 times as often as accounted", "sampling", _sample_more_often),
    Control("empty batches are drawn again", "sampling", _skip_empty_batches),
    Control("shuffled batches of one size", "sampling", _batches_of_one_size),
    Control("the loss in the reply", "reply", _loss_in_the_reply),
    Control("scores from raw gradients", "scores", _scores_from_raw_gradients),
    Control("noise from a known seed", "fresh noise", _noise_from_a_known_seed),
    Control("more steps than were charged", "steps", _more_steps_than_charged),
    Control("nothing is written into the ledger", "steps", _nothing_charged),
)
