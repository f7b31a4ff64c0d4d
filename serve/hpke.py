"""The receiving half of HPKE (RFC 9180), base mode, for DHKEM(X25519, HKDF-SHA256) and HKDF-SHA256.

pyhpke, which seals, opens too, but its Python takes twice what the cryptography does, of every request. The primitives are
`cryptography`'s and the standard library's; what is here are the labels and their order. Each test of sealed requests holds
one half against the other; the standards' vectors hold both.
"""

import functools
import hashlib
import hmac
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

KEM, KDF = 0x0020, 0x0001
AEADS: dict[int, tuple[Any, int]] = {1: (AESGCM, 16), 2: (AESGCM, 32), 3: (ChaCha20Poly1305, 32)}
"""What seals, and the length of its key, by its number; every nonce has 12 bytes."""
NONCE, HASH = 12, 32


def extract(salt: bytes, key: bytes) -> bytes:
    """HKDF-Extract (RFC 5869)."""
    return hmac.digest(salt or bytes(HASH), key, hashlib.sha256)


def expand(key: bytes, info: bytes, length: int) -> bytes:
    """HKDF-Expand, of up to 32 bytes."""
    assert length <= HASH
    return hmac.digest(key, info + b"\1", hashlib.sha256)[:length]


def numbered(nonce: bytes, number: int) -> bytes:
    """The nonce of a message by its number, from 0."""
    return (int.from_bytes(nonce) ^ number).to_bytes(NONCE)


@functools.lru_cache(256)
def _context(suite: bytes, info: bytes) -> bytes:
    """The key schedule's context, the same for all requests to a key."""
    return b"\0" + _labeled_extract(suite, b"", b"psk_id_hash", b"") + _labeled_extract(suite, b"", b"info_hash", info)


def _labeled_extract(suite: bytes, salt: bytes, label: bytes, key: bytes) -> bytes:
    return extract(salt, b"HPKE-v1" + suite + label + key)


def _labeled_expand(suite: bytes, key: bytes, label: bytes, info: bytes, length: int) -> bytes:
    return expand(key, length.to_bytes(2) + b"HPKE-v1" + suite + label + info, length)


class PrivateKey:
    def __init__(self, private: bytes):
        """private: 32 bytes."""
        self._key = X25519PrivateKey.from_private_bytes(private)
        self._public = self._key.public_key().public_bytes_raw()

    def receive(self, enc: bytes, aead: int, info: bytes) -> "Receiver":
        """The context of what was sealed under the encapsulated key `enc`. Raises ValueError."""
        kem = b"KEM" + KEM.to_bytes(2)
        agreed = self._key.exchange(X25519PublicKey.from_public_bytes(enc))
        shared = _labeled_expand(kem, _labeled_extract(kem, b"", b"eae_prk", agreed), b"shared_secret", enc + self._public, HASH)
        suite = b"HPKE" + KEM.to_bytes(2) + KDF.to_bytes(2) + aead.to_bytes(2)
        return Receiver(suite, _labeled_extract(suite, shared, b"secret", b""), _context(suite, info), aead)


class Receiver:
    def __init__(self, suite: bytes, secret: bytes, context: bytes, aead: int):
        cipher, size = AEADS[aead]
        self._suite = suite
        self._cipher = cipher(_labeled_expand(suite, secret, b"key", context, size))
        self._nonce = _labeled_expand(suite, secret, b"base_nonce", context, NONCE)
        self._exporter = _labeled_expand(suite, secret, b"exp", context, HASH)

    def open(self, sealed: bytes, associated: bytes = b"", number: int = 0) -> bytes:
        """Raises InvalidTag and ValueError."""
        return self._cipher.decrypt(numbered(self._nonce, number), sealed, associated)

    def export(self, label: bytes, length: int) -> bytes:
        return _labeled_expand(self._suite, self._exporter, b"sec", label, length)
