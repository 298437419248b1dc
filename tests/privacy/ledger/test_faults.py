"""Two processes at once, a full disk, a file that was corrupted: never fewer charges."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privacy import BudgetLimit, Ledger, LedgerError
from privacy.files import write_atomically
from privacy.ledger import BudgetExhausted
from privacy.ledger import store as store_module
from tests.privacy.ledger.accounts import WIDE, admit, new_ledger, request, steps_of

ROOT = Path(__file__).parents[3]
CHARGING = """
import sys
from pathlib import Path
from privacy import BudgetExhausted, Ledger
from tests.privacy.ledger.accounts import WIDE, admit, request
ledger = Ledger(Path(sys.argv[1]), Path(sys.argv[2]))
records = admit(ledger, "a", 1, 2)
print("ready", flush=True)
sys.stdin.readline()
paid = 0
for number in range(int(sys.argv[4])):
    asked = request(records, training=sys.argv[3], server_round=number + 1, steps=1)
    try:
        paid += ledger.charge(asked, WIDE).steps
    except BudgetExhausted:
        pass
print(paid)
"""


def places(folder: Path) -> tuple[Path, Path]:
    return folder / "ledger", folder / "second" / "head.json"


def started(folder: Path, training: str, charges: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHARGING, *map(str, places(folder)), training, str(charges)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def paid_by(processes: list[subprocess.Popen[str]]) -> list[int]:
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:  # all at once
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    return [int(process.communicate(timeout=120)[0]) for process in processes]


def test_processes_that_charge_at_once_lose_nothing(tmp_path):
    new_ledger(tmp_path)
    paid = paid_by([started(tmp_path, training, 15) for training in ("one", "two")])
    ledger = Ledger(*places(tmp_path))
    assert paid == [15, 15]
    assert sorted(plan.steps for plan in ledger.book().plans.values()) == [15, 15]


def test_processes_that_charge_one_plan_at_once_do_not_exceed_it(tmp_path):
    new_ledger(tmp_path)
    paid = paid_by([started(tmp_path, "same", 15) for _ in range(2)])
    assert sum(paid) == 20 == steps_of(Ledger(*places(tmp_path)))


def test_a_ledger_that_is_held_too_long_refuses(tmp_path, monkeypatch):
    ledger = new_ledger(tmp_path)
    monkeypatch.setattr(store_module, "LOCK_SECONDS", 0.1)
    with (
        Ledger(*places(tmp_path))._store.transaction(),
        pytest.raises(LedgerError, match=r"another process has held it for 0\.1 s"),
    ):
        ledger.book()
    assert ledger.book().plans == {}


# --- a full disk ---------------------------------------------------------------------------------


@contextlib.contextmanager
def files_of_at_most(size: int):
    """No file of this process can grow beyond: what a full disk looks like to SQLite and to us."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 1, 32, 100, 4096, 8192, 16384, 32768, 65536])
def test_on_a_full_disk_a_charge_is_refused_or_whole(tmp_path, size):
    ledger = new_ledger(tmp_path)
    records = admit(ledger, "a", 1)
    ledger.charge(request(records), WIDE)
    paid = 2
    for number in range(2, 6):
        with files_of_at_most(size):
            try:
                paid += ledger.charge(request(records, server_round=number, steps=1), WIDE).steps
            except LedgerError:
                assert size < 65536
        shown = steps_of(Ledger(*places(tmp_path)))
        assert shown >= paid
        paid = shown  # it was refused after it was on disk: that costs budget
    ledger.charge(request(records, server_round=9), WIDE)
    assert steps_of(ledger) == paid + 2


def test_a_full_disk_at_the_commit_is_refused_and_nothing_half_written(tmp_path, monkeypatch):
    ledger = new_ledger(tmp_path)
    records = admit(ledger, "a", 1)

    failing = "insert into entries"

    class Full(sqlite3.Connection):
        """What SQLite does on a full disk: it ends the transaction by itself, and says so."""

        def execute(self, statement, *values):
            if statement.startswith(failing):
                super().execute("rollback")
                raise sqlite3.OperationalError("database or disk is full")
            return super().execute(statement, *values)

    connect = sqlite3.connect
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, factory=Full, **k))
        with pytest.raises(LedgerError, match="database or disk is full"):
            ledger.charge(request(records), WIDE)
        failing = "commit"
        with pytest.raises(LedgerError, match="database or disk is full"):
            ledger.charge(request(records), WIDE)
    assert ledger.book().plans == {}
    ledger.charge(request(records), WIDE)
    assert steps_of(ledger) == 2


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write_atomically(path, b"before")

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    if step == "write":
        with files_of_at_most(3), pytest.raises(OSError, match="File too large"):
            write_atomically(path, b"afterwards")
    else:
        with monkeypatch.context() as patch:
            patch.setattr(os, step, full)
            with pytest.raises(OSError, match="No space"):
                write_atomically(path, b"afterwards")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"afterwards")
    assert path.read_bytes() == b"afterwards"


# --- a corrupted file ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Used:
    """A ledger with charges, some of which are in the write-ahead log only."""

    folder: Path
    file: bytes = dataclasses.field(repr=False)
    log: bytes = dataclasses.field(repr=False)
    records: str
    charged: int


