"""What can be wrong with a reply: each fault changes an honest reply's records in place.

A fault says whether the reply is valid all the same, told from the public rules alone.
"""

from __future__ import annotations

import math
import random

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord

from strategies import PRIVACY_KEY, SCORES_KEY, WIRE_KEY
from strategies.wire_dtypes import pack


class Spoiler:
    """A reply being spoilt: its records, the settings of the run, and a source of choices."""

    def __init__(
        self,
        records: dict,
        shapes: dict[str, tuple[int, ...]],
        rng: random.Random,
        options: dict,
        *,
        scored: bool,
        everything: bool,
    ) -> None:
        self.records, self.shapes, self.rng = records, shapes, rng
        self.scored, self.everything = scored, everything
        self.weighted = options["weighting"] == "public-counts"
        self.bounded = options["update_bound"] is not None
        self.dtype = options["wire_dtype"]
        self.packed = self.dtype != "float32"

    def swap(self, **fields) -> None:
        """Replace fields of one Array of the update."""
        arrays = self.records["arrays"]
        name = self.rng.choice(sorted(arrays))
        old = arrays[name]
        given = {"dtype": old.dtype, "shape": old.shape, "stype": old.stype, "data": old.data}
        arrays[name] = Array(**{**given, **fields})

    def data(self) -> bytes:
        return self.records["arrays"][min(self.records["arrays"])].data

    def repack(self, change) -> None:
        update = {n: np.asarray(change(s), np.float32) for n, s in self.shapes.items()}
        arrays = pack(update, self.dtype, np.random.default_rng(0))
        self.records["arrays"] = ArrayRecord(arrays)


WRONG_RECORDS = (MetricRecord({"x": 1}), ConfigRecord({"x": "y"}), ArrayRecord({}))


def missing(s: Spoiler) -> bool:
    arrays = s.records["arrays"]
    del arrays[s.rng.choice(sorted(arrays))]
    return False


def extra(s: Spoiler) -> bool:
    s.records["arrays"]["more.lora_A.weight"] = Array(np.zeros((2, 2), np.float32))
    return False


def reordered(s: Spoiler) -> bool:
    s.records["arrays"] = ArrayRecord(dict(reversed(s.records["arrays"].items())))
    return True


def empty(s: Spoiler) -> bool:
    s.records["arrays"] = ArrayRecord({})
    return False


def shape(s: Spoiler) -> bool:
    if s.rng.random() < 0.5 and not s.packed:
        name = s.rng.choice(sorted(s.records["arrays"]))
        s.records["arrays"][name] = Array(np.zeros((7, 7), np.float32))
    else:
        s.swap(shape=s.rng.choice([(), (1,), (10**6, 10**6), (-1,), (2, 2, 2)]))
    return False


def dtype(s: Spoiler) -> bool:
    if s.rng.random() < 0.5 and not s.packed:
        name = s.rng.choice(sorted(s.records["arrays"]))
        kind = s.rng.choice([np.float64, np.int32, np.complex64, np.bool_])
        s.records["arrays"][name] = Array(s.records["arrays"][name].numpy().astype(kind))
    else:
        s.swap(dtype=s.rng.choice(["object", "", "float64", "Float32", ">f4", "x" * 99]))
    return False


def stype(s: Spoiler) -> bool:
    s.swap(stype=s.rng.choice(["", "pickle", "torch", "numpy.ndarray\0"]))
    return False


def junk(s: Spoiler) -> bool:
    length = s.rng.choice([0, 1, 9, 10, 64, 127])
    data = b"\x93NUMPY"[: s.rng.randrange(7)] + s.rng.randbytes(length)
    s.swap(data=data + b"\0" * (len(data) == len(s.data())))
    return False


def truncated(s: Spoiler) -> bool:
    data = s.data()
    cut = s.rng.randrange(len(data))
    name = min(s.records["arrays"])
    old = s.records["arrays"][name]
    s.records["arrays"][name] = Array(old.dtype, old.shape, old.stype, data[:cut])
    return False


def lying(s: Spoiler) -> bool:
    """Data that says something else than its Array."""
    claims = [(10**9, 10**9), (1,), (0,), (5, 4)]
    data = Array(np.zeros(1, np.float32)).data
    text = str(s.rng.choice(claims)).encode()
    s.swap(data=data.replace(b"(1,)", text)[:118] + b" " * 9 + b"\n")
    return False


def not_finite(s: Spoiler) -> bool:
    value = s.rng.choice([math.nan, math.inf, -math.inf])
    if s.dtype == "float32":
        name = s.rng.choice(sorted(s.records["arrays"]))
        array = s.records["arrays"][name].numpy()
        array[(0,) * array.ndim] = value
        s.records["arrays"][name] = Array(array)
    else:
        spoilt = {"bfloat16": "<u2", "float16": "<f4", "int8": "<f4"}[s.dtype]
        bits = 0x7FC0 if s.dtype == "bfloat16" else value
        data = np.array(bits, spoilt).tobytes()
        s.swap(data=data + s.data()[len(data) :])
    return False


