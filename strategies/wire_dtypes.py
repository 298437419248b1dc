"""How an update is written into Flower Arrays, in four precisions, and read back on the server.

All of it happens to an update that already carries its noise: it is post-processing and costs no
privacy, as long as ``rng`` is independent of the data and of the noise.  int8 rounds
stochastically, so its error is zero on average and the mean over clients stays unbiased; the other
precisions round to nearest.  What arrives is untrusted: each length is checked against what the
round expects before any bytes become an array, and no parser runs on bytes from a client.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt
from flwr.app import Array

WireDtype = Literal["float32", "bfloat16", "float16", "int8"]
Float32s = npt.NDArray[np.float32]

PACKED_KEY = "packed"
_PACKED_STYPE = "dp_lora.packed"
_BLOCK = 256
# Largest float16 below 2^15.  2^15 times the largest scale, 2^113, would be infinite.
_F16_TOP = 2.0**15 - 16
# The next float32 up, times 127, is infinite.
_I8_TOP_SCALE = np.nextafter(np.float32(np.finfo(np.float32).max / 127), np.float32(0))
# Longer than any npy header that numpy writes for a tensor.
_NPY_HEAD = 1024


class WireError(ValueError):
    """An update that cannot be sent or must not be used; the text holds nothing of its values."""


def pack(
    update: Mapping[str, Float32s], dtype: WireDtype, rng: np.random.Generator
) -> dict[str, Array]:
    """Write an update into Arrays by name, or one under ``PACKED_KEY`` in sorted order of names.

    Parameters
    ----------
    update : mapping of str to float32 array
        The noised change of each active tensor, of any shape.
    dtype : {"float32", "bfloat16", "float16", "int8"}
        float32 makes one Array per tensor.  The others make one in all, as each Array costs about
        400 bytes of its own, and Flower has no bfloat16.
    rng : numpy.random.Generator
        Rounds int8; the other precisions leave it alone.

    Raises
    ------
    WireError
        If a tensor is not float32 or not finite.
    """
    for name, value in update.items():
        if value.dtype != np.float32 or not np.isfinite(value).all():
            raise WireError(f"{name} must be float32 and finite")
    if dtype == "float32":
        return {name: Array(np.asarray(value, order="C")) for name, value in update.items()}
    parts = [update[name].ravel() for name in sorted(update)]
    flat = np.concatenate([np.empty(0, np.float32), *parts])
    if dtype == "bfloat16":
        data = _to_bfloat16(flat)
    elif dtype == "float16":
        data = _to_float16(flat)
    else:
        data = _to_int8(flat, _block_lengths([part.size for part in parts]), rng)
    return {PACKED_KEY: Array(dtype=dtype, shape=(flat.size,), stype=_PACKED_STYPE, data=data)}


def unpack(
    record: Mapping[str, Array], expected: Mapping[str, tuple[int, ...]], dtype: WireDtype
) -> dict[str, Float32s]:
    """Take apart what ``pack`` made, refusing anything of another form.

    The arrays come in the order of ``expected``, are writable and own their memory.

    Parameters
    ----------
    record : mapping of str to Array
        What arrived.
    expected : mapping of str to tuple of int
        Names and shapes of the tensors that the round made active.
    dtype : {"float32", "bfloat16", "float16", "int8"}
        What the round asked for.

    Raises
    ------
    WireError
        Naming the first thing wrong.
    """
    names = set(expected) if dtype == "float32" else {PACKED_KEY}
    missing, surplus = sorted(names - set(record)), set(record) - names
    if missing or surplus:
        first = missing[0] if missing else "none"
        raise WireError(f"missing: {len(missing)} (first: {first}); surplus: {len(surplus)}")
    if dtype == "float32":
        update = {name: _read_npy(name, record[name], shape) for name, shape in expected.items()}
    else:
        sizes = [math.prod(expected[name]) for name in sorted(expected)]
        flat = _read_packed(record[PACKED_KEY], sizes, dtype)
        # split leaves an empty part behind the last end.
        parts = np.split(flat, np.cumsum(sizes, dtype=int))
        named = dict(zip(sorted(expected), parts, strict=False))
        update = {name: named[name].reshape(shape).copy() for name, shape in expected.items()}
    for name, value in update.items():
        if not np.isfinite(value).all():
            raise WireError(f"{name} has values that are not finite")
    return update


def relative_error(dtype: WireDtype) -> float:
    """Bound on ``||unpacked - exact|| / ||exact||`` (L2) that no update of normal values exceeds.

    - float32: sent as it is.
    - bfloat16: nearest errs by at most half a step, 2^(e-8) for a value in [2^e, 2^(e+1)); cut off
      at c = 2^128 - 2^120, v errs by (v - c) / v, which grows with v to 2^-8 at 2^128.  2^-9 would
      not hold: 1 + 2^-8 errs by 1/257.
    - float16: the same with three more bits, 2^-11.  Values below 2^-14 after scaling err by at
      most 2^-25, beside a largest of at least 2^14: sqrt(n) 2^-39 of the norm, which is 2^-19 for
      n = 2^40 values.
    - int8: a value errs by less than one step, its block's maximum / 127, and the square of that
      maximum is at most the sum of the block's squares: sqrt(256) / 127.  The last factor covers
      rounding the scale up (2^-16 where it is subnormal) and the product (127 2^-24 steps).
    """
    return {
        "float32": 0.0,
        "bfloat16": 2.0**-8,
        "float16": 2.0**-11 + 2.0**-19,
        "int8": math.sqrt(_BLOCK) / 127 * (1 + 2.0**-12),
    }[dtype]


def _block_lengths(sizes: list[int]) -> npt.NDArray[np.int64]:
    """Values in each int8 block; no block crosses from one tensor into the next."""
    lengths = [min(_BLOCK, size - at) for size in sizes for at in range(0, size, _BLOCK)]
    return np.array(lengths, np.int64)


def _to_bfloat16(flat: Float32s) -> bytes:
    """Round the bits to the upper 16, ties to even; what would become infinite stays finite."""
    bits = flat.view(np.uint32)
    upper = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype("<u2")
    upper -= (upper & 0x7FFF) == 0x7F80
    return upper.tobytes()


def _to_float16(flat: Float32s) -> bytes:
    """Write a power of two, then the values divided by it: the largest is in [2^14, 2^15)."""
    top = float(np.abs(flat).max(initial=0))
    # float32 has no power below 2^-149; only a subnormal maximum then comes out below 2^14.
    power = max(math.frexp(top)[1] - 15, -149) if top else 0
    scaled = np.clip(np.ldexp(flat, -power), -_F16_TOP, _F16_TOP)
    return np.array(2.0**power, "<f4").tobytes() + scaled.astype("<f2").tobytes()


def _to_int8(flat: Float32s, lengths: npt.NDArray[np.int64], rng: np.random.Generator) -> bytes:
    """Write one scale per block, then values / scale rounded up or down at random, unbiased."""
    top = np.maximum.reduceat(np.abs(flat), np.cumsum(lengths) - lengths).astype(np.float64)
    scales = (top / 127).astype(np.float32)
    # Rounded up, so that no value is more than 127 steps; else a clip at 127 would bias.
    short = scales.astype(np.float64) * 127 < top
    scales[short] = np.nextafter(scales[short], np.float32(np.inf))
    scales = np.minimum(scales, _I8_TOP_SCALE)
    # float64, so that x + u resolves u.  An all-zero block divides by 1.
    steps = flat / np.repeat(np.where(scales > 0, scales, 1).astype(np.float64), lengths)
    # The clip meets 127 + u that rounds to 128, and values at the very top of float32.
    whole = np.clip(np.floor(steps + rng.random(flat.size)), -127, 127)
    return scales.astype("<f4").tobytes() + whole.astype(np.int8).tobytes()


def _read_npy(name: str, array: Array, shape: tuple[int, ...]) -> Float32s:
    """Read a stock Array; its npy header must be, letter for letter, the one of this shape.

    ``np.load`` is not used: it allocates what a header claims and raises many types on junk.
    """
    dims = tuple(map(int, shape))
    if array.dtype != "float32" or tuple(array.shape) != dims or array.stype != "numpy.ndarray":
        raise WireError(f"{name} must be float32 {dims}, not what was sent")
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {dims}, }}".encode()
    head = len(array.data) - 4 * math.prod(dims)
    if not 10 + len(text) < head <= _NPY_HEAD:
        raise WireError(f"{name} has another number of bytes than its shape needs")
    magic = b"\x93NUMPY\x01\x00" + (head - 10).to_bytes(2, "little")
    # How many spaces pad the header is left open, as versions of numpy differ in it.
    if array.data[:head] != magic + text.ljust(head - 11) + b"\n":
        raise WireError(f"{name} holds other data than its header says")
    return np.frombuffer(array.data, "<f4", offset=head).reshape(dims).astype(np.float32)


def _read_packed(array: Array, sizes: list[int], dtype: WireDtype) -> Float32s:
    """Read the one Array of a packed update: its values in float32, perhaps infinite."""
    total = sum(sizes)
    if array.dtype != dtype or tuple(array.shape) != (total,) or array.stype != _PACKED_STYPE:
        raise WireError(f"{PACKED_KEY} must be {dtype} ({total},), not what was sent")
    lengths = _block_lengths(sizes)
    needed = {"bfloat16": 2 * total, "float16": 4 + 2 * total, "int8": 4 * lengths.size + total}
    if len(array.data) != needed[dtype]:
        raise WireError(f"{PACKED_KEY} has another number of bytes than its shape needs")
    if dtype == "bfloat16":
        return (np.frombuffer(array.data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "float16":
        mantissa, power = math.frexp(np.frombuffer(array.data, "<f4", count=1)[0])
        if mantissa != 0.5:  # Neither does zero, a negative, an infinity or a NaN give 0.5.
            raise WireError(f"{PACKED_KEY} has a scale that is not a power of two")
        halves = np.frombuffer(array.data, "<f2", offset=4)
        with np.errstate(over="ignore", invalid="ignore"):  # unpack refuses what is not finite
            return np.ldexp(halves.astype(np.float32), power - 1)
    scales = np.frombuffer(array.data, "<f4", count=lengths.size).astype(np.float32)
    whole = np.frombuffer(array.data, np.int8, offset=4 * lengths.size)
    if not np.isfinite(scales).all() or np.signbit(scales).any():
        raise WireError(f"{PACKED_KEY} has a scale that is negative or not finite")
    if (whole == -128).any():
        raise WireError(f"{PACKED_KEY} has a value outside [-127, 127]")
    with np.errstate(over="ignore"):  # as above
        return np.repeat(scales, lengths) * whole
