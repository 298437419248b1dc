"""What the entries add up to: data sets, plans, charges."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ..privacy_filter import Spending
from .chain import Entry
from .errors import LedgerError


@dataclasses.dataclass
class PlanAccount:
    """One plan on one data set: what was fixed, and what it has spent."""

    entry: int
    dataset: str
    training: str
    records: str
    numbers: str
    sample_rate: float
    noise_multiplier: float
    most_steps: int
    evaluation_noise_multiplier: float
    most_evaluations: int
    steps: int = 0
    evaluations: int = 0
    rounds: list[int] = dataclasses.field(default_factory=list)

    @property
    def spendings(self) -> list[Spending]:
        """As the filter takes it: steps, and evaluations, which see every record."""
        return self._spendings(self.steps, self.evaluations)

    @property
    def whole(self) -> list[Spending]:
        """What it will have spent at its end."""
        return self._spendings(self.most_steps, self.most_evaluations)

    def _spendings(self, steps: int, evaluations: int) -> list[Spending]:
        spent = [Spending(self.sample_rate, self.noise_multiplier, steps)]
        if evaluations:
            spent.append(Spending(1.0, self.evaluation_noise_multiplier, evaluations))
        return spent


@dataclasses.dataclass(frozen=True)
class Holding:
    """The records that a data set has and had.

    Parameters
    ----------
    stamps : mapping of str to str
        Summary of the records by each stamp that they were looked at under.
    held : str
        Summary of all records that the data set ever had.
    count : int
        Distinct records when they were last looked at.
    """

    stamps: Mapping[str, str]
    held: str
    count: int


class Book:
    """The state that a chain of entries leads to.

    Parameters
    ----------
    entries : iterable of Entry
        A verified chain.

    Raises
    ------
    LedgerError
        If an entry says what no entry of this version says.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.holdings: dict[str, Holding] = {}
        self.plans: dict[int, PlanAccount] = {}
        self.requests: dict[str, int] = {}
        self._group: dict[str, str] = {}
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        """Go on by one entry."""
        try:
            {"dataset": self._hold, "plan": self._plan, "charge": self._charge}[entry.kind](
                entry.number, entry.values
            )
        except (KeyError, TypeError, ValueError) as error:
            raise LedgerError(
                f"the ledger's entry {entry.number} is of another version of this program "
                f"({type(error).__name__})"
            ) from error

    def plan_of(self, dataset: str, training: str) -> PlanAccount | None:
        """The plan that a training has on a data set."""
        for plan in self.plans.values():
            if (plan.dataset, plan.training) == (dataset, training):
                return plan
        return None

    def group(self, dataset: str) -> set[str]:
        """The data set and all that share records with it, directly or through others."""
        root = self._root(dataset)
        return {dataset} | {name for name in self._group if self._root(name) == root}

    def spent(self, dataset: str) -> list[PlanAccount]:
        """Plans with charges on the data set or on any that shares records with it."""
        group = self.group(dataset)
        return [plan for plan in self.plans.values() if plan.dataset in group and plan.steps]

    def _hold(self, number: int, values: Mapping[str, Any]) -> None:
        name = str(values["dataset"])
        before = self.holdings[name].stamps if name in self.holdings else {}
        stamps = {**before, str(values["stamp"]): str(values["records"])}
        self.holdings[name] = Holding(stamps, str(values["held"]), int(values["count"]))
        for other in [str(one) for one in values["overlaps"]]:
            self._group[self._root(other)] = self._root(name)
        self._group.setdefault(name, name)

    def _plan(self, number: int, values: Mapping[str, Any]) -> None:
        self.plans[number] = PlanAccount(
            entry=number,
            dataset=str(values["dataset"]),
            training=str(values["training"]),
            records=str(values["records"]),
            numbers=str(values["numbers"]),
            sample_rate=float(values["sample-rate"]),
            noise_multiplier=float(values["noise-multiplier"]),
            most_steps=int(values["most-steps"]),
            evaluation_noise_multiplier=float(values["evaluation-noise-multiplier"]),
            most_evaluations=int(values["most-evaluations"]),
        )

    def _charge(self, number: int, values: Mapping[str, Any]) -> None:
        plan = self.plans[values["plan"]]
        steps = int(values["steps"])
        if steps < 1:
            raise ValueError("a charge takes steps")
        plan.steps += steps
        plan.evaluations += int(values["evaluations"])
        plan.rounds.append(int(values["round"]))
        self.requests[str(values["request"])] = number

    def _root(self, name: str) -> str:
        while self._group.get(name, name) != name:
            name = self._group[name]
        return name
