"""The ledger's files: whatever happened to them, what was charged is there, or all is refused."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privacy import Ledger, LedgerError, LedgerRolledBack
from privacy.ledger import store as store_module
from tests.privacy.ledger.accounts import WIDE, admit, new_ledger, request, steps_of


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path


def used(place: Path, charges: int = 3) -> Ledger:
    """A ledger with so many charges of 2 steps."""
    ledger = new_ledger(place)
    records = admit(ledger, "a", 1, 2, 3)
    for number in range(1, charges + 1):
        ledger.charge(request(records, server_round=number), WIDE)
    return ledger


def again(place: Path) -> Ledger:
    return Ledger(place / "ledger", place / "second" / "head.json")


def head_of(place: Path) -> Path:
    return place / "second" / "head.json"


def test_what_was_charged_is_there_after_a_restart(place):
    used(place)
    assert steps_of(again(place)) == 6


def test_files_are_closed_to_others(place):
    ledger = used(place)
    ledger.keep(ledger.charge(request(admit(ledger, "a", 1, 2, 3), server_round=9), WIDE), b"r")
    paths = [place / "ledger", head_of(place), *(place / "ledger").rglob("*")]
    assert len(paths) >= 6
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_sqlite_writes_ahead_and_waits_for_the_disk(place):
    used(place)
    connection = sqlite3.connect(place / "ledger" / "ledger.sqlite")
    assert connection.execute("pragma journal_mode").fetchone() == ("wal",)
    connection.close()
    with again(place)._store.transaction() as current:
        assert current.connection.execute("pragma synchronous").fetchone() == (2,)
        assert current.connection.in_transaction


def test_there_is_one_creation(place):
    used(place)
    with pytest.raises(LedgerError, match="there is one already"):
        new_ledger(place)
    assert steps_of(again(place)) == 6


def test_nothing_is_made_by_using_a_ledger_that_is_not_there(place):
    ledger = again(place)
    uses = [
        ledger.book,
        lambda: admit(ledger, "a", 1),
        lambda: ledger.charge(request("r"), WIDE),
        lambda: ledger.find(request("r")),
    ]
    for use in uses:
        with pytest.raises(LedgerError, match="there is none; make it with dp-lora ledger"):
            use()
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("lost", ["ledger.sqlite", "folder"])
def test_a_lost_ledger_is_refused_and_not_made_anew_over_its_head(place, lost):
    used(place)
    folder = place / "ledger"
    shutil.rmtree(folder) if lost == "folder" else (folder / lost).unlink()
    with pytest.raises(LedgerError, match=r"there is none|is not there"):
        again(place).book()
    with pytest.raises(LedgerError, match="the head of a ledger that was lost"):
        new_ledger(place)


def test_a_lost_ledgers_write_ahead_log_is_not_played_into_a_new_one(place):
    used(place)
    connection = sqlite3.connect(place / "ledger" / "ledger.sqlite", isolation_level=None)
    connection.execute("create table kept_open (x)")
    wal = (place / "ledger" / "ledger.sqlite-wal").read_bytes()
    connection.close()
    assert wal
    (place / "ledger" / "ledger.sqlite").unlink()
    (place / "ledger" / "ledger.sqlite-wal").write_bytes(wal)
    head_of(place).unlink()
    with pytest.raises(LedgerError, match=r"there is one already \(ledger.sqlite-wal\)"):
        new_ledger(place)


def test_an_old_copy_of_the_folder_is_refused(place):
    used(place, charges=1)
    shutil.copytree(place / "ledger", place / "copy")
    ledger = again(place)
    ledger.charge(request(admit(ledger, "a", 1, 2, 3), server_round=2), WIDE)
    shutil.copytree(place / "ledger", place / "newest")
    shutil.rmtree(place / "ledger")
    shutil.copytree(place / "copy", place / "ledger")
    for use in (ledger.book, lambda: ledger.charge(request("r", server_round=3), WIDE)):
        with pytest.raises(LedgerRolledBack, match="an old copy was put back"):
            use()
    shutil.rmtree(place / "ledger")
    shutil.copytree(place / "newest", place / "ledger")
    assert steps_of(again(place)) == 4


def test_an_old_copy_that_was_written_to_since_is_refused(place):
    """Its chain is as long as its head says, and another."""
    used(place, charges=1)
    shutil.copytree(place, place.parent / f"{place.name}-copy")
    copy = place.parent / f"{place.name}-copy"
    for where, number in ((place, 2), (copy, 3)):
        ledger = again(where)
        ledger.charge(request(admit(ledger, "a", 1, 2, 3), server_round=number), WIDE)
    shutil.rmtree(place / "ledger")
    shutil.copytree(copy / "ledger", place / "ledger")
    with pytest.raises(LedgerRolledBack):
        again(place).book()


def test_an_old_copy_of_both_places_is_not_noticed(place):
    """As the store's docstring and the docs say: this is what the second place is for."""
    used(place, charges=1)
    copy = place.parent / f"{place.name}-copy"
    shutil.copytree(place, copy)
    ledger = again(place)
    ledger.charge(request(admit(ledger, "a", 1, 2, 3), server_round=2), WIDE)
    assert steps_of(again(copy)) == 2


