"""Keys, sealed shares and mask streams, all of the ``cryptography`` package."""

from __future__ import annotations

import hashlib
import secrets

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Words = npt.NDArray[np.uint32]
KEY_BYTES = 32
# Every key below is used for one message or one stream, so that a nonce may be fixed.
_STREAM_NONCE, _SEAL_NONCE = bytes(16), bytes(12)


class WrongKey(ValueError):
    """A public key that no key agreement can use, or a sealed share that does not open."""


def new_secret() -> bytes:
    """32 bytes from the operating system: an X25519 private key, or a mask's seed."""
    return secrets.token_bytes(KEY_BYTES)


def public_key(secret: bytes) -> bytes:
    """The X25519 public key of a secret."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def digest(secret: bytes) -> bytes:
    """SHA-256 of a secret seed, by which the server sees that it was put together rightly."""
    return hashlib.sha256(b"dp-lora self-mask" + secret).digest()


def agree(secret: bytes, public: bytes, purpose: str) -> bytes:
    """Key that both sides of an X25519 agreement derive for one purpose (HKDF-SHA256).

    Raises
    ------
    WrongKey
        If ``public`` is no usable key.
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(secret).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError as error:  # of low order, or of another length
        raise WrongKey("a public key cannot be used") from error
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=b"dp-lora " + purpose.encode()).derive(shared)


def seal(key: bytes, text: bytes) -> bytes:
    """Encrypt and authenticate the only message of a key (ChaCha20-Poly1305)."""
    return ChaCha20Poly1305(key).encrypt(_SEAL_NONCE, text, None)


def unseal(key: bytes, sealed: bytes) -> bytes:
    """Open what :func:`seal` made.

    Raises
    ------
    WrongKey
        If it was made with another key or changed on its way.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(_SEAL_NONCE, sealed, None)
    except InvalidTag as error:
        raise WrongKey("a sealed share does not open") from error


def mask(seed: bytes, count: int) -> Words:
    """A stream of uniform 32-bit words from a 32-byte seed (ChaCha20)."""
    cipher = Cipher(ChaCha20(seed, _STREAM_NONCE), mode=None)
    stream = cipher.encryptor().update(bytes(4 * count))
    return np.frombuffer(stream, dtype="<u4").astype(np.uint32)
