"""The same question gets the same bytes: what a reply depends on, and replies on disk."""

from __future__ import annotations

import hashlib
import json

from flwr.app import Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from google.protobuf.message import DecodeError

from strategies import ROUND_PLAN_KEY, SECURE_KEY, WIRE_KEY


def inputs_hash(message: Message, fingerprint: str) -> str:
    """Hash of all in a train message that its reply depends on.

    The adapter by the version that its tensors make, whether all of them travelled or only those
    that this node lacked; the round plan; the reply's form; the backbone.
    """
    wire = message.content.config_records[WIRE_KEY]
    plan = message.content.config_records[ROUND_PLAN_KEY]
    parts = [wire["version"], wire["rank"], wire["dtype"], sorted(plan.items()), fingerprint]
    if SECURE_KEY in message.content:
        # A masked reply belongs to one exchange of keys; in another it would be no use, and two
        # vectors under one mask would give their difference away.
        secure = RecordDict({SECURE_KEY: message.content[SECURE_KEY]})
        parts.append(hashlib.sha256(pack_reply(secure)).hexdigest())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def pack_reply(reply: RecordDict) -> bytes:
    """Bytes of a reply's content, as they are kept on disk."""
    content: bytes = recorddict_to_proto(reply).SerializeToString(deterministic=True)
    return content


def unpack_reply(content: bytes) -> RecordDict | None:
    """The content again; ``None`` if it is of another version of Flower."""
    try:
        return recorddict_from_proto(ProtoRecordDict.FromString(content))
    except (DecodeError, ValueError, KeyError, TypeError):
        return None