def test_the_head_of_another_ledger_is_refused(place):
    used(place)
    other = place / "other"
    other.mkdir()
    used(other)
    shutil.copy(head_of(other), head_of(place))
    with pytest.raises(LedgerError, match="is the head of another ledger"):
        again(place).book()


def test_a_missing_head_is_refused(place):
    used(place)
    head_of(place).unlink()
    with pytest.raises(LedgerError, match=r"its head .*head.json is missing; put it back"):
        again(place).book()


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{", '{"ledger": "x"}', "\xff", "1e999", "[" * 100_000, "{}",
     '{"ledger": 1, "entries": 1, "seal": ""}', '{"ledger": "x", "entries": -1, "seal": ""}',
     '{"ledger": "x", "entries": Infinity, "seal": ""}',
     '{"ledger": "x", "entries": true, "seal":""}',
     '{"ledger": "x", "entries": "5", "seal": ""}', '{"ledger": "x", "entries": 5.0, "seal": ""}'],
)  # fmt: skip
def test_a_damaged_head_is_refused(place, text):
    used(place)
    head_of(place).write_text(text, encoding="latin-1")
    with pytest.raises(LedgerError, match=r"its head .* is damaged"):
        again(place).book()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(at=st.integers(0), change=st.integers(1, 255))
def test_any_changed_byte_of_the_head_is_refused_or_says_the_same(place, at, change):
    if not (place / "ledger").exists():
        used(place)
    whole = head_of(place).read_bytes()
    raw = bytearray(whole)
    raw[at % len(raw)] ^= change
    head_of(place).write_bytes(bytes(raw))
    try:
        assert steps_of(again(place)) == 6
        assert json.loads(raw) == json.loads(whole)  # a blank instead of the line's end
    except LedgerError:
        pass
    finally:
        head_of(place).write_bytes(whole)


def test_a_head_that_others_could_change_is_refused(place):
    used(place)
    head_of(place).chmod(0o666)
    with pytest.raises(LedgerError, match=r"others could change its head .* its mode is 0666"):
        again(place).book()


def test_a_ledger_ahead_of_its_head_is_the_trace_of_a_crash(place, monkeypatch):
    ledger = used(place, charges=1)
    before = head_of(place).read_bytes()

    def crash(*_args):
        raise KeyboardInterrupt

    records = admit(ledger, "a", 1, 2, 3)
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_atomically", crash)
        with pytest.raises(KeyboardInterrupt):
            ledger.charge(request(records, server_round=2), WIDE)
    assert head_of(place).read_bytes() == before
    assert steps_of(again(place)) == 4, "the charge was on disk: it counts"
    ledger.charge(request(records, server_round=3), WIDE)
    head = json.loads(head_of(place).read_bytes())
    assert head["entries"] == 5 and steps_of(again(place)) == 6


def test_a_head_that_cannot_be_written_gives_no_charge_and_loses_none(place, monkeypatch):
    ledger = used(place, charges=1)
    records = admit(ledger, "a", 1, 2, 3)
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_atomically", _full_disk)
        with pytest.raises(LedgerError, match="No space left on device"):
            ledger.charge(request(records, server_round=2), WIDE)
    assert steps_of(again(place)) == 4


