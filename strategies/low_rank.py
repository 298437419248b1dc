"""Products of thin factors, and weighted sums of them, without the dense m x n matrix.

LoRA changes a weight matrix by ``B A``, B of shape (m, r) and A of shape (r, n).  Methods that
aggregate the products themselves (FLoRA, arXiv 2409.05976; FlexLoRA, 2402.11505; FedEx-LoRA,
2410.09432; FedSVD, 2505.12805) need the SVD of one product, or of ``sum_k w_k B_k A_k``, which is
again one product: that of the stacked factors.  All work is done in float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt


class NotFinite(ValueError):
    """A factor, or a product, has left the range of its dtype."""


Floats = npt.NDArray[np.floating[Any]]
Float64s = npt.NDArray[np.float64]
Svd = tuple[Float64s, Float64s, Float64s]

# Relative margin of a tie: without it, rounding would choose between equal entries.
_TIE = 1e-8


def qr_core_svd(b: Floats, a: Floats, rank: int | None = None) -> Svd:
    """Truncated SVD of ``b @ a``, from the SVD of a small core.

    With ``b = Q_B R_B`` and ``a^T = Q_A R_A`` the product is ``Q_B (R_B R_A^T) Q_A^T``.  If
    ``U S V^T`` is the SVD of the core ``R_B R_A^T``, then ``(Q_B U) S (V^T Q_A^T)`` is that of the
    product, because Q_B and Q_A have orthonormal columns.  The core has shape
    (min(m, R), min(n, R)); the cost is O((m + n) R^2) for R up to min(m, n).

    Parameters
    ----------
    b, a : arrays of shapes (m, R) and (R, n)
        The factors.
    rank : int, optional
        Number of singular triplets returned at most; all min(m, n, R) without it.

    Returns
    -------
    u, s, vt : arrays of shapes (m, k), (k,) and (k, n)
        k = min(rank, m, n, R); s descends.  In each row of vt the entry of largest magnitude is
        positive, the first one on ties (magnitudes within 1e-8 of the largest are tied).

    Raises
    ------
    ValueError
        If shapes do not fit, rank is below 1, or a value or the product is not finite.

    Notes
    -----
    Rounding is relative to ``sum_j ||b_j|| ||a_j||`` (columns of b, rows of a), far above s[0] if
    terms cancel.  Vectors of zero or repeated singular values are orthonormal, else arbitrary.
    """
    left, right = _as_factors(b, a)
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    most = min(*left.shape, right.shape[1])
    kept = most if rank is None else min(rank, most)
    if kept == 0:
        return np.zeros((left.shape[0], 0)), np.zeros(0), np.zeros((0, right.shape[1]))
    left_basis, left_core = np.linalg.qr(left)
    right_basis, right_core = np.linalg.qr(right.T)
    with np.errstate(over="ignore", invalid="ignore"):
        core = left_core @ right_core.T
    if not np.isfinite(core).all():
        raise NotFinite("the product of the factors overflows float64")
    core_u, s, core_vt = np.linalg.svd(core, full_matrices=False)
    u, vt = left_basis @ core_u[:, :kept], core_vt[:kept] @ right_basis.T
    sizes = np.abs(vt)
    first = np.argmax(sizes >= (1 - _TIE) * sizes.max(axis=1, keepdims=True), axis=1)
    signs = np.where(vt[np.arange(kept), first] < 0, -1.0, 1.0)
    return u * signs, s[:kept].copy(), vt * signs[:, None]


def numerical_rank(s: Float64s, shape: tuple[int, int], scale: float = 0.0) -> int:
    """Singular values above ``max(shape) * eps * max(s[0], scale)``, counted; eps of float64.

    The rule of ``numpy.linalg.matrix_rank``, but for ``scale``; 0 for an empty or zero ``s``.

    Parameters
    ----------
    s : array of shape (k,)
        Singular values, descending.
    shape : tuple of int
        Shape (m, n) of the matrix.
    scale : float (default: 0.0)
        Size of the terms that the matrix sums.  Their rounding errors stay when they cancel.
    """
    largest = max([scale, *s[:1]])
    return int(np.count_nonzero(s > max(shape) * np.finfo(np.float64).eps * largest))


class ProductSum:
    """Running weighted sum ``sum_k w_k B_k A_k`` of products of thin factors, kept thin.

    ``[w_1 B_1, w_2 B_2, ...] @ [A_1; A_2; ...]`` is the sum (as FLoRA stacks them,
    arXiv 2409.05976).  A stack of rank above 2 min(m, n) is replaced by its own SVD, of rank
    min(m, n), which holds the same sum up to rounding.

    Memory: at most 2 min(m, n) (m + n) float64 values between calls, however many calls there
    were, and a few times as much while one runs.  A few clients' factors are far below that; a
    full stack is larger than the dense m x n sum.  Cost: O((m + n) r) for an add that only
    stacks, O((m + n) R^2) for anything else, R being the rank of the stack.
    """

    def __init__(self) -> None:
        self._shape: tuple[int, int] | None = None
        self._lefts: list[Float64s] = []
        self._rights: list[Float64s] = []
        self._stacked, self._scale = 0, 0.0

    def add(self, b: Floats, a: Floats, weight: float) -> None:
        """Add ``weight * b @ a``; a call that raises leaves the sum as it was.

        Parameters
        ----------
        b, a : arrays of shapes (m, r) and (r, n)
            The factors, copied.  r may differ from call to call, m and n may not.
        weight : float
            Any finite number, negative ones included.

        Raises
        ------
        ValueError
            If shapes do not fit each other or the sum, a value or the weight is not finite, or
            the terms' norms overflow float64.
        """
        left, right = _as_factors(b, a)
        if not math.isfinite(weight):
            raise ValueError("the weight is not finite")
        shape = (left.shape[0], right.shape[1])
        if self._shape not in (None, shape):
            raise ValueError(f"a product of shape {shape} cannot join a sum of {self._shape}")
        with np.errstate(over="ignore", invalid="ignore"):
            left = left * weight
            # Per column: QR errs by eps of each column's norm, so this is what rounding is of.
            norms = np.linalg.norm(left, axis=0) * np.linalg.norm(right, axis=1)
            scale = self._scale + float(norms.sum())
        if not math.isfinite(scale):
            raise NotFinite("the sum overflows float64")
        self._shape, self._scale = shape, scale
        if left.shape[1] == 0:
            return
        self._lefts.append(left)
        self._rights.append(right.copy())
        self._stacked += left.shape[1]
        if self._stacked > 2 * min(shape):
            # Nothing is dropped as zero here: what is below the floor now may add up later.
            u, s, vt = self.svd()
            self._lefts, self._rights, self._stacked = [u * s], [vt], s.size

    def factors(self) -> tuple[Float64s, Float64s]:
        """Factors of the sum, as thin as float64 can tell.

        Dropped are singular values up to max(m, n) eps times the summed ``|w_k| ||b_j|| ||a_j||``
        of all that was added (b_j a column of B_k, a_j a row of A_k): mere rounding, which is all
        that is left of terms that cancel.

        Returns
        -------
        left, right : arrays of shapes (m, R) and (R, n)
            R is the numerical rank of the sum, 0 included.  The rows of right are orthonormal;
            weights and singular values are in left.

        Raises
        ------
        ValueError
            If nothing was added.
        """
        u, s, vt = self.svd()
        rank = numerical_rank(s, (u.shape[0], vt.shape[1]), self._scale)
        return u[:, :rank] * s[:rank], vt[:rank].copy()

    def svd(self, rank: int | None = None) -> Svd:
        """Truncated SVD of the sum: :func:`qr_core_svd` of the stack, zeros not dropped.

        Raises
        ------
        ValueError
            If nothing was added or the rank is below 1.
        """
        if self._shape is None:
            raise ValueError("nothing was added to the sum")
        m, n = self._shape
        left = np.concatenate([np.zeros((m, 0)), *self._lefts], axis=1)
        right = np.concatenate([np.zeros((0, n)), *self._rights], axis=0)
        return qr_core_svd(left, right, rank)


def _as_factors(b: Floats, a: Floats) -> tuple[Float64s, Float64s]:
    """Both factors in float64, or ValueError; no copy of what is float64 already."""
    left, right = np.asarray(b, dtype=np.float64), np.asarray(a, dtype=np.float64)
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(f"factors must be (m, R) and (R, n), not {left.shape} and {right.shape}")
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise NotFinite("a factor has values that are not finite")
    return left, right