def zero(s: Spoiler) -> bool:
    s.repack(np.zeros)
    return True


def huge(s: Spoiler) -> bool:
    value = s.rng.choice([1e6, -1e15, 1e30])
    s.repack(lambda shape: np.full(shape, value))
    return not s.bounded


def wrong_arrays(s: Spoiler) -> bool:
    s.records["arrays"] = s.rng.choice(WRONG_RECORDS)
    return False


def no_arrays(s: Spoiler) -> bool:
    del s.records["arrays"]
    return False


def wrong_metrics(s: Spoiler) -> bool:
    s.records["metrics"] = s.rng.choice(WRONG_RECORDS)
    return not s.weighted


def count(s: Spoiler) -> bool:
    values = [-1, 0, 1.5, math.nan, math.inf, -math.inf, [1, 2], [], 2**53, 1e300, 10**400]
    s.records["metrics"] = MetricRecord({"num-examples": s.rng.choice(values)})
    return not s.weighted


def large_count(s: Spoiler) -> bool:
    s.records["metrics"] = MetricRecord({"num-examples": s.rng.choice([2**53 - 1, 1e15, 1.0])})
    return True


def wrong_scores(s: Spoiler) -> bool:
    s.records[SCORES_KEY] = s.rng.choice(WRONG_RECORDS)
    return not s.scored


def odd_scores(s: Spoiler) -> bool:
    scores = s.records[SCORES_KEY] = MetricRecord(dict(s.records[SCORES_KEY]))
    bad = [math.nan, math.inf, -math.inf, [1.0], []]
    scores[s.rng.choice([*sorted(scores), "other"])] = s.rng.choice(bad)
    return not s.scored


def large_scores(s: Spoiler) -> bool:
    value = s.rng.choice([1e30, -1e30, 0, 10**15])
    s.records[SCORES_KEY] = MetricRecord(dict.fromkeys(s.records[SCORES_KEY], value))
    return True


def wrong_privacy(s: Spoiler) -> bool:
    s.records[PRIVACY_KEY] = s.rng.choice(WRONG_RECORDS)
    return True


def odd_privacy(s: Spoiler) -> bool:
    odd = [math.nan, -1.0, math.inf, 1e300, "x", 1, True, b"x", [0.1], []]
    names = ("noise-std", "secure-noise", "noise-multiplier")
    s.records[PRIVACY_KEY] = ConfigRecord({name: s.rng.choice(odd) for name in names})
    return True


def no_wire(s: Spoiler) -> bool:
    s.records[WIRE_KEY] = s.rng.choice((WRONG_RECORDS[0], WRONG_RECORDS[2]))
    if s.rng.random() < 0.5:
        del s.records[WIRE_KEY]
    return s.everything


def other_version(s: Spoiler) -> bool:
    odd = ["", "x" * 1000, 1, 0.5, True, b"v", ["v"], [], [1, 2], b"\x00" * 40]
    s.records[WIRE_KEY] = ConfigRecord({**s.records[WIRE_KEY], "version": s.rng.choice(odd)})
    if s.rng.random() < 0.2:
        del s.records[WIRE_KEY]["version"]
    return False


def other_rank(s: Spoiler) -> bool:
    odd = [7, -1, 10**18, 0.5, math.nan, "0", b"0", [0], []]
    s.records[WIRE_KEY] = ConfigRecord({**s.records[WIRE_KEY], "rank": s.rng.choice(odd)})
    return False


def odd_flags(s: Spoiler) -> bool:
    odd = [1, "yes", False, [True], 0.0, b"1"]
    flags = {"need-full": s.rng.choice(odd), "else": s.rng.choice(odd)}
    s.records[WIRE_KEY] = ConfigRecord({**s.records[WIRE_KEY], **flags})
    if s.rng.random() < 0.3:
        del s.records[WIRE_KEY]["rank"]
    return True


def need_full(s: Spoiler) -> bool:
    rank = s.rng.choice([0, 1, 3, 99, -1, "x", 0.0, True, [0]])
    s.records[WIRE_KEY] = ConfigRecord({"need-full": True, "rank": rank})
    return False


def more_records(s: Spoiler) -> bool:
    s.records["else"] = s.rng.choice(WRONG_RECORDS)
    return True


FAULTS = {
    fault.__name__: fault
    for fault in (
        missing, extra, reordered, empty, shape, dtype, stype, junk, truncated, lying, not_finite,
        zero, huge, wrong_arrays, no_arrays, wrong_metrics, count, large_count, wrong_scores,
        odd_scores, large_scores, wrong_privacy, odd_privacy, no_wire, other_version, other_rank,
        odd_flags, need_full, more_records,
    )
}  # fmt: skip
