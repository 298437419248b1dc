"""The server's side of secure aggregation: it carries messages and learns a sum."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from logging import WARNING
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from ..exchange import exchange
from ..replies import Float64s, InvalidReply
from . import crypto, shamir
from .client import MASKED_KEY, MASKED_STYPE, SECURE_KEY, MaskLimits, pair_mask, pair_seed

Shapes = Mapping[str, tuple[int, ...]]
Answer = TypeVar("Answer")


class ModularMechanism(Protocol):
    """What makes a noised mean of a sum modulo 2^32; ``privacy.DistributedMechanism`` is one."""

    @property
    def unit(self) -> str:
        """What is protected."""
        ...

    @property
    def guards_against(self) -> str:
        """Against whom."""
        ...

    @property
    def scale(self) -> float:
        """Units in 1.0, which clients must agree on."""
        ...

    @property
    def least(self) -> int:
        """Fewest clients whose sum may be used."""
        ...

    @property
    def most(self) -> int:
        """Most clients that a sum has room for."""
        ...

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each value of the latest mean."""
        ...

    @property
    def of_gradients(self) -> bool:
        """Whether sums are of gradients, which the server steps by, and not of changes."""
        ...

    @property
    def secure(self) -> bool:
        """Whether nobody can reproduce the noise."""
        ...

    def draw(self, server_round: int, candidates: int) -> npt.NDArray[np.bool_]:
        """Say of each connected node whether the round asks it."""
        ...

    def charge(self) -> None:
        """Count a round, before any client is asked for its vector."""
        ...

    def decode(self, total: crypto.Words, clients: int) -> Float64s:
        """The mean that a sum of so many clients' vectors stands for."""
        ...


