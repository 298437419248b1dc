"""Kill -9 at 200 points of a client's round: nothing released is ever missing from the ledger."""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from client_app.round_handler import handle_train
from privacy import Ledger
from tests.client_app.deployed import Deployed, deploy, released

ROOT = Path(__file__).resolve().parents[2]
_ALONE = "DP_LORA_TEST_OF_KILLS"
STEPS = 2
ROUNDS = 1000
# Where a child is killed, and how often: from this word of its report on, within so many seconds.
KILLS = {"any time": 60, "charging": 50, "kept": 30, "between lines of the ledger": 60}
SOON = {"charging": 0.03, "kept": 0.003}
_WATCHED = ("/privacy/ledger/", "/privacy/files.py")


def play(
    site, deployed: Deployed, first: int, report: int, *, die_at: int = 0, linger: float = 0
) -> None:
    """Play rounds until killed; say what was charged, kept and sent, each after it was done."""

    def tell(*words: object) -> None:
        os.write(report, (json.dumps(words) + "\n").encode())

    charge, keep = Ledger.charge, Ledger.keep

    def charging(self, request, limits):
        tell("charging")
        result = charge(self, request, limits)
        tell("charged", request.server_round, result.request, result.steps)
        return result

    def keeping(self, paid, reply):
        keep(self, paid, reply)
        tell("kept", hashlib.sha256(reply).hexdigest())
        time.sleep(linger)  # between storing and sending there is little time to be killed in

    Ledger.charge, Ledger.keep = charging, keeping  # this process lives for this only
    context = deployed.context()
    for server_round in range(first, first + 50):
        tell("round", server_round)
        if die_at:
            sys.settrace(_killer(die_at))
        reply = handle_train(site.message(server_round=server_round), context)
        sys.settrace(None)
        content = released(reply)
        assert content is not None, reply.error
        tell("sent", server_round, hashlib.sha256(content).hexdigest())


def _killer(line: int):
    """A trace that kills this process at the n-th line that it runs in the ledger's files."""
    seen = 0

    def trace(frame, event, _argument):
        nonlocal seen
        if not any(part in frame.f_code.co_filename for part in _WATCHED):
            return None
        seen += event == "line"
        if seen >= line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


class Trial:
    """One child from its start to its end by SIGKILL."""

    running: ClassVar[set[int]] = set()

    def __init__(
        self, site, deployed: Deployed, first: int, *, die_at: int = 0, linger: float = 0
    ) -> None:
        self.told: list[list] = []
        self._rest = b""
        self._read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self._read)
                play(site, deployed, first, write, die_at=die_at, linger=linger)
            finally:
                os._exit(1)
        os.close(write)
        self.running.add(self.pid)

    def listen(self, until: str, seconds: float) -> bool:
        """Take reports until one begins with this word; whether it came in time."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if not select.select([self._read], [], [], left)[0]:
                break
            if not self._take():
                return False
            if any(words[0] == until for words in self.told):
                return True
        return False

    def kill(self) -> bool:
        """Kill it, unless it did so itself; whether that is what it died of."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self) -> bool:
        while self._take():
            pass
        os.close(self._read)
        status = os.waitpid(self.pid, 0)[1]
        self.running.discard(self.pid)
        return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL

    def _take(self) -> bool:
        data = os.read(self._read, 65536)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.told += [json.loads(line) for line in lines]
        return bool(data)


def lines_of_a_round(site, deployed: Deployed, server_round: int) -> int:
    """How many lines a round runs in the ledger's files."""
    seen = 0

    def trace(frame, event, _argument):
        nonlocal seen
        if not any(part in frame.f_code.co_filename for part in _WATCHED):
            return None
        seen += event == "line"
        return trace

    sys.settrace(trace)
    assert released(handle_train(site.message(server_round=server_round), deployed.context()))
    sys.settrace(None)
    return seen


@pytest.fixture
def no_child_outlives_the_test():
    yield
    for pid in Trial.running:  # a test that failed left one behind
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    Trial.running.clear()


