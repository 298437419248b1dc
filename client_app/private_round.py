"""A round that the ledger has been charged for: private training, and the reply's content."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict

from federation.messages import COUNT_KEY, METRICS_KEY, NOISED_ACCURACY_KEY
from federation.settings import Settings
from privacy import (
    Charge,
    PrivacyPlan,
    PrivateGradient,
    RandomSource,
    SecureSource,
    SeededTestSource,
    noised_count,
)
from strategies import PRIVACY_KEY, SCORES_KEY, GradientEnergies, RoundPlan
from task.data import Records
from task.metrics import evaluate

from .client_level import outgoing_records, summed_gradients, unit_statement
from .local_training import step_kind, train_round
from .session import Session
from .site import who
from .trace import MessageTrace


@dataclasses.dataclass(frozen=True)
class PaidRound:
    """All that a round's private training depends on.

    Parameters
    ----------
    settings : Settings
        The run's.
    session : Session
        Model and engine.
    records : Records
        The client's own.
    public_records : int
        The figure that stands for their number.
    plan : RoundPlan
        What the steps train.
    privacy_plan : PrivacyPlan
        How they are privatised.
    charge : Charge
        The right to take them.
    source : RandomSource
        Noise and coins.
    """

    settings: Settings
    session: Session
    records: Records
    public_records: int
    plan: RoundPlan
    privacy_plan: PrivacyPlan
    charge: Charge
    source: RandomSource

    def train(
        self,
        message: Message,
        context: Context,
        adapter: Mapping[str, npt.NDArray[np.float32]],
        trace: MessageTrace,
    ) -> RecordDict:
        """Take the round's steps from ``adapter`` and make the reply's content.

        The process's model holds the received adapter again when this returns or raises: it may
        play another client next.
        """
        model = self.session.task_model
        received = {name: torch.from_numpy(value) for name, value in adapter.items()}
        model.load_adapter_state(received)
        correct = self._noised_correct() if self.privacy_plan.evaluations else None
        gradient = PrivateGradient(
            self.privacy_plan,
            self.session.engine,
            len(self.records),
            lambda indices: model.per_record_losses(self.records.batch(indices)),
            self.source,
            self.charge.steps,
            self.settings.privacy.max_physical_batch_size,
            self.public_records,
        )
        energies = (
            GradientEnergies(self.plan, self._noise_std) if self.plan.scores != "none" else None
        )
        in_shares = self.settings.privacy.mode == "record-distributed"
        train = summed_gradients if in_shares else train_round
        try:
            with own_random_state(self.settings, context, self.plan.server_round):
                update = train(self.plan, model.adapter, gradient, energies, trace)
        finally:
            model.load_adapter_state(received)
        metrics = MetricRecord()
        if self.settings.strategy.weighting == "public-counts":
            metrics[COUNT_KEY] = self.public_records
        if correct is not None:
            metrics[NOISED_ACCURACY_KEY] = correct / self.public_records
        rounding = np.random.default_rng((self.settings.seed, who(context), self.plan.server_round))
        values = {name: value.numpy() for name, value in update.items()}
        size = sum(value.numel() for value in received.values())
        leaving = outgoing_records(
            self.settings, message, context, self.plan, values, size, rounding
        )
        reply = RecordDict(
            {
                **leaving,
                METRICS_KEY: metrics,
                PRIVACY_KEY: unit_statement(self.settings) or self._statement(),
            }
        )
        if energies is not None:
            reply[SCORES_KEY] = MetricRecord(dict(energies.scores()))
        return reply

    def _noised_correct(self) -> float:
        """How many records the received model classifies rightly, as one noised release."""
        share = evaluate(self.session.task_model, self.records)["accuracy"]
        correct = round(share * len(self.records))
        return noised_count(correct, self.privacy_plan, self.source)

    @property
    def _noise_std(self) -> float:
        """Noise on each value of a mean gradient, sigma C / b."""
        kind = step_kind(self.plan.active(1, self.session.task_model.adapter))
        return self.privacy_plan.noise_std(kind) / self.privacy_plan.expected_batch_size

    def _statement(self) -> ConfigRecord:
        """What the client's privacy rests on: public numbers only.

        The noise on a mean gradient tells the record count by b; it is stated only where settings
        declare the count public.
        """
        plan = self.privacy_plan
        statement = ConfigRecord(
            {
                "sample-rate": plan.sample_rate,
                "noise-multiplier": plan.noise_multiplier,
                "target-delta": plan.target_delta,
                "steps": self.charge.charged,
                "secure-noise": self.source.secure,
            }
        )
        if self.settings.counts_are_public:
            statement["noise-std"] = self._noise_std
        return statement


def random_source(settings: Settings, context: Context, server_round: int) -> RandomSource:
    """Where noise and coins come from: the operating system, but for tests."""
    seed = settings.privacy.insecure_test_seed
    if seed < 0:
        return SecureSource()
    return SeededTestSource((seed, who(context), server_round))


@contextlib.contextmanager
def own_random_state(settings: Settings, context: Context, server_round: int) -> Iterator[None]:
    """Seed torch for adapter dropout, for this round only.

    Without it an update would depend on which other clients this process played before.  The
    seed is secret: a record's mask depends on its place in the batch, so with known masks one
    record's absence would change the gradients of all that follow it.
    """
    words = random_source(settings, context, server_round).words(1)
    with torch.random.fork_rng():
        torch.manual_seed(int(words[0] >> np.uint64(1)))
        yield