class SecureAggregation:
    """A strategy's ``client_level`` in which the server sees sums only.

    Parameters
    ----------
    mechanism : ModularMechanism
        Reads the sums; the noise in them is the clients' own.

    Notes
    -----
    Formal statement (Bonawitz et al. 2017, honest-but-curious): a server that keeps to the
    protocol, together with fewer than ``threshold`` clients, learns no more of the others' vectors
    than the sum over those that came, if X25519, HKDF, ChaCha20 and ChaCha20-Poly1305 are what
    they are held to be.  Not covered: a server that makes up clients or tells them different
    stories (keys are not signed, nor lists agreed on); what can be told from who drops out; a
    client that sends nonsense, which spoils a round's sum, as nobody can look at its vector.
    """

    def __init__(self, mechanism: ModularMechanism) -> None:
        self.mechanism = mechanism
        self._limits = MaskLimits(mechanism.least, mechanism.most)
        self._grid: Grid | None = None
        self._timeout = 0.0
        self._keys: dict[int, tuple[bytes, bytes]] = {}
        self._sealed: dict[int, list[bytes]] = {}
        self._digests: dict[int, bytes] = {}
        self._session = ""
        self._total: crypto.Words | None = None
        self._came: list[int] = []

    @property
    def unit(self) -> str:
        """What is protected."""
        return self.mechanism.unit

    @property
    def guards_against(self) -> str:
        """Against whom."""
        return self.mechanism.guards_against

    @property
    def secure(self) -> bool:
        """Whether nobody can reproduce the noise."""
        return self.mechanism.secure

    @property
    def of_gradients(self) -> bool:
        """Whether the noise stands in units of gradients and not of changes."""
        return self.mechanism.of_gradients

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each value of the latest mean."""
        return self.mechanism.noise_std

    def draw(self, server_round: int, candidates: int) -> npt.NDArray[np.bool_]:
        """Say of each connected node whether the round asks it."""
        return self.mechanism.draw(server_round, candidates)

    def open(
        self, grid: Grid, server_round: int, nodes: list[int], timeout: float
    ) -> tuple[list[int], ConfigRecord]:
        """Stages 1 and 2: collect keys and sealed shares.

        Returns
        -------
        tuple of list of int and ConfigRecord
            Nodes that may train, none if too few shared; and the record of their messages.
        """
        self._grid, self._timeout = grid, timeout
        self._session = f"{server_round}-{secrets.token_hex(16)}"
        self._keys, self._sealed, self._digests = {}, {}, {}
        self._total, self._came = None, []
        if len(nodes) > self._limits.most:
            log(WARNING, "%d nodes are more than privacy.registered-clients", len(nodes))
            nodes = []
        if len(nodes) >= self._limits.least:
            self._keys = self._ask({n: {"stage": "advertise"} for n in nodes}, _read_keys)
        if len(self._keys) >= self._limits.least:
            everybody = {
                "stage": "share",
                "nodes": [str(node) for node in self._keys],
                "cipher-keys": [cipher for cipher, _ in self._keys.values()],
                "mask-keys": [mask for _, mask in self._keys.values()],
            }
            answers = self._ask(dict.fromkeys(self._keys, everybody), self._read_shares)
            # In the order of the keys, which all clients know.
            self._sealed = {n: answers[n][0] for n in self._keys if n in answers}
            self._digests = {n: answers[n][1] for n in self._sealed}
        if len(self._sealed) < self._threshold:
            self._sealed = {}
        else:
            self.mechanism.charge()
        sharers = list(self._sealed)
        record = ConfigRecord(
            {
                "session": self._session,
                "stage": "mask",
                "sharers": [str(node) for node in sharers],
                "scale": self.mechanism.scale,
            }
        )
        return sharers, record

    def take(self, node: int, reply: Message, shapes: Shapes) -> None:
        """Stage 3: add a client's masked vector to the sum.

        Raises
        ------
        InvalidReply
            If it is of another form, or this node was not to send one.
        """
        count = sum(int(np.prod(shape)) for shape in shapes.values())
        record = reply.content.get(SECURE_KEY)
        arrays = reply.content.get("arrays")
        if not isinstance(record, ConfigRecord) or record.get("session") != self._session:
            raise InvalidReply("is not of this round's secure aggregation")
        if not isinstance(arrays, ArrayRecord) or list(arrays) != [MASKED_KEY]:
            raise InvalidReply(f"has no masked vector {MASKED_KEY!r} alone")
        array: Array = arrays[MASKED_KEY]
        if array.stype != MASKED_STYPE or len(array.data) != 4 * count:
            raise InvalidReply("its masked vector has another length than the round's tensors")
        if node not in self._sealed or node in self._came:
            raise InvalidReply("was not to send a masked vector")
        words = np.frombuffer(array.data, dtype="<u4").astype(np.uint32)
        self._total = words if self._total is None else self._total + words
        self._came.append(node)

    def finish(self) -> crypto.Words | None:
        """Stage 4: take the masks off the sum; ``None`` if too few clients are left for it."""
        survivors, total = sorted(self._came), self._total
        if total is None or len(survivors) < self._threshold:
            log(WARNING, "%d masked vectors came, %d must", len(survivors), self._threshold)
            return None
        messages = {node: self._unmask_message(node, survivors) for node in survivors}
        answers = self._ask(messages, self._read_unmasking)
        if len(answers) < self._threshold:
            log(WARNING, "%d clients unmask, %d must", len(answers), self._threshold)
            return None
        try:
            return total - self._masks(survivors, answers, len(total))
        except (ValueError, crypto.WrongKey) as error:
            log(WARNING, "The sum cannot be unmasked: %s", error)
            return None

    @property
    def clients(self) -> int:
        """Clients in the round's sum."""
        return len(self._came)

    @property
    def _threshold(self) -> int:
        return self._limits.threshold(len(self._keys))

    def _unmask_message(self, node: int, survivors: list[int]) -> dict[str, Any]:
        place = list(self._keys).index(node)
        return {
            "stage": "unmask",
            "survivors": [str(one) for one in survivors],
            "ciphertexts": [sealed[place] for sealed in self._sealed.values()],
        }

    def _masks(
        self, survivors: list[int], answers: Mapping[int, list[bytes]], count: int
    ) -> crypto.Words:
        """What is to be taken off: own masks of those that came, pairs with those that did not."""
        numbers = {node: place for place, node in enumerate(self._keys, 1)}
        helpers = sorted(answers)[: self._threshold]
        masks = np.zeros(count, np.uint32)
        for place, node in enumerate(self._sealed):
            secret = shamir.join({numbers[one]: answers[one][place] for one in helpers})
            if node in survivors:
                if crypto.digest(secret) != self._digests[node]:
                    raise ValueError("shares of a client's own mask do not fit together")
                masks = masks + crypto.mask(secret, count)
                continue
            if crypto.public_key(secret) != self._keys[node][1]:
                raise ValueError("shares of a client's mask key do not fit together")
            for other in survivors:
                seed = pair_seed(secret, self._keys[other][1], self._session)
                masks = masks + pair_mask(seed, count, adds=other < node)
        return masks

    def _ask(
        self, records: Mapping[int, dict[str, Any]], read: Callable[[ConfigRecord], Answer]
    ) -> dict[int, Answer]:
        """Send each node its record; what is read from the answers that are right, by node."""
        assert self._grid is not None
        messages = {
            node: Message(
                RecordDict({SECURE_KEY: ConfigRecord({**record, "session": self._session})}),
                message_type=MessageType.TRAIN,
                dst_node_id=node,
            )
            for node, record in records.items()
        }
        answers: dict[int, Answer] = {}
        for reply in exchange(
            self._grid, list(messages.values()), timeout=self._timeout, follow_up=lambda _: None
        ):
            # Flower gives a message its id when it is sent.
            of = {message.metadata.message_id: node for node, message in messages.items()}
            node = of.get(reply.metadata.reply_to_message_id)
            if node is None or node in answers:
                continue
            try:
                if reply.has_error():
                    raise ValueError(f"error code {reply.error.code}")
                record = reply.content.get(SECURE_KEY)
                if not isinstance(record, ConfigRecord) or record["session"] != self._session:
                    raise ValueError("an answer of another session")
                answers[node] = read(record)
            except (ValueError, KeyError, TypeError) as error:
                log(WARNING, "Secure aggregation goes on without node %d: %s", node, error)
        return {node: answers[node] for node in sorted(answers)}

    def _read_shares(self, record: ConfigRecord) -> tuple[list[bytes], bytes]:
        sealed = _byte_strings(record["ciphertexts"], len(self._keys))
        return sealed, _byte_strings([record["digest"]], 1)[0]

    def _read_unmasking(self, record: ConfigRecord) -> list[bytes]:
        return _byte_strings(record["shares"], len(self._sealed), shamir.SHARE_BYTES)


