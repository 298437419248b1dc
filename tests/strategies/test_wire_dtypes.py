"""The packed forms of an update: exact sizes, error bounds, and refusal of anything else."""

from __future__ import annotations

import io
import itertools
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from strategies.wire_dtypes import (
    PACKED_KEY,
    WireDtype,
    WireError,
    pack,
    relative_error,
    unpack,
)
from tests.fake_grid import stamp

DTYPES = get_args(WireDtype)
PACKED = [dtype for dtype in DTYPES if dtype != "float32"]
TINY = float(np.finfo(np.float32).tiny)
TOP = float(np.finfo(np.float32).max)
# Out of sorted order, so that an order mixed up shows; 257 and 600 leave short last blocks.
SHAPES = {"z": (257,), "m.B": (5, 1, 3), "empty": (0, 4), "a.A": (2, 300), "one": (1,)}
seeds = st.integers(0, 2**32 - 1)


def rng_of(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def update_of(shapes=SHAPES, seed: int = 0, low: float = 0.1, high: float = 10.0):
    """Random signs, magnitudes log-uniform in [low, high]."""
    rng = rng_of(seed)
    update = {}
    for name, shape in shapes.items():
        size = np.exp(rng.uniform(np.log(low), np.log(high), shape)).clip(low, high)
        update[name] = (size * rng.choice([-1.0, 1.0], shape)).astype(np.float32)
    return update


def shapes_of(update):
    return {name: value.shape for name, value in update.items()}


def there_and_back(update, dtype, rng=None):
    return unpack(pack(update, dtype, rng or rng_of()), shapes_of(update), dtype)


def joined(update):
    return np.concatenate([value.ravel().astype(np.float64) for value in update.values()])


def error_of(update, dtype, rng=None) -> float:
    exact = joined(update)
    got = joined(there_and_back(update, dtype, rng))
    # Squares of the tiniest values lose precision unless scaled first.
    scale = np.abs(exact).max()
    return np.linalg.norm((got - exact) / scale) / np.linalg.norm(exact / scale)


# ---- What comes back


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_tensor_comes_back_under_its_name_in_the_expected_order(dtype):
    update = update_of()
    record = pack(update, dtype, rng_of())
    expected = {name: SHAPES[name] for name in reversed(SHAPES)}
    got = unpack(record, expected, dtype)
    assert list(got) == list(expected)
    for name, value in got.items():
        assert value.shape == SHAPES[name] and value.dtype == np.float32
        assert value.flags.owndata and value.flags.writeable and value.flags.c_contiguous
        step = {"float32": 0, "bfloat16": 2**-8, "float16": 2**-11, "int8": 0.08}[dtype]
        limit = 10 * step if dtype == "int8" else step * np.abs(update[name])
        assert (np.abs(value - update[name]) <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_transposed_tensor_is_not_read_in_memory_order(dtype):
    value = np.arange(1, 7, dtype=np.float32).reshape(2, 3).T
    assert not value.flags.c_contiguous
    got = there_and_back({"w": value}, dtype)["w"]
    np.testing.assert_allclose(got, value, atol=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_nothing_at_all_come_back(dtype):
    zeros = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    got = there_and_back(zeros, dtype)
    assert all(not got[name].any() and got[name].shape == SHAPES[name] for name in SHAPES)
    assert there_and_back({}, dtype) == {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_update_is_left_as_it_was(dtype):
    update = update_of()
    copies = {name: value.copy() for name, value in update.items()}
    pack(update, dtype, rng_of())
    assert all(np.array_equal(update[name], copies[name]) for name in update)


def test_float32_is_a_stock_array_bit_for_bit():
    value = np.array([-0.0, 1e-45, TOP, -TINY], np.float32)
    record = pack({"w": value}, "float32", rng_of())
    assert record == {"w": Array(value)}
    assert unpack(record, {"w": (4,)}, "float32")["w"].tobytes() == value.tobytes()


# ---- Sizes


@pytest.mark.parametrize(
    ("dtype", "length"), [("bfloat16", 2 * 873), ("float16", 4 + 2 * 873), ("int8", 873 + 4 * 7)]
)
def test_data_has_exactly_the_promised_bytes(dtype, length):
    """257 + 15 + 0 + 600 + 1 values; 2 + 1 + 0 + 3 + 1 blocks."""
    (name, array), *others = pack(update_of(), dtype, rng_of()).items()
    assert name == PACKED_KEY and not others
    assert (array.dtype, array.shape, array.stype) == (dtype, (873,), "dp_lora.packed")
    assert len(array.data) == length


# ---- bfloat16


def test_bfloat16_is_torchs_for_every_upper_half():
    """Every upper 16 bits with the lower halves around a tie; where torch overflows, the top."""
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = ((np.arange(2**16, dtype=np.uint32) << 16)[:, None] | lower).ravel()
    value = bits.view(np.float32)
    value = value[np.isfinite(value)]
    ours = np.frombuffer(pack({"w": value}, "bfloat16", rng_of())[PACKED_KEY].data, "<u2")
    theirs = torch.tensor(value).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    over = (theirs & 0x7FFF) == 0x7F80
    assert over.sum() == 2 * 3
    np.testing.assert_array_equal(ours[~over], theirs[~over])
    np.testing.assert_array_equal(ours[over], (theirs[over] & 0x8000) | 0x7F7F)
    got = there_and_back({"w": value}, "bfloat16")["w"]
    np.testing.assert_array_equal(
        got.view(np.uint32)[~over],
        torch.tensor(value).to(torch.bfloat16).float().numpy().view(np.uint32)[~over],
    )


def test_bfloat16_bound_cannot_be_halved():
    assert error_of({"w": np.array([1 + 2**-8], np.float32)}, "bfloat16") == pytest.approx(1 / 257)


# ---- float16


def test_float16_of_tiny_values_keeps_relative_precision():
    """Mistake: a plain cast, where 1e-12 is 0."""
    update = update_of(low=1e-12, high=1e-10)
    got = there_and_back(update, "float16")
    for name, value in update.items():
        assert (np.abs(got[name] - value) <= 2**-11 * np.abs(value)).all()


@given(st.floats(TINY, TOP, width=32), st.booleans())
@example(TINY, False)
@example(TOP, True)
@example(1.0, True)
@example(float(np.nextafter(np.float32(1), np.float32(0))), False)
def test_float16_puts_the_largest_magnitude_in_the_top_binade(top, negative):
    value = np.array([0.0, top / 2, -top if negative else top], np.float32)
    data = pack({"w": value}, "float16", rng_of())[PACKED_KEY].data
    scale = np.frombuffer(data, "<f4", count=1).astype(np.float64)[0]
    halves = np.frombuffer(data, "<f2", offset=4).astype(np.float64)
    assert np.frexp(scale)[0] == 0.5
    assert 2**14 <= np.abs(halves).max() < 2**15
    np.testing.assert_allclose(halves * scale, value, rtol=2**-11, atol=0)


def test_float16_scale_of_zeros_is_one():
    data = pack({"w": np.zeros(2, np.float32)}, "float16", rng_of())[PACKED_KEY].data
    assert data == np.float32(1).tobytes() + bytes(4)


# ---- int8


def int8_parts(value, rng):
    data = pack({"w": value}, "int8", rng)[PACKED_KEY].data
    blocks = -(-value.size // 256)
    scales = np.frombuffer(data, "<f4", count=blocks).astype(np.float64)
    return scales, np.frombuffer(data, np.int8, offset=4 * blocks).astype(int)


def test_int8_rounding_is_unbiased():
    """Mean of 4000 draws of 300 values, each within 5 standard errors of the exact one.

    False alarm: 300 x 6e-7 (two-sided normal tail), so 2e-4 for a fresh seed; this one is fixed.
    """
    rng, draws = rng_of(1), 4000
    steps = rng.integers(-120, 120, 300) + rng.uniform(0.1, 0.9, 300)
    steps[[0, 299]] = 127.0, -127.0
    value = (steps * np.where(np.arange(300) < 256, 1e-3, 7.0)).astype(np.float32)
    total = np.zeros(300)
    for _ in range(draws):
        scales, whole = int8_parts(value, rng)
        total += whole
    exact = value / np.repeat(scales, [256, 44])
    chance = exact - np.floor(exact)
    limit = 5 * np.sqrt(chance * (1 - chance) / draws) + 1e-3 * (np.abs(exact) > 126.9)
    assert (np.abs(total / draws - exact) <= limit).all()


def test_int8_draws_from_the_given_generator_only():
    update = update_of()
    first, again, other = (pack(update, "int8", rng_of(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@given(st.floats(TINY, TOP, width=32), st.sampled_from([0.0, 0.5, 1 - 2**-53]))
@example(TOP, 1 - 2**-53)
@example(TINY, 1 - 2**-53)
def test_int8_integers_stay_within_127(top, draw):
    """Mistake: a scale rounded down makes 127.00001, which may become 128 (or, clipped, biased)."""
    value = np.array([top, -top, top / 3], np.float32)
    scales, whole = int8_parts(value, SimpleNamespace(random=lambda n: np.full(n, draw)))
    assert np.abs(whole).max() <= 127
    assert scales[0] * 127 >= value[0].astype(np.float64) * (1 if top < TOP / 2 else 1 - 2**-22)
    assert scales[0] * 127 <= value[0].astype(np.float64) * (1 + 2**-15)
    # The extremes are 127 steps, give or take the scale's own rounding.
    assert whole[0] in (126, 127) and whole[1] in (-126, -127)


def test_int8_blocks_do_not_mix_tensors_or_neighbours():
    """A large value costs its own block precision, and no other."""
    update = {"a": np.full(300, 1e-3, np.float32), "b": np.full(3, 1e-3, np.float32)}
    update["a"][0] = 1e6
    got = there_and_back(update, "int8")
    np.testing.assert_allclose(got["a"][256:], 1e-3, rtol=1e-6)
    np.testing.assert_allclose(got["b"], 1e-3, rtol=1e-6)
    assert got["a"][0] == pytest.approx(1e6)
    # 1e-3 is 1.3e-7 steps here: one of 255 rounds up once in 3e4 seeds, not with this one.
    assert not got["a"][1:256].any()


# ---- Error bounds


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60)
@given(seed=seeds, ends=st.tuples(st.floats(-30, 30), st.floats(-30, 30)))
def test_error_bound_holds(dtype, seed, ends):
    low, high = 10.0 ** min(ends), 10.0 ** max(ends)
    update = update_of({"b": (3, 100), "a": (7,)}, seed, low, high)
    assert error_of(update, dtype, rng_of(seed)) <= relative_error(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60)
@given(seed=seeds, draw=st.sampled_from([0.0, 1 - 2**-53]), width=st.integers(1, 254))
def test_error_bound_holds_at_the_ends_of_float32_and_of_luck(dtype, seed, draw, width):
    """Every normal exponent, random bits, and the worst that stochastic rounding can draw."""
    rng = rng_of(seed)
    first = rng.integers(1, 256 - width)
    exponents = rng.integers(first, first + width, 300, dtype=np.uint32)
    bits = rng.integers(0, 2**32, 300, dtype=np.uint32) & np.uint32(0x807FFFFF) | (exponents << 23)
    stuck = SimpleNamespace(random=lambda n: np.full(n, draw))
    assert error_of({"w": bits.view(np.float32)}, dtype, stuck) <= relative_error(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_the_largest_float32_stays_finite(dtype, draw):
    """Mistake: 2^15 times 2^113, or 127 times a scale rounded up, is infinite."""
    stuck = SimpleNamespace(random=lambda n: np.full(n, draw))
    value = np.array([TOP, -TOP, np.nextafter(np.float32(TOP), np.float32(0))], np.float32)
    assert error_of({"w": value}, dtype, stuck) <= relative_error(dtype)


def test_int8_bound_is_nearly_met_so_it_is_not_slack():
    value = np.full(256, 1e-6, np.float32)
    value[0] = 1.0
    stuck = SimpleNamespace(random=lambda n: np.full(n, 1 - 2**-53))
    assert error_of({"w": value}, "int8", stuck) > 0.99 * relative_error("int8")


# ---- Through Flower


@pytest.mark.parametrize("dtype", DTYPES)
def test_flower_carries_it(dtype):
    update = update_of()
    content = RecordDict({"arrays": ArrayRecord(pack(update, dtype, rng_of()))})
    message = stamp(Message(content, dst_node_id=1, message_type="train"), 0, 1)
    wire = {key: part.deflate() for key, part in get_all_nested_objects(message).items()}
    arrived = inflate_object_from_contents(message.object_id, wire)
    assert arrived is not message
    got = unpack(arrived.content.array_records["arrays"], SHAPES, dtype)
    here = there_and_back(update, dtype)
    assert all(got[name].tobytes() == here[name].tobytes() for name in SHAPES)


# ---- What pack refuses


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "bad",
    [
        np.array([1, np.nan], np.float32),
        np.array([[np.inf]], np.float32),
        np.array([-np.inf], np.float32),
        np.ones(2, np.float64),
        np.ones(2, np.int32),
        np.ones(2, ">f4"),
    ],
)
def test_pack_refuses_and_names_the_tensor(dtype, bad):
    with pytest.raises(WireError, match=r"culprit.*float32 and finite"):
        pack({"good": np.ones(1, np.float32), "culprit": bad}, dtype, rng_of())


# ---- What unpack refuses


SMALL = {"b": (300,), "a": (2, 3)}


def honest(dtype) -> dict[str, Array]:
    return pack(update_of(SMALL), dtype, rng_of())


def with_field(dtype, /, **fields) -> dict[str, Array]:
    """An honest record whose last Array has other fields."""
    record = honest(dtype)
    name = list(record)[-1]
    parts = {key: getattr(record[name], key) for key in ("dtype", "shape", "stype", "data")}
    return {**record, name: Array(**{**parts, **fields})}


def last_data(dtype) -> bytes:
    return list(honest(dtype).values())[-1].data


@pytest.mark.parametrize("dtype", DTYPES)
def test_honest_records_are_read(dtype):
    """The other tests here change one thing in these."""
    assert set(unpack(honest(dtype), SMALL, dtype)) == set(SMALL)
    assert set(unpack(with_field(dtype), SMALL, dtype)) == set(SMALL)


@pytest.mark.parametrize("dtype", DTYPES)
def test_missing_and_surplus_names_are_counted(dtype):
    first, count = ("a", 2) if dtype == "float32" else (PACKED_KEY, 1)
    with pytest.raises(WireError, match=rf"missing: {count} \(first: {first}\); surplus: 0"):
        unpack({}, SMALL, dtype)
    with pytest.raises(WireError, match=r"missing: 0 \(first: none\); surplus: 1") as caught:
        unpack({**honest(dtype), "sneaky": Array(np.ones(1, np.float32))}, SMALL, dtype)
    assert "sneaky" not in str(caught.value)


@pytest.mark.parametrize(
    ("sent", "asked"), [pair for pair in itertools.product(DTYPES, DTYPES) if len(set(pair)) == 2]
)
def test_another_precision_than_asked_for_is_refused(sent, asked):
    with pytest.raises(WireError):
        unpack(honest(sent), SMALL, asked)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "float64"},
        {"dtype": ""},
        {"shape": ()},
        {"shape": (6,)},
        {"shape": (3, 2)},
        {"shape": (-1, 306)},
        {"shape": (2**70,)},
        {"stype": "torch.tensor"},
        {"stype": ""},
        {"data": b""},
    ],
)
def test_a_changed_header_field_is_refused(dtype, fields):
    with pytest.raises(WireError):
        unpack(with_field(dtype, **fields), SMALL, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_truncation_and_extension_is_refused(dtype):
    data = last_data(dtype)
    for length in range(len(data)):
        with pytest.raises(WireError):
            unpack(with_field(dtype, data=data[:length]), SMALL, dtype)
    for extra in (1, 2, 4, 64, 100_000):
        for changed in (data + bytes(extra), bytes(extra) + data, data + b" " * extra):
            with pytest.raises(WireError):
                unpack(with_field(dtype, data=changed), SMALL, dtype)


@settings(max_examples=100)
@given(data=st.data())
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_bytes_give_finite_values_or_a_wire_error(dtype, data):
    """Mostly of the right length, as others are refused at once."""
    clean = last_data(dtype)
    start = data.draw(st.integers(0, len(clean)))
    junk = data.draw(st.binary(min_size=1, max_size=len(clean) - start or 1))
    changed = (clean[:start] + junk + clean[start + len(junk) :])[: len(clean)]
    try:
        got = unpack(with_field(dtype, data=changed), SMALL, dtype)
    except WireError:
        return
    assert shapes_of(got) == SMALL
    assert all(np.isfinite(value).all() and value.flags.owndata for value in got.values())


@given(data=st.binary(max_size=2000), dtype=st.sampled_from(DTYPES))
def test_bytes_of_any_length_raise_nothing_but_a_wire_error(data, dtype):
    assume(len(data) != len(last_data(dtype)))
    with pytest.raises(WireError):
        unpack(with_field(dtype, data=data), SMALL, dtype)


def test_every_changed_byte_of_the_npy_header_is_refused():
    clean = last_data("float32")
    head = len(clean) - 4 * 6
    assert head == 128
    for at, bit in itertools.product(range(head), range(8)):
        data = bytearray(clean)
        data[at] ^= 1 << bit
        with pytest.raises(WireError, match=r"^a holds other data"):
            unpack(with_field("float32", data=bytes(data)), SMALL, "float32")


def npy(header: str, body: bytes = bytes(24)) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 2), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (6,), }",
        "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }",
        "{'descr': '>f4', 'fortran_order': False, 'shape': (2, 3), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (2, 3), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), } {}",
        "(" * 300,
        "{'descr': '''",
        "\ud7ff",
        "",
    ],
)
def test_npy_headers_that_lie_are_refused(header):
    """The right one in the same clothes is read, so the clothes are not what is refused."""
    right = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"
    got = unpack(with_field("float32", data=npy(right + " " * 10)), SMALL, "float32")
    assert not got["a"].any()
    with pytest.raises(WireError, match=r"^a "):
        unpack(with_field("float32", data=npy(header.ljust(70))), SMALL, "float32")


def test_a_header_padded_without_end_is_refused():
    right = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"
    with pytest.raises(WireError, match=r"^a has another number of bytes"):
        unpack(with_field("float32", data=npy(right + " " * 2000)), SMALL, "float32")


def test_pickles_are_refused():
    buffer = io.BytesIO()
    np.save(buffer, np.array([[1, 2, 3]] * 2, object), allow_pickle=True)
    with pytest.raises(WireError):
        unpack(with_field("float32", data=buffer.getvalue()), SMALL, "float32")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_that_are_not_finite_are_refused_by_tensor(dtype, value):
    last = {
        "float32": np.array([value], "<f4"),
        "bfloat16": np.array([value], "<f4").view("<u2")[1:],
        "float16": np.array([value], "<f2"),
    }[dtype].tobytes()
    data = last_data(dtype)
    # The last value: of a where tensors come apart, of b where a is first by name.
    with pytest.raises(WireError, match=r"^[ab] has values that are not finite$") as caught:
        unpack(with_field(dtype, data=data[: -len(last)] + last), SMALL, dtype)
    assert str(caught.value)[0] == ("a" if dtype == "float32" else "b")


@pytest.mark.parametrize("scale", [0.0, -0.0, -1.0, 3.0, 1.5, 1e-44, np.nan, np.inf, -np.inf])
def test_float16_scales_that_are_no_power_of_two_are_refused(scale):
    data = np.float32(scale).tobytes() + last_data("float16")[4:]
    with pytest.raises(WireError, match=r"^packed has a scale that is not a power of two$"):
        unpack(with_field("float16", data=data), SMALL, "float16")


def test_float16_products_that_overflow_are_refused():
    data = np.float32(2.0**127).tobytes() + np.full(306, 2, "<f2").tobytes()
    with pytest.raises(WireError, match=r"^b has values that are not finite$"):
        unpack(with_field("float16", data=data), SMALL, "float16")
    # Half of it is the largest power of two, and finite.
    data = np.float32(2.0**127).tobytes() + np.full(306, 1, "<f2").tobytes()
    assert unpack(with_field("float16", data=data), SMALL, "float16")["a"][0, 0] == 2.0**127


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("scale", [-1.0, -0.0, np.nan, np.inf, -np.inf])
def test_int8_scales_that_are_negative_or_not_finite_are_refused(scale, block):
    data = bytearray(last_data("int8"))
    data[4 * block : 4 * block + 4] = np.float32(scale).tobytes()
    with pytest.raises(WireError, match=r"^packed has a scale that is negative or not finite$"):
        unpack(with_field("int8", data=bytes(data)), SMALL, "int8")


def test_int8_products_that_overflow_are_refused():
    """The first scale is of a, whose values follow three scales."""
    data = bytearray(last_data("int8"))
    data[:4] = np.float32(TOP / 100).tobytes()
    data[12:18] = np.array([127] * 6, np.int8).tobytes()
    with pytest.raises(WireError, match=r"^a has values that are not finite$"):
        unpack(with_field("int8", data=bytes(data)), SMALL, "int8")
    data[12:18] = np.array([99] * 6, np.int8).tobytes()
    assert unpack(with_field("int8", data=bytes(data)), SMALL, "int8")["a"].max() > TOP / 2


def test_int8_minus_128_is_refused():
    data = last_data("int8")
    with pytest.raises(WireError, match=r"^packed has a value outside \[-127, 127\]$"):
        unpack(with_field("int8", data=data[:-1] + b"\x80"), SMALL, "int8")
    assert unpack(with_field("int8", data=data[:-1] + b"\x81"), SMALL, "int8")["b"][-1] < 0


def test_what_was_read_does_not_change_with_the_record():
    record = honest("float32")
    got = unpack(record, SMALL, "float32")
    got["a"][:] = 7
    assert not np.array_equal(unpack(record, SMALL, "float32")["a"], got["a"])
