"""A client's side of secure aggregation: four messages a round.

1. ``advertise``: two fresh public keys, one for sealed shares, one for masks.
2. ``share``: everybody's keys; back go Shamir shares of the mask key and of a mask of its own,
   each sealed for one client.
3. ``mask`` (a record of the round's train message): who has shared; back goes the vector plus its
   own mask plus or minus one mask for each of them, modulo 2^32.
4. ``unmask``: whose vectors came, and the shares sealed for this client; back goes, for each
   client, *one* share: of its own mask if its vector came, else of its mask key.

Secrets stay in ``context.state`` from a round's first message to its last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from . import crypto, shamir

SECURE_KEY = "secure-aggregation"
"""Record of a message that belongs to secure aggregation."""
MASKED_KEY = "masked"
MASKED_STYPE = "dp_lora.masked"


class ProtocolError(ValueError):
    """A message that an honest server would not send, or that comes at the wrong time."""


@dataclasses.dataclass(frozen=True)
class MaskLimits:
    """What a client insists on, whatever the server says.

    Parameters
    ----------
    least : int
        Fewest clients in a sum.
    most : int
        Most clients in a sum.
    """

    least: int
    most: int

    def threshold(self, count: int) -> int:
        """Clients needed to unmask a sum of up to ``count``: ``least``, and more than half."""
        return max(self.least, count // 2 + 1)


def answer_stage(
    message: Message, state: RecordDict, node: int, limits: MaskLimits
) -> RecordDict | None:
    """Answer stages 1, 2 and 4; ``None`` for any other message.

    Parameters
    ----------
    message : Message
        What the server sent.
    state : RecordDict
        ``context.state``.
    node : int
        This client's own node id.
    limits : MaskLimits
        What this client insists on.

    Raises
    ------
    ProtocolError
        If the message is not of an honest run; nothing secret is answered then.
    """
    record = message.content.get(SECURE_KEY)
    if not isinstance(record, ConfigRecord) or record.get("stage") == "mask":
        return None
    stages = {"advertise": _advertise, "share": _share, "unmask": _unmask}
    stage = record.get("stage")
    if not isinstance(stage, str) or stage not in stages:
        raise ProtocolError(f"secure aggregation has no stage {stage!r}")
    try:
        answer = stages[stage](record, state, str(node), limits)
    except ProtocolError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"a message of stage {stage!r} cannot be used: {error}") from error
    return RecordDict({SECURE_KEY: answer})


def masked_records(
    message: Message,
    state: RecordDict,
    node: int,
    limits: MaskLimits,
    vector: crypto.Words,
) -> dict[str, ArrayRecord | ConfigRecord]:
    """Records of the answer to stage 3: this round's vector, masked; once a session.

    Parameters
    ----------
    vector : array of uint32
        What is to be summed modulo 2^32, noise included.

    Raises
    ------
    ProtocolError
        If too few clients take part, or this session's vector was sent already.
    """
    record = message.content.get(SECURE_KEY)
    if not isinstance(record, ConfigRecord):
        raise ProtocolError("the train message has no secure-aggregation record")
    try:
        own, nodes = _take(record, state, "shared")
        sharers = _names(record["sharers"])
        _check_members(sharers, nodes, str(node), limits.threshold(len(nodes)))
        keys = dict(zip(nodes, own["mask-keys"], strict=True))
        total = vector + crypto.mask(own["self-mask"], len(vector))
        for other in sharers:
            if other != str(node):
                seed = pair_seed(own["mask-secret"], keys[other], str(record["session"]))
                total = total + pair_mask(seed, len(vector), adds=node < int(other))
    except ProtocolError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"a message of stage 'mask' cannot be used: {error}") from error
    _keep(state, own, stage="masked", sharers=sharers)
    data = total.astype("<u4").tobytes()
    array = Array(dtype="uint32", shape=(len(vector),), stype=MASKED_STYPE, data=data)
    return {
        "arrays": ArrayRecord({MASKED_KEY: array}),
        SECURE_KEY: ConfigRecord({"session": own["session"]}),
    }


def pair_seed(secret: bytes, public: bytes, session: str) -> bytes:
    """Seed of the mask that two clients share in a session."""
    return crypto.agree(secret, public, f"mask {session}")


def pair_mask(seed: bytes, count: int, *, adds: bool) -> crypto.Words:
    """That mask as the client with the smaller id adds it; the other takes it off."""
    words = crypto.mask(seed, count)
    return words if adds else np.uint32(0) - words


def _advertise(
    record: ConfigRecord, state: RecordDict, node: str, limits: MaskLimits
) -> ConfigRecord:
    own: dict[str, Any] = {
        "session": str(record["session"]),
        "cipher-secret": crypto.new_secret(),
        "mask-secret": crypto.new_secret(),
        "self-mask": crypto.new_secret(),
    }
    _keep(state, own, stage="advertised")
    return ConfigRecord(
        {
            "session": own["session"],
            "cipher-key": crypto.public_key(own["cipher-secret"]),
            "mask-key": crypto.public_key(own["mask-secret"]),
        }
    )


def _share(record: ConfigRecord, state: RecordDict, node: str, limits: MaskLimits) -> ConfigRecord:
    own, _ = _take(record, state, "advertised")
    nodes = _names(record["nodes"])
    cipher_keys = cast(list[bytes], record["cipher-keys"])
    mask_keys = cast(list[bytes], record["mask-keys"])
    _check_members(nodes, nodes, node, limits.least)
    if len(nodes) > limits.most:
        raise ProtocolError(f"{len(nodes)} clients are more than the {limits.most} registered")
    if not len(nodes) == len(set(cipher_keys)) == len(set(mask_keys)):
        raise ProtocolError("clients must have keys of their own")
    place = nodes.index(node)
    mine = crypto.public_key(own["cipher-secret"]), crypto.public_key(own["mask-secret"])
    if (cipher_keys[place], mask_keys[place]) != mine:
        raise ProtocolError("the keys under this client's name are not its own")
    threshold = limits.threshold(len(nodes))
    of_mask = shamir.split(own["self-mask"], len(nodes), threshold)
    of_key = shamir.split(own["mask-secret"], len(nodes), threshold)
    sealed = [
        crypto.seal(_share_key(own["cipher-secret"], key, own["session"], node, other), one + two)
        for other, key, one, two in zip(nodes, cipher_keys, of_mask, of_key, strict=True)
    ]
    _keep(state, own, stage="shared", nodes=nodes, cipher_keys=cipher_keys, mask_keys=mask_keys)
    return ConfigRecord(
        {
            "session": own["session"],
            "ciphertexts": sealed,
            "digest": crypto.digest(own["self-mask"]),
        }
    )


def _unmask(record: ConfigRecord, state: RecordDict, node: str, limits: MaskLimits) -> ConfigRecord:
    own, nodes = _take(record, state, "masked")
    sharers, survivors = own["sharers"], _names(record["survivors"])
    _check_members(survivors, sharers, node, limits.threshold(len(nodes)))
    keys = dict(zip(nodes, own["cipher-keys"], strict=True))
    sealed = cast(list[bytes], record["ciphertexts"])
    shares = []
    for other, text in zip(sharers, sealed, strict=True):
        key = _share_key(own["cipher-secret"], keys[other], own["session"], other, node)
        both = crypto.unseal(key, text)
        # Never both: its mask key and its own mask together would lay its vector bare.
        came = other in survivors
        shares.append(both[: shamir.SHARE_BYTES] if came else both[shamir.SHARE_BYTES :])
    del state[SECURE_KEY]  # nothing of this session is answered again
    return ConfigRecord({"session": own["session"], "shares": shares})


def _share_key(secret: bytes, public: bytes, session: str, source: str, target: str) -> bytes:
    """Key of the one sealed message from one client to another (or to itself) in a session."""
    return crypto.agree(secret, public, f"share {session} from {source} to {target}")


def _check_members(names: list[str], among: Sequence[str], node: str, least: int) -> None:
    if len(set(names)) != len(names) or not set(names) <= set(among) or node not in names:
        raise ProtocolError("the clients named are not those of this session")
    if len(names) < least:
        raise ProtocolError(f"{len(names)} clients take part, {least} must at least")


def _names(value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ProtocolError("clients are named by a list of texts")
    return list(value)


def _keep(state: RecordDict, own: dict[str, Any], *, stage: str, **more: Any) -> None:
    fields = {name.replace("_", "-"): value for name, value in more.items()}
    state[SECURE_KEY] = ConfigRecord({**own, **fields, "stage": stage})


def _take(record: ConfigRecord, state: RecordDict, stage: str) -> tuple[dict[str, Any], list[str]]:
    """What this client keeps of the session, and the clients of it; only at its right stage."""
    own = state.config_records.get(SECURE_KEY)
    if own is None or own["stage"] != stage or own["session"] != record["session"]:
        raise ProtocolError(f"this client is not at the stage {stage!r} of that session")
    return dict(own), list(cast(list[str], own.get("nodes", [])))