@pytest.fixture(scope="module")
def used(tmp_path_factory) -> Used:
    folder = tmp_path_factory.mktemp("used")
    ledger = new_ledger(folder)
    records = admit(ledger, "a", *range(400))
    for number in range(1, 6):
        ledger.charge(request(records, server_round=number), WIDE)
    file = folder / "ledger" / "ledger.sqlite"
    kept_open = sqlite3.connect(file)  # while somebody reads, closing does not empty the log
    kept_open.execute("begin")
    kept_open.execute("select * from ledger").fetchall()
    for number in range(6, 9):
        ledger.charge(request(records, server_round=number), WIDE)
    content = file.read_bytes(), file.with_name("ledger.sqlite-wal").read_bytes()
    kept_open.close()
    assert len(content[1]) > 10_000
    return Used(folder, *content, records, 16)


def check_damaged(folder: Path, used: Used, file: bytes, log: bytes) -> bool:
    """A damaged ledger refuses, or shows every charge and finds every overlap."""
    records, charged = used.records, used.charged
    shutil.rmtree(folder / "ledger", ignore_errors=True)
    shutil.copytree(used.folder / "ledger", folder / "ledger")
    shutil.copytree(used.folder / "second", folder / "second", dirs_exist_ok=True)
    path = folder / "ledger" / "ledger.sqlite"
    path.write_bytes(file)
    path.with_name("ledger.sqlite-wal").write_bytes(log)
    ledger = Ledger(*places(folder))
    try:
        assert steps_of(ledger) == charged
        assert ledger.charge(request(records, server_round=99), WIDE).charged == charged + 2
        admit(ledger, "b", 399)
        assert ledger.book().group("b") == {"a", "b"}
        assert steps_of(ledger) == charged + 2
    except LedgerError:
        return False
    return True


def test_the_undamaged_copy_works(used, tmp_path):
    assert check_damaged(tmp_path, used, used.file, used.log)


@pytest.mark.parametrize("which", ["file", "log"])
@pytest.mark.parametrize("kind", ["one byte", "a page", "zeros"])
def test_random_damage_is_refused_or_harmless(used, tmp_path, which, kind):
    generator = random.Random(f"{which} {kind}")
    refused = 0
    for _ in range(40):
        contents = {"file": bytearray(used.file), "log": bytearray(used.log)}
        damaged = contents[which]
        place = generator.randrange(len(damaged))
        if kind == "one byte":
            damaged[place] ^= generator.randrange(1, 256)
        else:
            length = min(512, len(damaged) - place)
            damaged[place : place + length] = (
                bytes(length) if kind == "zeros" else generator.randbytes(length)
            )
        refused += not check_damaged(
            tmp_path, used, bytes(contents["file"]), bytes(contents["log"])
        )
    assert refused > 0


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(share=st.floats(0, 1), which=st.sampled_from(["file", "log"]))
def test_a_file_that_was_cut_off_is_refused_or_harmless(used, tmp_path, share, which):
    file, log = used.file, used.log
    if which == "file":
        check_damaged(tmp_path, used, file[: int(share * len(file))], log)
    else:
        whole = check_damaged(tmp_path, used, file, log[: int(share * len(log))])
        assert not whole or share > 0.5, "what the log held is missing"


def test_a_lost_log_is_a_rollback(used, tmp_path):
    assert not check_damaged(tmp_path, used, used.file, b"")


def test_another_file_is_no_ledger(used, tmp_path):
    for content in (b"", b"text", os.urandom(8192), b"SQLite format 3\0" + bytes(4096)):
        assert not check_damaged(tmp_path, used, content, b"")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    ledger = new_ledger(tmp_path)
    records = admit(ledger, "a", 1)
    (tmp_path / "ledger").chmod(0o500)
    try:
        with pytest.raises(LedgerError):
            ledger.charge(request(records), WIDE)
    finally:
        (tmp_path / "ledger").chmod(0o700)
    assert ledger.book().plans == {}


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(30, "Read-only")])
def test_files_that_may_not_be_written_are_refused(tmp_path, monkeypatch, error):
    ledger = new_ledger(tmp_path)
    records = admit(ledger, "a", 1)

    def refuse(*_args, **_kwargs):
        raise error

    for where in ("filelock.FileLock.acquire", "sqlite3.connect"):
        with monkeypatch.context() as patch:
            patch.setattr(where, refuse)
            with pytest.raises(LedgerError):
                ledger.charge(request(records), WIDE)
    assert ledger.book().plans == {}


def test_the_budget_holds_after_any_of_it(tmp_path):
    """A refusal for a fault is no refusal for the budget: the next try meets the same limit."""
    ledger = new_ledger(tmp_path)
    records = admit(ledger, "a", 1)
    with files_of_at_most(0), pytest.raises(LedgerError):
        ledger.charge(request(records), {"a": BudgetLimit(1e-3, 1e-5)})
    with pytest.raises(BudgetExhausted):
        ledger.charge(request(records), {"a": BudgetLimit(1e-3, 1e-5)})
