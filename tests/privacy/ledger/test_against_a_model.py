"""Any sequence of uses does what a few lines in memory do."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import DataChanged, Ledger, PlanChanged
from privacy.ledger import BudgetExhausted
from tests.privacy.ledger.accounts import admit, request


@dataclasses.dataclass(frozen=True)
class StepLimit:
    """Allows so many steps: a BudgetLimit, but for epsilon."""

    steps: int
    max_epsilon: float = 1.0
    max_delta: float = 1e-5

    def allows(self, plans) -> bool:
        return sum(one.steps for plan in plans for one in plan) <= self.steps


DATASETS = ("a", "b", "c", "d")
LIMITS: Any = {"a": StepLimit(8), "b": StepLimit(11), "c": StepLimit(9)}  # d has none
MOST_STEPS = 20


class Model:
    """What a ledger must do, without disk, hashes or chain."""

    def __init__(self) -> None:
        self.held: dict[str, set[int]] = {}
        self.links: list[set[str]] = []
        self.plans: dict[tuple[str, str], list] = {}  # records, noise, steps
        self.replies: dict[tuple[str, str], tuple[tuple, bytes]] = {}
        self.charges: list[tuple[str, int]] = []

    def admit(self, dataset: str, records: frozenset[int]) -> None:
        for other, held in self.held.items():
            if other != dataset and held & records:
                self.links.append({dataset, other})
        self.held.setdefault(dataset, set()).update(records)

    def group(self, dataset: str) -> set[str]:
        group = {dataset}
        while more := [link for link in self.links if link & group and not link <= group]:
            group = group.union(*more)
        return group

    def refusal(self, dataset, training, records, noise, steps) -> type[Exception] | None:
        plan = self.plans.get((dataset, training), [records, noise, 0])
        if plan[0] != records:
            return DataChanged
        if plan[1] != noise:
            return PlanChanged
        if plan[2] + steps > MOST_STEPS:
            return BudgetExhausted
        group = self.group(dataset)
        total = steps + sum(number for name, number in self.charges if name in group)
        full = any(name in LIMITS and total > LIMITS[name].steps for name in group)
        return BudgetExhausted if full else None


records_of = st.frozensets(st.integers(0, 11), min_size=1, max_size=4)
asked = st.tuples(
    st.sampled_from(DATASETS), st.sampled_from(["t1", "t2"]), st.integers(1, 2),
    st.sampled_from(["i1", "i2"]), st.sampled_from([2.0, 3.0]), st.integers(1, 4),
)  # fmt: skip
operations = st.one_of(
    st.tuples(st.just("admit"), st.sampled_from(DATASETS), records_of),
    st.tuples(st.just("round"), asked, st.sampled_from(["stored", "crashed before it was"])),
    st.tuples(st.just("restart")),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(operations, min_size=5, max_size=30))
def test_a_ledger_does_what_its_model_does(uses):
    with tempfile.TemporaryDirectory() as name:
        folder, head = Path(name) / "ledger", Path(name) / "head.json"
        _compare(Ledger.create(folder, head), uses)


def _compare(ledger: Ledger, uses) -> None:
    model = Model()
    now: dict[str, frozenset[int]] = {}
    for number, use in enumerate(uses):
        if use[0] == "restart":
            ledger = Ledger(ledger._store.folder, ledger._store.head)
        elif use[0] == "admit":
            _, dataset, records = use
            admit(ledger, dataset, *sorted(records))
            model.admit(dataset, records)
            now[dataset] = records
        elif use[1][0] in now:
            _, (dataset, training, server_round, inputs, noise, steps), end = use
            records = now[dataset]
            made = request(
                admit(ledger, dataset, *sorted(records)), dataset, training=training, steps=steps,
                server_round=server_round, inputs=inputs, noise_multiplier=noise,
            )  # fmt: skip
            key = (server_round, inputs, noise, steps, records)
            stored = model.replies.get((dataset, training), (None, None))
            expected = stored[1] if stored[0] == key else None
            assert ledger.find(made) == expected
            if expected is not None:
                continue
            refused = model.refusal(dataset, training, records, noise, steps)
            try:
                charge = ledger.charge(made, LIMITS)
            except (BudgetExhausted, DataChanged, PlanChanged) as error:
                assert type(error) is refused  # noqa: PT017
            else:
                assert refused is None
                plan = model.plans.setdefault((dataset, training), [records, noise, 0])
                plan[2] += steps
                model.charges.append((dataset, steps))
                assert (charge.steps, charge.charged) == (steps, plan[2])
                if end == "stored":
                    reply = str(number).encode()
                    ledger.keep(charge, reply)
                    model.replies[dataset, training] = (key, reply)
        _same(ledger, model)


def _same(ledger: Ledger, model: Model) -> None:
    book = ledger.book()
    shown = {(plan.dataset, plan.training): plan.steps for plan in book.plans.values()}
    assert shown == {key: plan[2] for key, plan in model.plans.items()}
    for dataset in DATASETS:
        assert book.group(dataset) == model.group(dataset)
        total = sum(plan.steps for plan in book.spent(dataset))
        group = model.group(dataset)
        assert total == sum(number for name, number in model.charges if name in group)
