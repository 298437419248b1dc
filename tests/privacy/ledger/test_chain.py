"""A chain of entries is whole, or it is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.ledger import Book, LedgerError
from privacy.ledger.chain import Entry, next_entry, verified

VALUES = [
    ("dataset", {"at": "t", "dataset": "a", "stamp": "s", "records": "r", "held": "h",
                 "count": 3, "overlaps": []}),
    ("plan", {"at": "t", "dataset": "a", "training": "x", "records": "r", "numbers": "{}",
              "sample-rate": 0.1, "noise-multiplier": 2.0, "most-steps": 9,
              "evaluation-noise-multiplier": 3.0, "most-evaluations": 2}),
    ("charge", {"at": "t", "plan": 2, "round": 1, "request": "q", "steps": 2, "evaluations": 1}),
    ("charge", {"at": "t", "plan": 2, "round": 2, "request": "p", "steps": 3, "evaluations": 1}),
]  # fmt: skip


def chain_of(values) -> list[Entry]:
    chain: list[Entry] = []
    for kind, body in values:
        chain.append(next_entry(chain[-1] if chain else None, kind, body))
    return chain


CHAIN = chain_of(VALUES)


def test_a_chain_as_it_was_written_is_whole_and_adds_up():
    assert verified(CHAIN) == CHAIN
    book = Book(CHAIN)
    assert [(p.dataset, p.steps, p.rounds) for p in book.plans.values()] == [("a", 5, [1, 2])]
    assert book.requests == {"q": 3, "p": 4}


@given(
    place=st.integers(0, len(CHAIN) - 1),
    field=st.sampled_from(["kind", "body", "seal"]),
    at=st.integers(0),
    change=st.integers(1, 255),
)
def test_any_changed_byte_of_any_field_is_found(place, field, at, change):
    value = getattr(CHAIN[place], field)
    raw = bytearray(value if field == "seal" else value.encode())
    raw[at % len(raw)] ^= change
    changed = bytes(raw) if field == "seal" else raw.decode("latin-1")
    entries = list(CHAIN)
    entries[place] = dataclasses.replace(CHAIN[place], **{field: changed})
    with pytest.raises(LedgerError, match=f"entry {place + 1} is missing or was changed"):
        verified(entries)


@given(place=st.integers(0, len(CHAIN) - 1), number=st.integers(-5, 9))
def test_a_changed_number_is_found(place, number):
    entries = list(CHAIN)
    entries[place] = dataclasses.replace(CHAIN[place], number=number)
    if number == CHAIN[place].number:
        assert verified(entries) == entries
    else:
        with pytest.raises(LedgerError):
            verified(entries)


@given(st.permutations(range(len(CHAIN))))
def test_entries_out_of_their_order_are_found(order):
    entries = [CHAIN[place] for place in order]
    if order == sorted(order):
        assert verified(entries) == CHAIN
    else:
        with pytest.raises(LedgerError):
            verified(entries)


@given(st.sets(st.integers(0, len(CHAIN) - 1), min_size=1))
def test_a_missing_entry_is_found_unless_it_is_one_of_the_last(missing):
    """The last ones are the head's business."""
    entries = [entry for place, entry in enumerate(CHAIN) if place not in missing]
    if missing == set(range(min(missing), len(CHAIN))):
        assert verified(entries) == entries
    else:
        with pytest.raises(LedgerError):
            verified(entries)


def test_entries_of_another_chain_do_not_go_on_from_this_one():
    other = chain_of([VALUES[0], VALUES[1], ("charge", {**VALUES[2][1], "steps": 1}), VALUES[3]])
    with pytest.raises(LedgerError):
        verified([*CHAIN[:3], other[3]])


def test_a_body_is_canonical_so_that_no_two_texts_say_the_same():
    entry = next_entry(None, "charge", {"b": 1, "a": 2.5})
    assert entry.body == '{"a":2.5,"b":1}'
    with pytest.raises(ValueError, match="JSON compliant"):
        next_entry(None, "charge", {"steps": float("nan")})


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("other", {}),
        ("charge", {"plan": 1}),
        ("charge", {"plan": [2]}),
        ("charge", {"steps": 0}),
        ("charge", {"steps": -2}),
        ("charge", {"steps": "many"}),
        ("charge", {"request": None, "round": None}),
        ("plan", {"noise-multiplier": "loud"}),
        ("plan", {"most-steps": None}),
        ("dataset", {"overlaps": None}),
    ],
)
def test_an_entry_that_this_version_does_not_know_is_refused(kind, change):
    body = {**dict(VALUES).get(kind, {}), **change}
    with pytest.raises(LedgerError, match="of another version"):
        Book([*CHAIN, next_entry(CHAIN[-1], kind, body)])


@pytest.mark.parametrize("kind", ["dataset", "plan", "charge"])
def test_an_entry_that_lacks_a_value_is_refused(kind):
    body = dict(VALUES)[kind]
    for key in body.keys() - {"at", "count"}:  # these two are for people
        less = {name: value for name, value in body.items() if name != key}
        with pytest.raises(LedgerError):
            Book([*CHAIN, next_entry(CHAIN[-1], kind, less)])
    for text in ("", "[]", "3", "{"):
        with pytest.raises(LedgerError):
            Book([Entry(1, kind, text, b"")])
    assert json.loads(next_entry(None, kind, body).body) == body
