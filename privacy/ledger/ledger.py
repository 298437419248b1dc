"""A site's ledger: what was ever released on its data sets, charged before it is released."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Self

from ..plan import PrivacyPlan
from ..privacy_filter import BudgetLimit
from . import overlap
from .book import Book, PlanAccount
from .errors import BudgetExhausted, DataChanged, LedgerError, PlanChanged
from .releases import Releases
from .store import Store, Transaction

_MOST_STAMPS = 64


@dataclasses.dataclass(frozen=True)
class Charge:
    """A right to take so many private steps, once: already paid for.

    Parameters
    ----------
    plan : int
        Entry of the plan that it belongs to.
    request : str
        What the steps are for.
    steps : int
        How many.
    charged : int
        All steps charged to the plan so far, these included.
    """

    plan: int
    request: str
    steps: int
    charged: int


@dataclasses.dataclass(frozen=True)
class Request:
    """What a message asks of a data set; the same request is answered with the same bytes.

    Parameters
    ----------
    dataset : str
        The account.
    training : str
        The training's id, which a resumed run keeps.
    server_round : int
        Round, from 1.
    inputs : str
        Hash of all that the reply depends on: received tensors, round plan, form of the reply.
    plan : PrivacyPlan
        The client's plan for the whole training.
    secure_noise : bool
        Whether nobody can reproduce the noise.
    steps : int
        Private steps of the round.  If the plan has evaluations, each round is charged one, too.
    records : str
        Which records: what :meth:`Ledger.admit` returned.
    """

    dataset: str
    training: str
    server_round: int
    inputs: str
    plan: PrivacyPlan
    secure_noise: bool
    steps: int
    records: str

    @property
    def numbers(self) -> str:
        """The plan, as it is compared and kept."""
        values = dataclasses.asdict(self.plan) | {"secure_noise": self.secure_noise}
        # JSON has no infinity: an unbounded clip norm is written as null.
        plain = {k: None if v == math.inf else v for k, v in values.items()}
        return json.dumps(plain, sort_keys=True)

    @property
    def key(self) -> str:
        """Hash of data set and records, training, round, inputs and plan."""
        parts = [self.dataset, self.records, self.training, self.server_round, self.inputs]
        return hashlib.sha256(json.dumps([*parts, self.steps, self.numbers]).encode()).hexdigest()


class Ledger:
    """The account of a site's data sets, over all runs, servers and restarts.

    Parameters
    ----------
    folder : Path
        Where it is.
    head : Path
        The second place; see :class:`~privacy.ledger.store.Store`.

    Notes
    -----
    Formal guarantee: what was charged here is all that the data sets lost, if every private step
    was taken under a :class:`Charge`; and no charge is given that takes a data set over its
    :class:`~privacy.BudgetLimit`.  A charge is on disk before it is returned, and never taken
    back: a crash costs budget, not privacy.  Not covered: releases that go past this class, and
    somebody who can change ledger and head together.
    """

    def __init__(self, folder: Path, head: Path) -> None:
        self._store = Store(folder, head)
        self._releases = Releases(folder / "releases")

    @classmethod
    def create(cls, folder: Path, head: Path) -> Self:
        """Make an empty ledger; refused where there is or was one."""
        Store.create(folder, head)
        return cls(folder, head)

    @classmethod
    def open_or_create(cls, folder: Path, head: Path) -> Self:
        """Open a ledger, or make it where there never was one: for simulations only.

        At a site a ledger that is not there is one that was lost.
        """
        Store.create(folder, head, may_exist=True)
        return cls(folder, head)

    def book(self) -> Book:
        """Everything so far, verified.

        Raises
        ------
        LedgerError
            If the ledger cannot be trusted.
        """
        with self._store.transaction() as current:
            return Book(current.entries)

    def admit(self, dataset: str, stamp: str, digests: Callable[[], Iterable[bytes]]) -> str:
        """Look at a data set's records before they are used, unless they were seen as they are.

        A data set that shares a record with another is merged with it: each then counts what was
        spent on both, in full.  So renaming, appending or splitting takes nothing off an account.

        Parameters
        ----------
        dataset : str
            The account.
        stamp : str
            Tells whether the files may have changed (names, sizes, times); cheap to make.
        digests : callable
            One digest of the raw content of each record; called only if the stamp is new.

        Returns
        -------
        str
            Names the records: equal only for equal records.

        Raises
        ------
        LedgerError
            If the ledger cannot be trusted.
        """
        known = self.book().holdings.get(dataset)
        if known is not None and stamp in known.stamps:
            return known.stamps[stamp]
        hashes = overlap.keyed_hashes(self._store.key(), digests())  # long; nobody waits for it
        records = overlap.summary_of(hashes)
        with self._store.transaction() as current:
            book = Book(current.entries)
            expected = {name: one.held for name, one in book.holdings.items()}
            others, held = overlap.sharing(current.connection, dataset, hashes, expected)
            stamps = book.holdings[dataset].stamps if dataset in book.holdings else {}
            if len(stamps) >= _MOST_STAMPS and records in stamps.values():
                return records  # a server may ask in ever new ways: the disk is not filled with it
            overlap.hold(current.connection, dataset, set(hashes).difference(held))
            current.append(
                "dataset",
                {
                    "at": _now(),
                    "dataset": dataset,
                    "stamp": stamp,
                    "records": records,
                    "held": overlap.summary_of(sorted({*hashes, *held})),
                    "count": len(hashes),
                    "overlaps": others,
                },
            )
        return records

    def find(self, request: Request) -> bytes | None:
        """The reply that this request got before, if it was charged and stored; costs nothing.

        Raises
        ------
        LedgerError
            If the ledger cannot be trusted.
        """
        with self._store.transaction() as current:
            book = Book(current.entries)
        plan = book.plan_of(request.dataset, request.training)
        if plan is None or request.key not in book.requests:
            return None
        return self._releases.find(plan.entry, request.key)

    def charge(self, request: Request, limits: Mapping[str, BudgetLimit]) -> Charge:
        """Pay for a round's steps, before the first of them.

        Parameters
        ----------
        request : Request
            What for.
        limits : mapping of str to BudgetLimit
            Of every data set of the policy: a charge must keep the limit of each that shares
            records with this one.

        Raises
        ------
        PlanChanged
            If the training has another plan.
        DataChanged
            If the training began with other records.
        BudgetExhausted
            If the plan or a budget does not allow so many steps; nothing was charged.
        LedgerError
            If the ledger cannot be trusted, or the charge cannot be brought to the disk.
        """
        if request.steps < 1:
            raise ValueError(f"steps must be >= 1, got {request.steps}")
        with self._store.transaction() as current:
            book = Book(current.entries)
            holding = book.holdings.get(request.dataset)
            if holding is None or request.records not in holding.stamps.values():
                raise LedgerError(f"these records of {request.dataset} were never admitted")
            plan = self._plan(current, book, request)
            charged = plan.steps + request.steps
            if charged > plan.most_steps:
                raise BudgetExhausted(
                    f"{plan.steps} of {plan.most_steps} steps of this training are spent, "
                    f"{request.steps} more were asked for"
                )
            evaluations = int(request.plan.evaluations > 0)
            if plan.evaluations + evaluations > plan.most_evaluations:
                raise BudgetExhausted(
                    f"all {plan.most_evaluations} evaluations of this training are spent"
                )
            entry = current.append(
                "charge",
                {
                    "at": _now(),
                    "plan": plan.entry,
                    "round": request.server_round,
                    "request": request.key,
                    "steps": request.steps,
                    "evaluations": evaluations,
                },
            )
            book.add(entry)
            _check_limits(book, request.dataset, limits)  # else all of it is rolled back
        return Charge(plan.entry, request.key, request.steps, charged)

    def keep(self, charge: Charge, reply: bytes) -> None:
        """Store a reply durably, before it is sent.

        Raises
        ------
        LedgerError
            If it cannot be stored: then it must not be sent.
        """
        self._releases.keep(charge.plan, charge.request, reply)

    def _plan(self, current: Transaction, book: Book, request: Request) -> PlanAccount:
        plan = book.plan_of(request.dataset, request.training)
        if plan is None:
            entry = current.append(
                "plan",
                {
                    "at": _now(),
                    "dataset": request.dataset,
                    "training": request.training,
                    "records": request.records,
                    "numbers": request.numbers,
                    "sample-rate": request.plan.sample_rate,
                    # Noise that can be reproduced protects nobody.
                    "noise-multiplier": request.plan.noise_multiplier * request.secure_noise,
                    "most-steps": request.plan.steps,
                    "evaluation-noise-multiplier": (
                        request.plan.evaluation_noise_multiplier * request.secure_noise
                    ),
                    "most-evaluations": request.plan.evaluations,
                },
            )
            book.add(entry)
            return book.plans[entry.number]
        if plan.records != request.records:
            raise DataChanged(
                f"the records of {request.dataset} changed in the middle of the training: begin a "
                "new one"
            )
        if plan.numbers != request.numbers:
            raise PlanChanged(
                "the privacy plan differs from that of the training's earlier rounds: the site's "
                "data, its policy or the run config changed in the middle of the training"
            )
        return plan


def _check_limits(book: Book, dataset: str, limits: Mapping[str, BudgetLimit]) -> None:
    plans = book.spent(dataset)
    spent = [plan.spendings for plan in plans]
    if len(plans) == 1 and plans[0].most_evaluations:
        # How many steps come before each evaluation is chosen round by round, in view of outputs:
        # only for all of both together are the numbers fixed beforehand.
        spent = [plans[0].whole]
    for name in sorted(book.group(dataset)):
        if name in limits and not limits[name].allows(spent):
            shared = "" if name == dataset else f", which shares records with {dataset},"
            raise BudgetExhausted(
                f"the round would take {name}{shared} over its largest epsilon "
                f"{limits[name].max_epsilon:g} at delta {limits[name].max_delta:g}"
            )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
