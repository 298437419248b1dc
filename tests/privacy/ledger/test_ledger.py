"""Charges, replies and records: what a site may release, and what it costs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from privacy import BudgetLimit, DataChanged, Ledger, LedgerError, PlanChanged
from privacy.ledger import BudgetExhausted
from privacy.ledger import ledger as ledger_module
from tests.privacy.ledger.accounts import (
    PLAN,
    WIDE,
    admit,
    digests,
    new_ledger,
    request,
    steps_of,
)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return new_ledger(tmp_path)


def entries(ledger: Ledger) -> int:
    with ledger._store.transaction() as current:
        return len(current.entries)


def epsilon_limit(steps: int, *, plans: int = 1) -> BudgetLimit:
    """A limit that so many steps of each of so many of our plans just keep."""
    from privacy import Spending

    spent = [[Spending(PLAN.sample_rate, PLAN.noise_multiplier, steps)]] * plans
    low, high = 1e-3, 100.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        if BudgetLimit(middle, 1e-5).allows(spent):
            high = middle
        else:
            low = middle
    return BudgetLimit(high, 1e-5)


def test_a_charge_is_on_disk_before_it_is_returned(ledger, tmp_path):
    records = admit(ledger, "a", 1, 2)
    charge = ledger.charge(request(records, steps=3), WIDE)
    assert (charge.steps, charge.charged) == (3, 3)
    other = Ledger(tmp_path / "ledger", tmp_path / "second" / "head.json")
    assert steps_of(other) == 3
    (plan,) = other.book().plans.values()
    assert (plan.sample_rate, plan.noise_multiplier, plan.most_steps) == (0.1, 2.0, 20)
    assert other.charge(request(records, steps=4, server_round=2), WIDE).charged == 7


def test_a_plan_gives_no_more_steps_than_it_has(ledger):
    records = admit(ledger, "a", 1)
    ledger.charge(request(records, steps=19), WIDE)
    before = entries(ledger)
    with pytest.raises(BudgetExhausted, match=r"19 of 20 steps .* 2 more were asked for"):
        ledger.charge(request(records, server_round=2, steps=2), WIDE)
    assert entries(ledger) == before
    assert ledger.charge(request(records, server_round=2, steps=1), WIDE).charged == 20


def test_a_plans_first_round_that_is_refused_leaves_not_even_the_plan(ledger):
    records = admit(ledger, "a", 1)
    with pytest.raises(BudgetExhausted):
        ledger.charge(request(records, steps=21), WIDE)
    with pytest.raises(BudgetExhausted, match=r"largest epsilon 0\.001 at delta 1e-05"):
        ledger.charge(request(records), {"a": BudgetLimit(1e-3, 1e-5)})
    assert entries(ledger) == 1 and ledger.book().plans == {}


@pytest.mark.parametrize("steps", [0, -1])
def test_a_charge_is_of_some_steps(ledger, steps):
    records = admit(ledger, "a", 1)
    with pytest.raises(ValueError, match="steps must be >= 1"):
        ledger.charge(request(records, steps=steps), WIDE)


@pytest.mark.parametrize(
    "change",
    [
        {"sample_rate": 0.05, "expected_batch_size": 5.0},
        {"expected_batch_size": 20.0},
        {"max_grad_norm": 2.0},
        {"max_grad_norm_a": 2.0},
        {"noise_multiplier": 4.0},
        {"steps_of_plan": 40},
        {"target_delta": 1e-7},
        {"secure": False},
    ],
)
def test_a_plan_that_changed_is_refused(ledger, change):
    import dataclasses

    records = admit(ledger, "a", 1)
    ledger.charge(request(records), WIDE)
    if "steps_of_plan" in change:
        changed = request(records, server_round=2)
        plan = dataclasses.replace(changed.plan, steps=change["steps_of_plan"])
        changed = dataclasses.replace(changed, plan=plan)
    else:
        changed = request(records, server_round=2, **change)
    with pytest.raises(PlanChanged, match="changed in the middle of the training"):
        ledger.charge(changed, WIDE)
    assert steps_of(ledger) == 2
    assert ledger.charge(request(records, server_round=2), WIDE).charged == 4


def test_another_training_has_a_plan_of_its_own(ledger):
    records = admit(ledger, "a", 1)
    ledger.charge(request(records), WIDE)
    ledger.charge(request(records, training="other", noise_multiplier=9.0), WIDE)
    assert [plan.steps for plan in ledger.book().plans.values()] == [2, 2]


def test_noise_that_can_be_reproduced_has_no_guarantee(ledger):
    records = admit(ledger, "a", 1)
    with pytest.raises(BudgetExhausted):
        ledger.charge(request(records, secure=False), WIDE)
    ledger.charge(request(records, secure=False), {"a": BudgetLimit(math.inf, 1e-5)})
    assert [plan.noise_multiplier for plan in ledger.book().plans.values()] == [0.0]
    with pytest.raises(BudgetExhausted):  # it is never forgotten
        ledger.charge(request(records, training="protected"), WIDE)


def test_the_budget_holds_over_trainings(ledger):
    """One plan by PLD, more of them by the filter: what the limit allows, and not a step more."""
    limits = {"a": epsilon_limit(4, plans=2)}
    records = admit(ledger, "a", 1)
    for training in ("one", "two"):
        for number in (1, 2):
            ledger.charge(request(records, training=training, server_round=number), limits)
    for training in ("one", "two", "three"):
        with pytest.raises(BudgetExhausted):
            ledger.charge(request(records, training=training, server_round=3, steps=1), limits)
    assert steps_of(ledger) == 8


EVALUATED = {"evaluations": 3, "evaluation_noise_multiplier": 30.0}


def test_each_round_of_a_plan_with_evaluations_is_charged_one(ledger):
    records = admit(ledger, "a", 1)
    for number in (1, 2, 3):
        ledger.charge(request(records, server_round=number, **EVALUATED), WIDE)
    with pytest.raises(BudgetExhausted, match="all 3 evaluations of this training are spent"):
        ledger.charge(request(records, server_round=4, **EVALUATED), WIDE)
    (plan,) = ledger.book().plans.values()
    assert (plan.steps, plan.evaluations) == (6, 3)
    assert [(one.sample_rate, one.steps) for one in plan.spendings] == [(0.1, 6), (1.0, 3)]


def test_a_plan_of_two_kinds_is_allowed_as_a_whole_or_not_at_all(ledger):
    """A server could choose how many steps it takes before each evaluation by what it saw."""
    from privacy import Spending

    first = [Spending(0.1, 2.0, 2), Spending(1.0, 3.0, 1)]
    whole = [Spending(0.1, 2.0, 20), Spending(1.0, 3.0, 3)]
    few = EVALUATED | {"evaluation_noise_multiplier": 3.0}
    epsilon = BudgetLimit(8.0, 1e-5).spent([whole])
    records = admit(ledger, "a", 1)
    too_small = BudgetLimit(0.9 * epsilon, 1e-5)
    assert too_small.allows([first])
    with pytest.raises(BudgetExhausted):
        ledger.charge(request(records, **few), {"a": too_small})
    ledger.charge(request(records, **few), {"a": BudgetLimit(1.01 * epsilon, 1e-5)})
    # With a second plan the filter decides, by what was taken.
    ledger.charge(
        request(records, training="small", noise_multiplier=50.0),
        {"a": BudgetLimit(0.9 * epsilon, 1e-5)},
    )


def test_evaluations_whose_noise_can_be_reproduced_have_no_guarantee(ledger):
    records = admit(ledger, "a", 1)
    unlimited = {"a": BudgetLimit(math.inf, 1e-5)}
    ledger.charge(request(records, secure=False, **EVALUATED), unlimited)
    (plan,) = ledger.book().plans.values()
    assert plan.evaluation_noise_multiplier == 0.0


# --- records -------------------------------------------------------------------------------------


def test_records_are_read_again_only_under_a_new_stamp(ledger):
    calls = []

    def read(*names):
        def call():
            calls.append(names)
            return digests(*names)

        return call

    first = ledger.admit("a", "monday", read(1, 2))
    assert ledger.admit("a", "monday", read("not read")) == first
    assert ledger.admit("a", "tuesday", read(2, 1)) == first, "the same records in another order"
    assert ledger.admit("a", "wednesday", read(1, 3)) != first
    before = entries(ledger)
    for stamp in ("monday", "tuesday", "wednesday", "monday"):
        ledger.admit("a", stamp, read("not read"))
    assert entries(ledger) == before and calls == [(1, 2), (2, 1), (1, 3)]


def test_a_training_goes_on_with_the_records_that_it_began_with(ledger):
    old = admit(ledger, "a", 1, 2)
    ledger.charge(request(old), WIDE)
    new = admit(ledger, "a", 1, 2, 3)
    with pytest.raises(DataChanged, match="records of a changed in the middle of the training"):
        ledger.charge(request(new, server_round=2), WIDE)
    assert steps_of(ledger) == 2
    ledger.charge(request(new, training="new"), WIDE)
    with pytest.raises(DataChanged):  # also once another training has had the new records
        ledger.charge(request(new, server_round=2), WIDE)
    ledger.charge(request(admit(ledger, "a", 1, 2), server_round=2), WIDE)
    assert steps_of(ledger) == 6


def test_records_that_were_never_admitted_are_not_charged(ledger):
    with pytest.raises(LedgerError, match="never admitted"):
        ledger.charge(request("r"), WIDE)
    records = admit(ledger, "a", 1)
    with pytest.raises(LedgerError, match="never admitted"):
        ledger.charge(request("other"), WIDE)
    with pytest.raises(LedgerError, match="never admitted"):
        ledger.charge(request(records, "b"), WIDE)


def spent(ledger: Ledger, dataset: str) -> int:
    return sum(plan.steps for plan in ledger.book().spent(dataset))


def test_renaming_keeps_what_was_spent(ledger):
    ledger.charge(request(admit(ledger, "a", 1, 2, 3)), WIDE)
    admit(ledger, "b", 1, 2, 3)
    assert spent(ledger, "b") == 2


def test_appending_keeps_what_was_spent(ledger):
    ledger.charge(request(admit(ledger, "a", 1, 2, 3)), WIDE)
    admit(ledger, "b", 3, *range(100, 120))
    assert spent(ledger, "b") == 2


def test_splitting_keeps_what_was_spent(ledger):
    ledger.charge(request(admit(ledger, "a", 1, 2, 3)), WIDE)
    admit(ledger, "b", 1)
    admit(ledger, "c", 2, 3)
    assert spent(ledger, "b") == spent(ledger, "c") == 2


def test_records_that_a_data_set_once_had_still_count(ledger):
    ledger.charge(request(admit(ledger, "a", 1, 2)), WIDE)
    admit(ledger, "a", 3)
    admit(ledger, "b", 2)
    assert spent(ledger, "b") == 2


def test_overlap_goes_through_others(ledger):
    """a - b - c share nothing but through b, and also when b comes last."""
    ledger.charge(request(admit(ledger, "a", 1, 2)), WIDE)
    ledger.charge(request(admit(ledger, "c", 3, 4), "c"), WIDE)
    assert spent(ledger, "a") == spent(ledger, "c") == 2
    admit(ledger, "d", 9)
    admit(ledger, "b", 2, 3)
    assert [spent(ledger, name) for name in "abcd"] == [4, 4, 4, 0]
    assert ledger.book().group("a") == {"a", "b", "c"}


def test_a_merged_charge_keeps_the_limit_of_each(ledger):
    limit = epsilon_limit(2, plans=2)
    records = {name: admit(ledger, name, *names) for name, names in {"a": (1,), "b": (2,)}.items()}
    limits = {"a": limit, "b": BudgetLimit(1e6, 1e-5)}
    ledger.charge(request(records["a"]), limits)
    ledger.charge(request(records["b"], "b", server_round=7), limits)
    admit(ledger, "b", 1, 2)
    with pytest.raises(BudgetExhausted, match="would take a, which shares records with b, over"):
        ledger.charge(request(records["b"], "b", server_round=8), limits)
    ledger.charge(request(admit(ledger, "c", 5), "c"), limits)
    assert steps_of(ledger) == 6


def test_hashes_are_keyed(ledger, tmp_path):
    """Who knows a record cannot look for it without the key."""
    admit(ledger, "a", 1)
    with ledger._store.transaction() as current:
        ((found, dataset),) = current.connection.execute("select * from records").fetchall()
    assert dataset == "a" and len(found) == 16
    assert found != digests(1)[0][:16]
    (tmp_path / "other").mkdir()
    other = new_ledger(tmp_path / "other")
    admit(other, "a", 1)
    with other._store.transaction() as current:
        assert current.connection.execute("select hash from records").fetchone() != (found,)


def test_the_same_record_twice_is_one(ledger):
    admit(ledger, "a", 1, 1, 2)
    with ledger._store.transaction() as current:
        assert current.connection.execute("select count(*) from records").fetchone() == (2,)


def test_reading_records_holds_up_nobody(ledger, tmp_path, monkeypatch):
    """Hashing a large data set takes long; others go on meanwhile."""
    monkeypatch.setattr("privacy.ledger.store.LOCK_SECONDS", 0.2)
    records = admit(ledger, "a", 1)
    other = Ledger(tmp_path / "ledger", tmp_path / "second" / "head.json")

    def slow():
        other.charge(request(records), WIDE)
        return digests(1, 5)

    ledger.admit("b", "stamp", slow)
    assert spent(ledger, "b") == 2


# --- replies -------------------------------------------------------------------------------------


def test_the_same_request_gets_the_same_bytes_and_costs_nothing(ledger, tmp_path):
    asked = request(admit(ledger, "a", 1))
    assert ledger.find(asked) is None
    ledger.keep(ledger.charge(asked, WIDE), b"noised bytes")
    before = entries(ledger)
    other = Ledger(tmp_path / "ledger", tmp_path / "second" / "head.json")
    assert ledger.find(asked) == other.find(asked) == b"noised bytes"
    assert entries(ledger) == before


@pytest.mark.parametrize(
    "change",
    [{"training": "another"}, {"server_round": 2}, {"inputs": "other"}, {"steps": 3},
     {"noise_multiplier": 3.0}, {"secure": False}, {"dataset": "b"}],
)  # fmt: skip
def test_another_request_gets_nothing_of_it(ledger, change):
    records = admit(ledger, "a", 1)
    admit(ledger, "b", 1)
    ledger.keep(ledger.charge(request(records), WIDE), b"noised bytes")
    assert ledger.find(request(records, **change)) is None


def test_the_same_round_with_other_inputs_is_a_new_charge_or_a_refusal(ledger):
    records = admit(ledger, "a", 1)
    ledger.keep(ledger.charge(request(records, steps=10), WIDE), b"one")
    ledger.keep(ledger.charge(request(records, steps=10, inputs="other"), WIDE), b"two")
    with pytest.raises(BudgetExhausted):
        ledger.charge(request(records, steps=10, inputs="third"), WIDE)
    assert steps_of(ledger) == 20


def test_charged_but_nothing_stored_is_a_new_charge_or_a_refusal(ledger):
    asked = request(admit(ledger, "a", 1), steps=10)
    ledger.charge(asked, WIDE)
    assert ledger.find(asked) is None
    ledger.charge(asked, WIDE)
    assert ledger.find(asked) is None and steps_of(ledger) == 20
    with pytest.raises(BudgetExhausted):
        ledger.charge(asked, WIDE)


def test_stored_but_not_charged_is_not_sent(ledger, tmp_path):
    """A file under a request's name is no reply unless the ledger knows of the charge."""
    records = admit(ledger, "a", 1)
    charge = ledger.charge(request(records), WIDE)
    asked = request(records, server_round=2)
    ledger._releases.keep(charge.plan, asked.key, b"planted")
    assert ledger.find(asked) is None