def _full_disk(*_args):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("crash_at", range(12))
def test_creation_that_was_cut_off_can_be_done_again(place, monkeypatch, crash_at):
    """Cut off before its n-th step to the disk, it leaves no ledger, or a whole empty one."""
    steps = []

    def counted(function):
        def call(*args, **kwargs):
            steps.append(function.__name__)
            if len(steps) > crash_at:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "open", "mkdir", "rename", "replace"):
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            new_ledger(place)
            cut_off = False
        except KeyboardInterrupt:
            cut_off = True
    assert cut_off == (crash_at < len(steps))
    if cut_off and not (place / "ledger" / "ledger.sqlite").exists():
        with pytest.raises(LedgerError):
            again(place).book()
        new_ledger(place)
    ledger = again(place)
    assert ledger.book().plans == {}
    ledger.charge(request(admit(ledger, "a", 1)), WIDE)
    assert steps_of(again(place)) == 2


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701, 0o777])
def test_a_folder_that_is_open_to_others_is_refused(place, mode):
    used(place)
    (place / "ledger").chmod(mode)
    with pytest.raises(LedgerError, match=rf"its mode is {mode:04o}; accepted is .* 0700"):
        again(place).book()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_folder_of_another_user_is_refused(place):
    used(place)
    os.chown(place / "ledger", 4711, 4711)
    with pytest.raises(LedgerError, match="it belongs to another user"):
        again(place).book()


def test_a_lost_damaged_or_foreign_key_is_refused_where_it_is_needed(place):
    used(place)
    key = place / "ledger" / "key"
    secret = key.read_bytes()
    for content, match in ((b"short", "its key is damaged"), (b"x" * 32, "another ledger's")):
        key.write_bytes(content)
        with pytest.raises(LedgerError, match=match):
            admit(again(place), "b", 1)
    key.unlink()
    with pytest.raises(LedgerError, match="its key cannot be read"):
        admit(again(place), "b", 1)
    key.write_bytes(secret)
    admit(again(place), "b", 1)
    assert again(place).book().group("b") == {"a", "b"}


def test_a_format_of_another_version_is_refused(place):
    used(place)
    connection = sqlite3.connect(place / "ledger" / "ledger.sqlite", isolation_level=None)
    connection.execute("update ledger set format = 2")
    connection.close()
    with pytest.raises(LedgerError, match="not a ledger of format 1"):
        again(place).book()


@pytest.mark.parametrize(
    "statement",
    [
        "update entries set body = replace(body, '\"steps\":2', '\"steps\":1') where number = 3",
        "update entries set kind = 'dataset' where number = 3",
        "update entries set seal = x'00' where number = 3",
        "update entries set seal = 'text' where number = 3",
        "update entries set body = x'00' where number = 3",
        "update entries set number = 9 where number = 3",
        "delete from entries where number = 3",
        "delete from entries where number = 5",
        "delete from entries",
        "delete from ledger",
        "update ledger set id = 'another'",
        "insert into ledger values (1, 'another')",
        "drop table entries",
    ],
)
def test_a_changed_table_is_refused(place, statement):
    used(place)
    connection = sqlite3.connect(place / "ledger" / "ledger.sqlite", isolation_level=None)
    connection.execute(statement)
    connection.close()
    with pytest.raises(LedgerError):
        again(place).book()
    with pytest.raises(LedgerError):
        again(place).charge(request("r", server_round=4), WIDE)


@pytest.mark.parametrize(
    "statement",
    [
        "delete from records where rowid_less = 1",
        "delete from records",
        "delete from records where hash = (select min(hash) from records)",
        "update records set dataset = 'c' where hash = (select min(hash) from records)",
        "update records set hash = x'00' where hash = (select min(hash) from records)",
        "insert into records values (x'00', 'a')",
        "insert into records values (x'00', 'unknown')",
    ],
)
def test_changed_record_hashes_are_refused_when_they_are_asked(place, statement):
    ledger = used(place)
    connection = sqlite3.connect(place / "ledger" / "ledger.sqlite", isolation_level=None)
    if "rowid_less" in statement:
        statement = "drop table records"
    connection.execute(statement)
    connection.close()
    with pytest.raises(LedgerError):
        admit(ledger, "b", 1)
    assert "b" not in ledger.book().holdings
