"""Thin SVDs and sums of products against dense numpy."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from strategies.low_rank import ProductSum, numerical_rank, qr_core_svd

MANY = hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
SIZES = st.integers(1, 12)
SEEDS = st.integers(0, 2**32 - 1)
EPS = np.finfo(np.float64).eps


def random_factors(m: int, n: int, inner: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((m, inner)), generator.standard_normal((inner, n))


def orthonormal(rows: int, columns: int, generator: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(generator.standard_normal((rows, columns)))[0]


def known_factors(m: int, n: int, s: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors of a product with singular values s, mixed by an orthogonal matrix."""
    generator = np.random.default_rng(seed)
    mixing = orthonormal(len(s), len(s), generator)
    left = orthonormal(m, len(s), generator) * s
    right = orthonormal(n, len(s), generator).T
    return left @ mixing, mixing.T @ right


def assert_signs(vt: np.ndarray) -> None:
    for row in vt:
        assert row[np.argmax(np.abs(row))] > 0


def assert_orthonormal(u: np.ndarray, vt: np.ndarray) -> None:
    np.testing.assert_allclose(u.T @ u, np.eye(u.shape[1]), atol=1e-12)
    np.testing.assert_allclose(vt @ vt.T, np.eye(len(vt)), atol=1e-12)


@MANY
@given(m=SIZES, n=SIZES, inner=st.integers(1, 20), rank=st.none() | st.integers(1, 25), seed=SEEDS)
def test_a_truncated_svd_is_the_best_approximation_of_its_rank(m, n, inner, rank, seed) -> None:
    b, a = random_factors(m, n, inner, seed)
    dense = b @ a
    expected = np.linalg.svd(dense, compute_uv=False)
    u, s, vt = qr_core_svd(b, a, rank)

    kept = min(x for x in (rank, m, n, inner) if x is not None)
    assert (u.shape, s.shape, vt.shape) == ((m, kept), (kept,), (kept, n))
    assert u.dtype == s.dtype == vt.dtype == np.float64
    np.testing.assert_allclose(s, expected[:kept], rtol=1e-10, atol=1e-14 * expected[0])
    assert (np.diff(s) <= 0).all()
    assert_orthonormal(u, vt)
    assert_signs(vt)
    # Eckart-Young: no matrix of this rank is closer, in either norm.
    rest = dense - (u * s) @ vt
    tail = np.append(expected[kept:], 0.0)
    assert np.linalg.norm(rest, 2) == pytest.approx(tail[0], rel=1e-8, abs=1e-12 * expected[0])
    assert np.linalg.norm(rest) == pytest.approx(
        np.linalg.norm(tail), rel=1e-8, abs=1e-12 * expected[0]
    )


@MANY
@given(m=st.integers(5, 40), n=st.integers(5, 40), rank=st.integers(1, 5), seed=SEEDS)
def test_where_singular_values_differ_the_factors_are_numpys(m, n, rank, seed) -> None:
    b, a = known_factors(m, n, 3.0 * 0.5 ** np.arange(5), seed)
    u, s, vt = qr_core_svd(b, a, rank)
    dense_u, dense_s, dense_vt = np.linalg.svd(b @ a, full_matrices=False)
    truncated = (dense_u[:, :rank] * dense_s[:rank]) @ dense_vt[:rank]
    np.testing.assert_allclose(s, 3.0 * 0.5 ** np.arange(rank), rtol=1e-12)
    np.testing.assert_allclose((u * s) @ vt, truncated, atol=1e-10)
    # Same vectors up to their sign, and the same sign for u as for vt.
    signs = np.sign(np.sum(vt * dense_vt[:rank], axis=1))
    np.testing.assert_allclose(vt, dense_vt[:rank] * signs[:, None], atol=1e-10)
    np.testing.assert_allclose(u, dense_u[:, :rank] * signs, atol=1e-10)


