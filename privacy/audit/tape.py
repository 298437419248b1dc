"""What an auditor sees of a client's steps, and where it puts canary gradients in.

Everything else in a step is the production code: sampler, model, clipping, sum, noise,
normaliser, optimizer.  Used by tests and by ``python -m benchmarks.audit``, never in training.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Protocol
from unittest import mock

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .. import mechanism
from ..hook_engine import HookEngine
from ..record_gradients import Rows
from ..record_pass import RecordPass
from ..virtual_batches import ClippingEngine, Losses

Indices = npt.NDArray[np.int64]


class Injector(Protocol):
    """Chooses what the per-record gradients of some records become."""

    def replace(self, name: str, records: Indices, rows: Tensor) -> Tensor:
        """Return the rows (n, *shape) of one tensor for these records, changed or not."""
        ...


class Silence:
    """Makes every record's gradient zero: what a step then releases is its noise."""

    def replace(self, name: str, records: Indices, rows: Tensor) -> Tensor:
        """Zeros."""
        return rows.new_zeros(rows.shape)


@dataclasses.dataclass
class Tape:
    """A record of each private step, in their order.

    Attributes
    ----------
    batches : list of numpy.ndarray
        Records that entered the clipped sum of each step, as indices; int64 (n,).
    sums : list of dict of str to Tensor
        Clipped sums before noise, float32.  Private: for the auditor's eyes.
    """

    batches: list[Indices] = dataclasses.field(default_factory=list)
    sums: list[dict[str, Tensor]] = dataclasses.field(default_factory=list)
    _part: Indices | None = None


@contextlib.contextmanager
def recorded(injector: Injector | None = None) -> Iterator[Tape]:
    """Record the private steps in this process, and put an injector's gradients into them.

    Two production names are wrapped, each calling the original: ``clipped_sum_in_parts`` as the
    mechanism knows it, to see which records a step uses and what it adds up; and
    ``HookEngine._run`` (which the fused engine inherits), whose per-record gradients the injector
    may replace BEFORE they are clipped.  The engine's self-check is left alone: it runs on
    made-up records, outside a step.

    Parameters
    ----------
    injector : Injector, optional
        Changes per-record gradients; not given: none is changed.

    Yields
    ------
    Tape
        Filled while the block runs.

    Raises
    ------
    TypeError
        In a step, if there is an injector and the engine is not one that it can reach.
    """
    tape = Tape()
    sum_in_parts, run = vars(mechanism)["clipped_sum_in_parts"], HookEngine._run

    def taped_sum(
        engine: ClippingEngine,
        active: Sequence[str],
        losses: Losses,
        indices: Indices,
        max_grad_norm: float,
        max_physical_batch_size: int,
    ) -> dict[str, Tensor]:
        if injector is not None and not isinstance(engine, HookEngine):
            raise TypeError(
                f"gradients can be put into the fused and the hook engine, not into a "
                f"{type(engine).__name__}: an audit of it would find nothing"
            )
        entered: list[Indices] = []

        def noted(part: Indices) -> Tensor:
            tape._part = np.asarray(part, dtype=np.int64)
            entered.append(tape._part)
            return losses(part)

        sums: dict[str, Tensor] = sum_in_parts(
            engine, active, noted, indices, max_grad_norm, max_physical_batch_size
        )
        tape.batches.append(np.concatenate([np.empty(0, dtype=np.int64), *entered]))
        tape.sums.append({name: value.detach().clone() for name, value in sums.items()})
        return sums

    def injected_run(
        self: HookEngine, active: Collection[str], losses: Callable[[], Tensor], num_records: int
    ) -> RecordPass:
        tape._part = None
        record_pass = run(self, active, losses, num_records)
        if injector is not None and tape._part is not None:
            for name, gradient in record_pass.gradients.items():
                rows = injector.replace(name, tape._part, gradient.rows())
                record_pass.gradients[name] = Rows(rows)
        return record_pass

    with (
        mock.patch.object(mechanism, "clipped_sum_in_parts", taped_sum),
        mock.patch.object(HookEngine, "_run", injected_run),
    ):
        yield tape
