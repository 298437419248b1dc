"""Shamir's secret sharing of 32 bytes: any ``threshold`` shares give them, fewer nothing."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

# The smallest prime above 2^256: every 32-byte secret is below it.
PRIME = 2**256 + 297
SECRET_BYTES, SHARE_BYTES = 32, 33


def split(secret: bytes, count: int, threshold: int) -> list[bytes]:
    """Shares 1 to ``count`` of a secret (Shamir, 1979).

    Parameters
    ----------
    secret : bytes
        32 bytes.
    count, threshold : int
        Shares to make, and how many of them give the secret, 1 <= threshold <= count.

    Notes
    -----
    Formal guarantee: any ``threshold - 1`` shares are independent and uniform, whatever the secret
    is (a polynomial of degree ``threshold - 1`` over a prime field, drawn by ``secrets``).
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes, got {len(secret)}")
    if not 1 <= threshold <= count:
        raise ValueError(f"threshold must be from 1 to {count}, got {threshold}")
    terms = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = []
    for x in range(1, count + 1):
        value = 0
        for term in reversed(terms):
            value = (value * x + term) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES))
    return shares


def join(shares: Mapping[int, bytes]) -> bytes:
    """The secret, by its shares' numbers (from 1); all of these are used.

    Raises
    ------
    ValueError
        If these are no shares of one 32-byte secret, as far as can be seen.
    """
    values = {x: int.from_bytes(share) for x, share in shares.items()}
    if not values or any(value >= PRIME for value in values.values()):
        raise ValueError("these are no shares")
    secret = 0
    for x, value in values.items():
        above = below = 1
        for other in values:
            if other != x:
                above = above * other % PRIME
                below = below * (other - x) % PRIME
        secret = (secret + value * above * pow(below, -1, PRIME)) % PRIME
    if secret >= 2 ** (8 * SECRET_BYTES):
        raise ValueError("these are not shares of one secret")
    return secret.to_bytes(SECRET_BYTES)