@MANY
@given(m=st.integers(4, 20), n=st.integers(4, 20), flips=st.integers(1, 15), seed=SEEDS)
def test_signs_and_order_of_the_inner_dimension_do_not_show(m, n, flips, seed) -> None:
    b, a = known_factors(m, n, np.array([4.0, 2.0, 1.0, 0.5]), seed)
    signs = np.array([-1.0 if flips >> bit & 1 else 1.0 for bit in range(4)])
    order = np.random.default_rng(seed).permutation(4)
    plain = qr_core_svd(b, a)
    for other in (
        qr_core_svd(b * signs, signs[:, None] * a),
        qr_core_svd(b[:, order], a[order]),
    ):
        for ours, theirs in zip(plain, other, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-9)
    for ours, theirs in zip(plain, qr_core_svd(b.copy(), a.copy()), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_first_of_tied_entries_is_positive(sign: float) -> None:
    # All entries of vt tie but for rounding, which must not choose among them.
    row = np.array([[-1.0, 1.0, 1.0, -1.0, 1.0, -1.0, 1.0]]) / 3
    for exact in (row, row * (1 + np.arange(7) * EPS)):
        u, s, vt = qr_core_svd(sign * np.array([[1.0], [2.0]]), exact)
        np.testing.assert_allclose(vt, [np.array([1, -1, -1, 1, -1, 1, -1]) / 7**0.5], atol=1e-12)
        np.testing.assert_allclose((u * s) @ vt, sign * np.array([[1.0], [2.0]]) @ row, atol=1e-12)


@MANY
@given(m=SIZES, n=SIZES, true=st.integers(1, 4), inner=st.integers(5, 16), seed=SEEDS)
def test_rank_deficient_products(m, n, true, inner, seed) -> None:
    b, a = random_factors(m, n, true, seed)
    generator = np.random.default_rng(seed + 1)
    mixing = orthonormal(inner, true, generator)
    wide_b, tall_a = b @ mixing.T, mixing @ a
    u, s, vt = qr_core_svd(wide_b, tall_a)
    true = min(true, m, n)
    np.testing.assert_allclose((u * s) @ vt, b @ a, atol=1e-12)
    assert_orthonormal(u, vt)
    assert len(s) == min(m, n, inner)
    assert (s[true:] < 1e-12 * s[0]).all()
    total = ProductSum()
    total.add(wide_b, tall_a, 1.0)
    left, right = total.factors()
    assert left.shape[1] == len(right) == np.linalg.matrix_rank(b @ a)
    np.testing.assert_allclose(left @ right, b @ a, atol=1e-12)


def test_a_zero_product_has_zero_singular_values_and_orthonormal_vectors() -> None:
    u, s, vt = qr_core_svd(np.zeros((6, 3)), np.ones((3, 4)), 2)
    np.testing.assert_array_equal(s, [0.0, 0.0])
    assert_orthonormal(u, vt)
    assert numerical_rank(s, (6, 4)) == 0
    # Nonzero factors that are orthogonal to each other.
    _, s, _ = qr_core_svd(np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([[0.0, 0.0], [3.0, 1.0]]))
    np.testing.assert_array_equal(s, [0.0, 0.0])


@pytest.mark.parametrize(("m", "inner", "n"), [(3, 0, 4), (0, 2, 4), (3, 2, 0)])
def test_an_empty_dimension_gives_empty_factors(m: int, inner: int, n: int) -> None:
    u, s, vt = qr_core_svd(np.zeros((m, inner)), np.zeros((inner, n)), 2)
    assert (u.shape, s.shape, vt.shape) == ((m, 0), (0,), (0, n))


def test_numerical_rank_counts_what_is_above_rounding() -> None:
    floor = 100 * EPS * 4.0
    s = np.array([4.0, 2 * floor, 0.5 * floor, 0.0])
    assert numerical_rank(s, (100, 7)) == numerical_rank(s, (7, 100)) == 2
    assert numerical_rank(s, (20, 7)) == 3
    assert numerical_rank(s, (100, 7), scale=40.0) == 1
    assert numerical_rank(s, (100, 7), scale=0.1) == 2
    assert numerical_rank(np.zeros(3), (5, 3)) == 0
    assert numerical_rank(np.zeros(0), (5, 0)) == 0


@MANY
@given(
    m=SIZES,
    n=SIZES,
    terms=st.lists(st.tuples(st.integers(0, 15), st.floats(-10, 10)), min_size=1, max_size=30),
    rank=st.integers(1, 12),
    seed=SEEDS,
)
def test_the_sum_is_the_dense_sum(m, n, terms, rank, seed) -> None:
    """Differing ranks, weights of both signs, stacks below and above the threshold."""
    total, dense, size = ProductSum(), np.zeros((m, n)), 1.0
    for index, (inner, weight) in enumerate(terms):
        b, a = random_factors(m, n, inner, (seed + index) % 2**32)
        total.add(b, a, weight)
        dense += weight * b @ a
        size += abs(weight) * np.linalg.norm(b) * np.linalg.norm(a)
    left, right = total.factors()
    assert left.shape[0] == m and right.shape[1] == n and left.shape[1] == len(right) <= min(m, n)
    np.testing.assert_allclose(left @ right, dense, atol=1e-13 * size)
    u, s, vt = total.svd(rank)
    expected = np.linalg.svd(dense, compute_uv=False)[:rank]
    np.testing.assert_allclose(s, expected[: len(s)], atol=1e-13 * size)
    np.testing.assert_allclose(expected[len(s) :], 0.0, atol=1e-13 * size)
    assert_orthonormal(u, vt)
    tail = np.linalg.svd(dense - (u * s) @ vt, compute_uv=False)[0]
    full = np.append(np.linalg.svd(dense, compute_uv=False), np.zeros(12))
    assert tail == pytest.approx(full[rank], abs=1e-13 * size)


def test_a_thin_sum_has_the_rank_of_its_terms() -> None:
    total, dense = ProductSum(), np.zeros((50, 40))
    for index, (inner, weight) in enumerate([(2, 1.5), (4, -0.5), (3, 2.0)]):
        b, a = random_factors(50, 40, inner, index)
        total.add(b, a, weight)
        dense += weight * b @ a
    left, right = total.factors()
    assert (left.shape, right.shape) == ((50, 9), (9, 40))
    np.testing.assert_allclose(left @ right, dense, atol=1e-12)
    np.testing.assert_allclose(right @ right.T, np.eye(9), atol=1e-12)
    # The weights are in left: twice the weights, twice left.
    double = ProductSum()
    double.add(left, right, 2.0)
    np.testing.assert_allclose(double.factors()[0], 2 * left, atol=1e-11)
    np.testing.assert_allclose(double.factors()[1], right, atol=1e-11)


def test_terms_of_very_different_size_are_kept_up_to_rounding_of_the_largest() -> None:
    large, small = random_factors(20, 20, 2, 0), random_factors(20, 20, 2, 1)
    total = ProductSum()
    total.add(*large, 1.0)
    total.add(*small, 1e-9)
    assert total.factors()[0].shape[1] == 4
    total = ProductSum()
    total.add(*large, 1.0)
    total.add(*small, 1e-18)
    assert total.factors()[0].shape[1] == 2


@pytest.mark.parametrize("rounds", [1, 40])
def test_terms_that_cancel_leave_nothing(rounds: int) -> None:
    total = ProductSum()
    for index in range(rounds):
        total.add(*random_factors(12, 9, 4, index), 1.0 / 3)
    for index in range(rounds):
        total.add(*random_factors(12, 9, 4, index), -1.0 / 3)
    left, right = total.factors()
    assert (left.shape, right.shape) == ((12, 0), (0, 9))
    survivor = random_factors(12, 9, 2, 99)
    total.add(*survivor, 1.0)
    left, right = total.factors()
    assert left.shape[1] == 2
    np.testing.assert_allclose(left @ right, survivor[0] @ survivor[1], atol=1e-12)


def test_sums_of_nothing_but_zeros_are_empty() -> None:
    b, a = random_factors(5, 4, 2, 0)
    for term in ((b, a, 0.0), (np.zeros_like(b), a, 1.0), (b[:, :0], a[:0], 1.0)):
        total = ProductSum()
        total.add(*term)
        left, right = total.factors()
        assert (left.shape, right.shape) == ((5, 0), (0, 4))
        u, s, vt = total.svd(3)
        assert u.shape[0] == 5 and vt.shape[1] == 4 and not s.any()


@pytest.mark.parametrize(("m", "n"), [(300, 20), (20, 300), (32, 32)])
def test_memory_does_not_grow_with_the_number_of_terms(m: int, n: int) -> None:
    total, dense, most = ProductSum(), np.zeros((m, n)), 0
    bound = 2 * min(m, n) * (m + n) * 8
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for index in range(200):
            b, a = random_factors(m, n, 3, index)
            total.add(b, a, 1 / 200)
            dense += b @ a / 200
            del b, a
            most = max(most, tracemalloc.get_traced_memory()[0] - before)
    finally:
        tracemalloc.stop()
    # The documented bound, which is used (it is no test otherwise), and the arrays' headers.
    assert 0.9 * bound < most < bound + 10_000 < 200 * 3 * (m + n) * 8 / 4
    left, right = total.factors()
    np.testing.assert_allclose(left @ right, dense, atol=1e-12)


def test_terms_without_columns_take_no_memory() -> None:
    total, b, a = ProductSum(), np.zeros((5, 0)), np.zeros((0, 4))
    total.add(b, a, 1.0)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(500):
            total.add(b, a, 1.0)
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert held < 5_000


def test_one_term_of_large_rank_is_compressed_at_once() -> None:
    b, a = random_factors(4, 5, 5000, 0)
    total = ProductSum()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        total.add(b, a, 1.0)
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert held < 20_000 < b.nbytes
    left, right = total.factors()
    assert left.shape == (4, 4)
    np.testing.assert_allclose(left @ right, b @ a, atol=1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_callers_arrays_and_the_sums_do_not_alias(dtype: type) -> None:
    b, a = (part.astype(dtype) for part in random_factors(7, 6, 2, 0))
    kept_b, kept_a = b.copy(), a.copy()
    dense = b.astype(np.float64) @ a.astype(np.float64)
    total = ProductSum()
    total.add(b, a, 1.0)
    total.svd(1)
    np.testing.assert_array_equal(b, kept_b)
    np.testing.assert_array_equal(a, kept_a)
    b[:], a[:] = 9.0, 9.0
    for _ in range(2):  # what was handed out is the caller's too
        left, right = total.factors()
        np.testing.assert_allclose(left @ right, dense, atol=1e-13)
        left[:], right[:] = 5.0, 5.0
        for part in total.svd(2):
            part[:] = 5.0


def test_float32_factors_are_worked_on_in_float64() -> None:
    b, a = (part.astype(np.float32) for part in random_factors(30, 20, 4, 0))
    dense = b.astype(np.float64) @ a.astype(np.float64)
    u, s, vt = qr_core_svd(b, a)
    assert u.dtype == s.dtype == vt.dtype == np.float64
    np.testing.assert_allclose((u * s) @ vt, dense, atol=1e-12)
    total = ProductSum()
    total.add(b, a, 0.1)
    left, right = total.factors()
    assert left.dtype == right.dtype == np.float64
    np.testing.assert_allclose(left @ right, 0.1 * dense, atol=1e-12)


def test_views_of_any_layout_are_read_right() -> None:
    b, a = random_factors(8, 6, 6, 0)
    b, a = np.asfortranarray(b)[:, ::2], a.T[:, ::-2].T
    u, s, vt = qr_core_svd(b, a)
    np.testing.assert_allclose((u * s) @ vt, b @ a, atol=1e-12)


BAD_FACTORS = [
    pytest.param(np.ones((3, 2)), np.ones((3, 4)), r"\(3, 2\) and \(3, 4\)", id="inner"),
    pytest.param(np.ones(3), np.ones((3, 4)), r"factors must be", id="1-D b"),
    pytest.param(np.ones((3, 4)), np.ones(4), r"factors must be", id="1-D a"),
    pytest.param(np.ones((2, 3, 4)), np.ones((3, 4)), r"factors must be", id="3-D"),
    pytest.param(np.full((3, 2), np.nan), np.ones((2, 4)), "not finite", id="nan"),
    pytest.param(np.ones((3, 2)), np.full((2, 4), -np.inf), "not finite", id="inf"),
    pytest.param(np.full((3, 2), 1e200), np.full((2, 4), 1e200), "overflows", id="overflow"),
]


@pytest.mark.parametrize(("b", "a", "text"), BAD_FACTORS)
def test_bad_factors_are_refused(b, a, text) -> None:
    with pytest.raises(ValueError, match=text):
        qr_core_svd(b, a)
    with pytest.raises(ValueError, match=text):
        ProductSum().add(b, a, 1.0)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank: int) -> None:
    b, a = random_factors(3, 4, 2, 0)
    total = ProductSum()
    total.add(b, a, 1.0)
    with pytest.raises(ValueError, match="at least 1"):
        qr_core_svd(b, a, rank)
    with pytest.raises(ValueError, match="at least 1"):
        total.svd(rank)


def test_a_refused_term_leaves_the_sum_as_it_was() -> None:
    b, a = random_factors(5, 4, 2, 0)
    total = ProductSum()
    total.add(b, a, 1.0)
    for other_b, other_a, weight, text in [
        (*random_factors(6, 4, 2, 1), 1.0, r"\(6, 4\) cannot join a sum of \(5, 4\)"),
        (*random_factors(5, 3, 2, 1), 1.0, r"\(5, 3\) cannot join a sum of \(5, 4\)"),
        (*random_factors(6, 4, 2, 1), 0.0, "cannot join"),
        (b, a, float("nan"), "weight is not finite"),
        (b, a, float("inf"), "weight is not finite"),
        (b * 1e10, a, 1e308, "overflows"),
        (b * np.nan, a, 0.0, "not finite"),
    ]:
        with pytest.raises(ValueError, match=text):
            total.add(other_b, other_a, weight)
    left, right = total.factors()
    assert left.shape[1] == 2
    np.testing.assert_allclose(left @ right, b @ a, atol=1e-13)


def test_a_sum_without_terms_has_no_shape() -> None:
    with pytest.raises(ValueError, match="nothing was added"):
        ProductSum().factors()
    with pytest.raises(ValueError, match="nothing was added"):
        ProductSum().svd(1)
    refused = ProductSum()
    with pytest.raises(ValueError, match="not finite"):
        refused.add(np.full((3, 1), np.nan), np.ones((1, 3)), 1.0)
    with pytest.raises(ValueError, match="nothing was added"):
        refused.factors()
