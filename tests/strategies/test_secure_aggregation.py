"""Secure aggregation in this process: exact sums, drop-outs at each stage, what stays secret."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from strategies import SECURE_KEY, MaskLimits, ProtocolError, SecureAggregation, answer_stage
from strategies.replies import InvalidReply
from strategies.secure_aggregation import client as client_side
from strategies.secure_aggregation import crypto, masked_records, shamir
from tests.fake_grid import FakeGrid

SHAPES = {"a": (3, 5), "b": (7,)}
COUNT = 22


class Plain:
    """A mechanism without noise: sums come out as they are."""

    unit, guards_against, secure, noise_std, scale = "a client", "nobody", True, 0.0, 1.0

    def __init__(self, least: int = 3, most: int = 10) -> None:
        self.least, self.most, self.charged = least, most, 0

    def draw(self, server_round, candidates):
        return np.ones(candidates, bool)

    def charge(self):
        self.charged += 1

    def decode(self, total, clients):
        return total.astype(np.float64)


class Party:
    """An honest client that goes away before the stage ``leaves``."""

    def __init__(self, number: int, leaves: str = "", limits: MaskLimits | None = None) -> None:
        generator = np.random.default_rng(number)
        self.vector = generator.integers(0, 2**32, COUNT, dtype=np.uint32)
        self.leaves, self.limits = leaves, limits or MaskLimits(3, 10)
        self.answers: list[RecordDict] = []

    def __call__(self, message: Message, context) -> Message:
        stage = message.content[SECURE_KEY]["stage"]
        if stage == self.leaves:
            return Message(Error(code=1, reason="away"), reply_to=message)
        content = answer_stage(message, context.state, context.node_id, self.limits)
        if content is None:
            records = masked_records(
                message, context.state, context.node_id, self.limits, self.vector
            )
            content = RecordDict(records)
        self.answers.append(content)
        return Message(content, reply_to=message)


def begin(parties, *, least: int = 3, grid_type=FakeGrid):
    grid = grid_type(parties)
    secure = SecureAggregation(Plain(least))
    nodes, record = secure.open(grid, 1, grid.get_node_ids(), timeout=5)
    return grid, secure, nodes, record


def train(grid, secure, nodes, record) -> list[int]:
    """Stage 3 as a strategy has it; the nodes whose vectors came."""
    came = []
    for node in nodes:
        content = RecordDict({SECURE_KEY: record})
        message = Message(content, message_type="train", dst_node_id=node)
        (reply,) = grid.send_and_receive([message])
        if not reply.has_error():
            secure.take(node, reply, SHAPES)
            came.append(node)
    return came


def run(parties, **options):
    grid, secure, nodes, record = begin(parties, **options)
    came = train(grid, secure, nodes, record)
    return secure.finish(), came, secure


def plain_sum(parties, came) -> np.ndarray:
    total = np.zeros(COUNT, np.uint32)
    for node in came:
        total = total + parties[node - 1].vector
    return total


# Sums.


@pytest.mark.parametrize("count", [3, 4, 7, 10])
def test_the_sum_is_exact(count):
    parties = [Party(n) for n in range(count)]
    total, came, secure = run(parties)
    assert came == list(range(1, count + 1))
    assert np.array_equal(total, plain_sum(parties, came))
    assert secure.clients == count and secure.mechanism.charged == 1


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(["", "", "advertise", "share", "mask", "unmask"]), min_size=3,
             max_size=8),
)  # fmt: skip
def test_whoever_goes_away_whenever_the_sum_is_exact_or_refused(leaving):
    parties = [Party(n, leaves) for n, leaves in enumerate(leaving)]
    total, came, _ = run(parties)
    advertised = [p for p in parties if p.leaves != "advertise"]
    shared = [p for p in advertised if p.leaves != "share"]
    masked = [p for p in shared if p.leaves != "mask"]
    stayed = [p for p in masked if p.leaves != "unmask"]
    threshold = max(3, len(advertised) // 2 + 1)
    if len(advertised) < 3 or min(map(len, (shared, masked, stayed))) < threshold:
        assert total is None
    else:
        assert np.array_equal(total, plain_sum(parties, came))
        assert len(came) == len(masked)


@pytest.mark.parametrize("stage", ["advertise", "share", "mask", "unmask"])
@pytest.mark.parametrize("away", [1, 2])
def test_a_drop_out_at_each_stage_is_recovered(stage, away):
    parties = [Party(n, stage if n < away else "") for n in range(6)]
    total, came, _ = run(parties)
    expected = [n for n in range(1, 7) if stage == "unmask" or n > away]
    assert came == expected
    assert np.array_equal(total, plain_sum(parties, came))


@pytest.mark.parametrize("stage", ["advertise", "share", "mask", "unmask"])
def test_below_the_least_number_a_round_is_refused(stage, caplog):
    parties = [Party(n, stage if n < 3 else "", MaskLimits(4, 10)) for n in range(6)]
    with caplog.at_level(logging.WARNING, logger="flwr"):
        total, came, secure = run(parties, least=4)
    assert total is None
    assert secure.mechanism.charged == (stage in ("mask", "unmask"))
    if stage in ("advertise", "share"):
        assert came == []  # nobody is even asked for a vector
    if stage == "mask":  # nobody is asked to unmask
        assert not any("shares" in a.get(SECURE_KEY, {}) for p in parties for a in p.answers)


# What the server sees.


def test_a_single_masked_vector_looks_uniform_and_tells_nothing_of_what_is_in_it():
    """Bytes of two masked constants: chi-square, and no correlation (fixed vectors)."""
    for value in (0, 7):
        parties = [Party(n) for n in range(4)]
        for party in parties:
            party.vector = np.full(20_000, value, np.uint32)
        grid, _, nodes, record = begin(parties)
        message = Message(RecordDict({SECURE_KEY: record}), message_type="train", dst_node_id=1)
        (reply,) = grid.send_and_receive([message])
        data = np.frombuffer(reply.content["arrays"]["masked"].data, np.uint8)
        assert stats.chisquare(np.bincount(data, minlength=256)).pvalue > 1e-5
        assert len(nodes) == 4


def test_equal_vectors_are_masked_differently_in_every_session_and_by_every_client():
    seen = []
    for _ in range(2):
        parties = [Party(0) for _ in range(3)]
        run(parties)
        seen += [p.answers[2]["arrays"]["masked"].data for p in parties]
    assert len(set(seen)) == 6


def sent_secrets(parties) -> bytes:
    """Everything that clients said, as bytes."""
    return b"".join(
        value if isinstance(value, bytes) else b"".join(value)
        for party in parties
        for answer in party.answers
        for value in answer.get(SECURE_KEY, {}).values()
        if isinstance(value, bytes | list)
    )


def test_no_secret_leaves_a_client_in_the_clear():
    parties = [Party(n) for n in range(4)]
    grid, secure, nodes, record = begin(parties)
    kept = [dict(c.state[SECURE_KEY]) for c in grid.contexts]
    train(grid, secure, nodes, record)
    assert secure.finish() is not None
    said = sent_secrets(parties)
    for own in kept:
        for name in ("cipher-secret", "mask-secret", "self-mask"):
            assert own[name] not in said


def test_only_one_of_both_shares_of_a_client_is_ever_given():
    """Own mask of those that came, mask key of those that did not: never both of one."""
    parties = [Party(n, "mask" if n == 0 else "") for n in range(5)]
    grid, secure, nodes, record = begin(parties)
    kept = {c.node_id: dict(c.state[SECURE_KEY]) for c in grid.contexts}
    train(grid, secure, nodes, record)
    assert secure.finish() is not None
    shares = {n: parties[n - 1].answers[-1][SECURE_KEY]["shares"] for n in (2, 3, 4, 5)}
    for place, node in enumerate(nodes):
        secret = shamir.join({n: shares[n][place] for n in (2, 3, 4)})
        assert secret == kept[node]["mask-secret" if node == 1 else "self-mask"]


def test_fewer_shares_than_the_threshold_give_another_secret():
    secret = crypto.new_secret()
    shares = dict(enumerate(shamir.split(secret, 7, 4), 1))
    for some in itertools.combinations(shares, 4):
        assert shamir.join({n: shares[n] for n in some}) == secret
    for some in itertools.combinations(shares, 3):
        try:
            assert shamir.join({n: shares[n] for n in some}) != secret
        except ValueError:  # not even 32 bytes
            continue


def test_a_share_below_the_threshold_is_uniform_whatever_the_secret():
    """Low bytes of one share of two fixed secrets; false alarms: 1 in 100,000 each."""
    for secret in (bytes(32), b"\xff" * 32):
        low = [shamir.split(secret, 2, 2)[0][-1] for _ in range(5_000)]
        assert stats.chisquare(np.bincount(low, minlength=256)).pvalue > 1e-5


@pytest.mark.parametrize(("count", "threshold"), [(3, 0), (3, 4)])
def test_a_threshold_that_cannot_be_is_refused(count, threshold):
    with pytest.raises(ValueError, match="threshold"):
        shamir.split(bytes(32), count, threshold)


# What a client refuses.


class Tampering(FakeGrid):
    """A server that changes messages of one stage."""

    stage, change = "", staticmethod(lambda record: None)

    def push_messages(self, messages):
        messages = list(messages)
        for message in messages:
            record = message.content[SECURE_KEY]
            if record["stage"] == self.stage:
                type(self).change(record)
        return super().push_messages(messages)


def tampering(where: str, what):
    return type("Grid", (Tampering,), {"stage": where, "change": staticmethod(what)})


def first_twice(key):
    def change(record):
        record[key] = [record[key][0], record[key][0], *record[key][2:]]

    return change


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("share", first_twice("nodes")),
        ("share", first_twice("mask-keys")),
        ("share", lambda r: r.update({"nodes": r["nodes"][:2]})),
        ("share", lambda r: r.update({"mask-keys": [bytes(31)] * 4})),
        ("share", lambda r: r.update({"session": "1-other"})),
        ("share", lambda r: r.update({"nodes": [f"{n}" for n in range(1, 12)]})),
        ("unmask", lambda r: r.update({"survivors": r["survivors"][:2]})),
        ("unmask", lambda r: r.update({"survivors": ["77", "78", "79"]})),
        ("unmask", lambda r: r.update({"ciphertexts": r["ciphertexts"][::-1]})),
        ("unmask", lambda r: r.update({"session": "1-other"})),
        ("unmask", lambda r: r.update({"stage": "tell-me-all"})),
    ],
)
def test_messages_of_no_honest_run_are_not_answered(stage, change):
    parties = [Party(n) for n in range(4)]
    total, _, _ = run(parties, grid_type=tampering(stage, change))
    assert total is None
    assert not any("shares" in a.get(SECURE_KEY, {}) for p in parties for a in p.answers)


def test_a_session_is_masked_once_and_unmasked_once():
    parties = [Party(n) for n in range(3)]
    grid, secure, nodes, record = begin(parties)
    train(grid, secure, nodes, record)
    context = grid.contexts[0]

    def send(content):
        message = Message(RecordDict({SECURE_KEY: content}), message_type="train", dst_node_id=1)
        return grid.send_and_receive([message])[0]

    assert "not at the stage 'shared'" in send(record).error.reason
    assert secure.finish() is not None
    assert SECURE_KEY not in context.state  # its secrets are gone
    last = next(m for m in reversed(grid.sent) if m.metadata.dst_node_id == 1)
    assert "not at the stage 'masked'" in send(last.content[SECURE_KEY]).error.reason


@pytest.mark.parametrize("sharers", [["2", "3", "4"], ["1", "2"], ["1", "2", "3", "9"]])
def test_a_vector_is_masked_for_this_sessions_clients_only(sharers):
    parties = [Party(n) for n in range(4)]
    grid, _, _, record = begin(parties)
    false = ConfigRecord({**record, "sharers": sharers})
    message = Message(RecordDict({SECURE_KEY: false}), message_type="train", dst_node_id=1)
    context = grid.contexts[0]
    with pytest.raises(ProtocolError, match=r"those of this session|take part"):
        masked_records(message, context.state, 1, MaskLimits(3, 10), parties[0].vector)


# What the server refuses.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop(SECURE_KEY), "secure aggregation"),
        (lambda c: c[SECURE_KEY].update({"session": "x"}), "secure aggregation"),
        (lambda c: c.pop("arrays"), "masked vector"),
        (lambda c: c.update({"arrays": ArrayRecord()}), "masked vector"),
        (lambda c: setattr(c["arrays"]["masked"], "data", b"1234"), "another length"),
    ],
)
def test_a_masked_vector_of_another_form_is_refused(change, words):
    parties = [Party(n) for n in range(4)]
    grid, secure, _, record = begin(parties)
    message = Message(RecordDict({SECURE_KEY: record}), message_type="train", dst_node_id=1)
    (reply,) = grid.send_and_receive([message])
    change(reply.content)
    with pytest.raises(InvalidReply, match=words):
        secure.take(1, reply, SHAPES)


def test_a_vector_counts_once_and_from_a_sharer_only():
    parties = [Party(n) for n in range(4)]
    grid, secure, _, record = begin(parties)
    message = Message(RecordDict({SECURE_KEY: record}), message_type="train", dst_node_id=1)
    (reply,) = grid.send_and_receive([message])
    secure.take(1, reply, SHAPES)
    for node in (1, 9):
        with pytest.raises(InvalidReply, match="was not to send"):
            secure.take(node, reply, SHAPES)


@pytest.mark.parametrize("leaves", ["", "mask"])
def test_wrong_shares_spoil_the_round_and_not_the_sum(leaves, caplog):
    """A helper's false share: the seed's digest, or the public key, tells."""

    class False_(Party):
        def __call__(self, message, context):
            reply = super().__call__(message, context)
            record = reply.content.get(SECURE_KEY, {}) if reply.has_content() else {}
            if "shares" in record:
                record["shares"] = [bytes(32) + b"\x01"] * len(record["shares"])
            return reply

    parties = [False_(0), *(Party(n) for n in (1, 2, 3)), Party(4, leaves)]
    with caplog.at_level(logging.WARNING, logger="flwr"):
        total, _, _ = run(parties)
    assert (total is None and "do not fit together" in caplog.text) or "no shares" in caplog.text


def test_more_nodes_than_registered_are_not_asked():
    grid, secure, nodes, _ = begin([Party(n) for n in range(11)])
    assert nodes == [] and grid.sent == [] and secure.mechanism.charged == 0


def test_keys_agree_on_both_sides_and_differ_by_purpose():
    one, two = crypto.new_secret(), crypto.new_secret()
    a = crypto.agree(one, crypto.public_key(two), "mask x")
    assert a == crypto.agree(two, crypto.public_key(one), "mask x")
    assert a != crypto.agree(one, crypto.public_key(two), "mask y")
    words = client_side.pair_mask(a, 50, adds=True) + client_side.pair_mask(a, 50, adds=False)
    assert not words.any()
    with pytest.raises(crypto.WrongKey):
        crypto.agree(one, bytes(32), "low order")
    with pytest.raises(crypto.WrongKey):
        crypto.unseal(a, crypto.seal(a, b"text")[:-1] + b"?")


def test_the_prime_is_one():
    import random

    generator = random.Random(0)
    odd, power = shamir.PRIME - 1, 0
    while odd % 2 == 0:
        odd, power = odd // 2, power + 1
    for _ in range(40):  # Miller-Rabin: wrong with probability 4^-40
        x = pow(generator.randrange(2, shamir.PRIME - 1), odd, shamir.PRIME)
        chain = [pow(x, 2**i, shamir.PRIME) for i in range(power)]
        assert chain[0] == 1 or shamir.PRIME - 1 in chain