@pytest.mark.slow
@pytest.mark.skipif(_ALONE in os.environ, reason="is the process that the test started")
def test_killed_at_200_points_a_client_loses_no_charge():
    """In a process that never had threads: a child of fork has none, and would wait for them."""
    environment = {**os.environ, _ALONE: "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", __file__],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 1 skipped" in done.stdout
    print(next(line for line in done.stdout.splitlines() if " kills in " in line))


@pytest.mark.skipif(_ALONE not in os.environ, reason="runs in a process that the other test starts")
@pytest.mark.usefixtures("no_child_outlives_the_test")
def test_nothing_released_is_missing_after_a_kill(site, tmp_path: Path):
    """What was charged and sent is told over a pipe, and compared with what is left on disk."""
    assert torch.get_num_threads() == 1
    deployed = deploy(tmp_path, site.config, max_epsilon=1e6)
    deployed.config["strategy.num-rounds"] = ROUNDS
    handle_train(site.message(server_round=1), deployed.context())  # model, engine, noise
    start = time.monotonic()
    assert released(handle_train(site.message(server_round=2), deployed.context()))
    usual = time.monotonic() - start
    lines = lines_of_a_round(site, deployed, 3)
    generator = random.Random(2026)
    paid, hit, kept_and_killed, next_round = 6, dict.fromkeys(KILLS, 0), 0, 4
    began = time.monotonic()
    for way in [way for way, number in KILLS.items() for _ in range(number)]:
        if way == "between lines of the ledger":
            # Without the lines that only read: most of a round's are the chain's check.
            trial = Trial(site, deployed, next_round, die_at=generator.randrange(1, lines))
            dead = trial.wait()
        else:
            trial = Trial(site, deployed, next_round, linger=0.05 * (way == "kept"))
            if way == "any time":
                trial.listen("never said", generator.uniform(0, 1.3 * usual))
            else:
                assert trial.listen(way, 60)
                time.sleep(generator.uniform(0, SOON[way]))
            dead = trial.kill()
        assert dead, trial.told
        hit[way] += 1
        paid, again = check(site, deployed, trial, paid)
        kept_and_killed += again
        next_round = 1 + max([next_round - 1, *(w[1] for w in trial.told if w[0] == "round")])
    print(f"{hit} kills in {time.monotonic() - began:.0f} s; round {usual:.2f} s, {lines} lines")
    assert sum(hit.values()) == 200 and hit == KILLS
    assert kept_and_killed >= 20, "few kills fell between storing a reply and the next round"


def check(site, deployed: Deployed, trial: Trial, before: int) -> tuple[int, bool]:
    """Look at the ledger as the client's next process finds it; go on with the open round."""
    book = deployed.ledger.book()  # verifies the chain against its head
    charged = [words for words in trial.told if words[0] == "charged"]
    sent = {words[1]: words[2] for words in trial.told if words[0] == "sent"}
    steps = sum(plan.steps for plan in book.plans.values())
    assert steps >= before + sum(words[3] for words in charged), "a charge was lost"
    assert all(words[2] in book.requests for words in charged)
    assert steps >= before + STEPS * len(sent), "less than what was released"
    rounds = [words[1] for words in trial.told if words[0] == "round"]
    if not rounds:
        return steps, False
    of_last = trial.told[trial.told.index(["round", rounds[-1]]) :]
    kept = [words[1] for words in of_last if words[0] == "kept"]
    digests = []
    for _ in range(2):  # the server asks again for the round that it got no answer to, twice
        reply = handle_train(site.message(server_round=rounds[-1]), deployed.context())
        content = released(reply)
        assert content is not None, reply.error
        digests.append(hashlib.sha256(content).hexdigest())
    after = deployed.steps()
    assert digests[0] == digests[1], "a repeated message got other bytes"
    if kept:
        assert digests[0] == kept[0] == sent.get(rounds[-1], kept[0])
        assert after == steps, "a stored reply was paid for again"
    assert after in (steps, steps + STEPS)
    return after, bool(kept)