class SecureMean:
    """Stands where a strategy's running mean does; values come out after unmasking only.

    Parameters
    ----------
    secure : SecureAggregation
        The round's sum.
    shapes : mapping of str to tuple of int
        All tensors that the round trains.
    rates : mapping of str to float
        Learning rate of each, for sums of gradients: the change is one step of SGD by the mean.
    """

    def __init__(
        self, secure: SecureAggregation, shapes: Shapes, rates: Mapping[str, float]
    ) -> None:
        self.count = 0
        self._rates = rates if secure.mechanism.of_gradients else {}
        self._secure = secure
        self._shapes = dict(shapes)
        self._mean: dict[str, Float64s] = {}

    def add(self, update: Mapping[str, npt.NDArray[np.float32]], weight: float) -> None:
        """Count a client whose masked vector :meth:`SecureAggregation.take` added."""
        self.count += 1

    def close(self) -> bool:
        """Unmask; whether there is a mean to apply."""
        total = self._secure.finish()
        if total is None:
            return False
        values = self._secure.mechanism.decode(total, self._secure.clients)
        sizes = [int(np.prod(self._shapes[name])) for name in sorted(self._shapes)]
        parts = np.split(values, np.cumsum(sizes, dtype=int))
        names = sorted(self._shapes)
        self._mean = {n: p.reshape(self._shapes[n]) for n, p in zip(names, parts, strict=False)}
        for name, rate in self._rates.items():
            self._mean[name] = -rate * self._mean[name]
        return True

    def mean(self) -> dict[str, Float64s]:
        """The noised mean; empty before :meth:`close`."""
        return dict(self._mean)


def _read_keys(record: ConfigRecord) -> tuple[bytes, bytes]:
    keys = [record["cipher-key"], record["mask-key"]]
    cipher, mask = _byte_strings(keys, 2, crypto.KEY_BYTES)
    return cipher, mask


def _byte_strings(value: object, count: int, length: int | None = None) -> list[bytes]:
    if not isinstance(value, list) or len(value) != count:
        raise ValueError("an answer with another number of entries")
    for one in value:
        if not isinstance(one, bytes) or (length is not None and len(one) != length):
            raise ValueError("an answer with entries of another form")
    return value