def test_a_damaged_reply_is_not_sent(ledger, tmp_path):
    asked = request(admit(ledger, "a", 1))
    ledger.keep(ledger.charge(asked, WIDE), b"noised bytes")
    (path,) = (tmp_path / "ledger" / "releases").iterdir()
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert ledger.find(asked) is None
        path.write_bytes(whole[:place])
        assert ledger.find(asked) is None
    path.write_bytes(whole + b"x")
    assert ledger.find(asked) is None
    path.write_bytes(whole)
    assert ledger.find(asked) == b"noised bytes"


def test_a_plans_earlier_replies_are_dropped_and_others_kept(ledger, tmp_path):
    records = admit(ledger, "a", 1)
    for training in [str(number) for number in range(12)]:  # entries of one and two digits
        ledger.keep(ledger.charge(request(records, training=training), WIDE), b"reply")
    for number in (2, 3):
        later = request(records, training="0", server_round=number)
        ledger.keep(ledger.charge(later, WIDE), b"later")
    assert len(list((tmp_path / "ledger" / "releases").iterdir())) == 12
    assert ledger.find(later) == b"later"
    for training in [str(number) for number in range(1, 12)]:
        assert ledger.find(request(records, training=training)) == b"reply"


def test_a_reply_that_cannot_be_stored_must_not_be_sent(ledger, monkeypatch):
    asked = request(admit(ledger, "a", 1))
    charge = ledger.charge(asked, WIDE)

    def full(*_args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("privacy.ledger.releases.write_atomically", full)
        with pytest.raises(LedgerError, match="No space left"):
            ledger.keep(charge, b"reply")
    assert ledger.find(asked) is None and steps_of(ledger) == 2
    ledger.keep(charge, b"reply")
    assert ledger.find(asked) == b"reply"


def test_a_request_is_known_by_all_that_its_reply_depends_on():
    one = request("r")
    assert one.key == request("r").key
    others = [
        request("s"), request("r", "b"), request("r", training="t2"), request("r", server_round=2),
        request("r", inputs="i2"), request("r", steps=3), request("r", secure=False),
        request("r", sample_rate=0.2), request("r", max_grad_norm_b=1.0),
    ]  # fmt: skip
    assert len({one.key, *(other.key for other in others)}) == 1 + len(others)


def test_an_unbounded_plan_can_be_written_down(ledger):
    records = admit(ledger, "a", 1)
    free = {"max_grad_norm": math.inf, "noise_multiplier": 0.0}
    ledger.charge(request(records, **free), {"a": BudgetLimit(math.inf, 1e-5)})
    with pytest.raises(BudgetExhausted):
        ledger.charge(request(records, training="t2", **free), WIDE)


def test_times_are_written_in_utc(ledger):
    assert ledger_module._now().endswith("+00:00")


def test_ever_new_stamps_of_the_same_records_do_not_fill_the_disk(ledger):
    records = admit(ledger, "a", 1)
    for number in range(80):
        assert admit(ledger, "a", 1, stamp=f"stamp {number}") == records
    assert entries(ledger) == 64
    assert admit(ledger, "a", 1, 2, stamp="stamp 80") != records, "other records are taken down"
    assert entries(ledger) == 65
    admit(ledger, "b", 2)
    assert ledger.book().group("b") == {"a", "b"}
