"""Oblivious HTTP (RFC 9458): requests that only the model's replica can read, as pure functions of bytes.

    encapsulated request   key id, KEM, KDF, AEAD (7 bytes) ‖ HPKE encapsulated key (32) ‖ sealed binary HTTP request
    encapsulated response  nonce (16 or 32 bytes) ‖ sealed binary HTTP response

In the chunked form (draft-ietf-ohai-chunked-ohttp-08) what is sealed comes in pieces, each behind its length, the last one
behind a zero: none can be left out, repeated, exchanged or added.

HPKE (RFC 9180) is pyhpke's where it seals, and ours where it opens (`hpke`). The response key comes from the request's HPKE
context, so an answer opens with nothing but the secret of the request that it answers. Whatever cannot be opened gets one
answer, whatever the cause.
"""

import secrets
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidTag
from pyhpke import AEADId, CipherSuite, KDFId, KEMId

from ..errors import CapsuleError
from . import bhttp, hpke
from .hpke import NONCE, numbered

REQUEST_TYPE = "message/ohttp-req"
RESPONSE_TYPE = "message/ohttp-res"
CHUNKED_REQUEST_TYPE = "message/ohttp-chunked-req"
CHUNKED_RESPONSE_TYPE = "message/ohttp-chunked-res"
MAX_SEALED = (18 << 20) + 4096
"""Bytes of a capsule: its content is padded by an eighth at most."""
CHUNK = 16 << 10
"""Bytes of a piece, which every receiver must take."""
KEYS_TYPE = "application/ohttp-keys"
SIGNATURE_HEADER = "heliograph-signature"
"""Beside a key configuration: the operator's signature over it and the model's name."""
KEM = KEMId.DHKEM_X25519_HKDF_SHA256
KDF = KDFId.HKDF_SHA256
AEADS = (AEADId.AES128_GCM, AEADId.AES256_GCM, AEADId.CHACHA20_POLY1305)
ENCAPSULATED_KEY = 32


@dataclass(frozen=True)
class KeyConfig:
    """A public key and the algorithms that it is used with (section 3.1)."""

    key_id: int
    public_key: bytes
    aeads: tuple[AEADId, ...] = AEADS

    def encode(self) -> bytes:
        algorithms = b"".join(struct.pack(">HH", KDF.value, aead.value) for aead in self.aeads)
        return struct.pack(">BH", self.key_id, KEM.value) + self.public_key + struct.pack(">H", len(algorithms)) + algorithms


def encode_configs(configs: list[KeyConfig]) -> bytes:
    """`application/ohttp-keys` (section 3.2): each configuration behind its length."""
    return b"".join(struct.pack(">H", len(c.encode())) + c.encode() for c in configs)


def decode_configs(data: bytes) -> list[KeyConfig]:
    """The configurations that this side can use, in the server's order. Raises CapsuleError when there is none."""
    found = []
    try:
        while data:
            (length,) = struct.unpack_from(">H", data)
            body, data = data[2 : 2 + length], data[2 + length :]
            if len(body) != length:
                raise CapsuleError("the key configuration ends early")
            key_id, kem = struct.unpack_from(">BH", body)
            if kem != KEM.value:
                continue
            public, body = body[3:35], body[35:]
            (size,) = struct.unpack_from(">H", body)
            pairs = [struct.unpack_from(">HH", body, 2 + at) for at in range(0, size, 4)]
            aeads = tuple(AEADId(a) for k, a in pairs if k == KDF.value and any(a == known.value for known in AEADS))
            if len(public) == 32 and aeads:
                found.append(KeyConfig(key_id, public, aeads))
    except struct.error:
        raise CapsuleError("the key configuration ends early") from None
    if not found:
        raise CapsuleError("the server offers no key that this client can use")
    return found


def public_key(private: bytes) -> bytes:
    """The X25519 public key of 32 private bytes."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def seal_request(message: bytes, config: KeyConfig, chunked: bool = False) -> tuple[bytes, Callable[[bytes], bytes]]:
    """Encapsulate a binary HTTP request (section 4.3).

    Returns the encapsulated request (message + 55 bytes) and the function that opens its answer, which raises
    CapsuleError for anything but that answer.
    """
    aead = config.aeads[0]
    suite = CipherSuite.new(KEM, KDF, aead)
    header = struct.pack(">BHHH", config.key_id, KEM.value, KDF.value, aead.value)
    enc, context = suite.create_sender_context(
        suite.kem.deserialize_public_key(config.public_key), _request_info(header, chunked)
    )

    def open_answer(capsule: bytes) -> bytes:
        size = _answer_size(aead.value)
        key, nonce = _answer_keys(context, aead.value, enc, capsule[:size], chunked)
        try:
            if chunked:
                return _joined(capsule[size:], lambda piece, aad, i: key.decrypt(numbered(nonce, i), piece, aad))
            return key.decrypt(nonce, capsule[size:], b"")
        except (InvalidTag, ValueError):
            raise CapsuleError("the answer cannot be opened: it is not the answer to this request") from None

    sealed = _pieces(message, lambda piece, aad, _: context.seal(piece, aad)) if chunked else context.seal(message)
    return header + enc + sealed, open_answer


Opened = tuple[bytes, Callable[[bytes], bytes]]
"""What was inside a capsule, and the function that seals its answer."""


def name_of(capsule: bytes) -> bytes:
    """What a sealed request has for itself: the key that was made for it."""
    return capsule[7 : 7 + ENCAPSULATED_KEY]


class Gateway:
    """The private keys of one model, by key id."""

    def __init__(self, private_keys: dict[int, bytes]):
        self._keys = {key_id: hpke.PrivateKey(key) for key_id, key in private_keys.items()}

    def knows(self, capsule: bytes) -> bool:
        """Whether it has a key of the id that a capsule names."""
        return capsule[:1] != b"" and capsule[0] in self._keys

    def open_request(self, capsule: bytes, chunked: bool = False) -> Opened:
        """The binary HTTP request inside, and the function that seals its answer (section 4.4).

        Raises CapsuleError, the same for every cause.
        """
        refused = CapsuleError("the encapsulated request cannot be opened: fetch the key configuration again")
        if len(capsule) < 7 + ENCAPSULATED_KEY + 16:
            raise refused
        key_id, kem, kdf, aead = struct.unpack_from(">BHHH", capsule)
        key = self._keys.get(key_id)
        if kem != hpke.KEM or kdf != hpke.KDF or aead not in hpke.AEADS or key is None:
            raise refused
        enc, sealed = name_of(capsule), capsule[7 + ENCAPSULATED_KEY :]
        try:
            context = key.receive(enc, aead, _request_info(capsule[:7], chunked))
            message = _joined(sealed, context.open) if chunked else context.open(sealed)
        except (InvalidTag, ValueError, CapsuleError):
            raise refused from None

        def seal_answer(answer: bytes) -> bytes:
            response_nonce = secrets.token_bytes(_answer_size(aead))
            key, nonce = _answer_keys(context, aead, enc, response_nonce, chunked)
            if chunked:
                sealed = _pieces(answer, lambda piece, aad, i: key.encrypt(numbered(nonce, i), piece, aad))
            else:
                sealed = key.encrypt(nonce, answer, b"")
            return response_nonce + sealed

        return message, seal_answer


def _pieces(message: bytes, seal: Callable[[bytes, bytes, int], bytes]) -> bytes:
    """seal: (a piece, its associated data, its number) -> the piece sealed."""
    *others, last = [message[at : at + CHUNK] for at in range(0, len(message), CHUNK)] or [b""]
    sealed = [seal(piece, b"", i) for i, piece in enumerate(others)]
    return b"".join(bhttp.varint(len(s)) + s for s in sealed) + bhttp.varint(0) + seal(last, b"final", len(others))


def _joined(data: bytes, open_piece: Callable[[bytes, bytes, int], bytes]) -> bytes:
    """The inverse of `_pieces`. Raises CapsuleError, and what `open_piece` raises."""
    reader, found = bhttp.Reader(data), []
    while size := reader.varint():
        found.append(open_piece(reader.take(size), b"", len(found)))
    return b"".join([*found, open_piece(data[reader.at :], b"final", len(found))])


def _request_info(header: bytes, chunked: bool) -> bytes:
    return (b"message/bhttp chunked request\0" if chunked else b"message/bhttp request\0") + header


def _answer_size(aead: int) -> int:
    """Bytes of an answer's nonce and of the secret that its keys come from."""
    return max(NONCE, hpke.AEADS[aead][1])


def _answer_keys(context: Any, aead: int, enc: bytes, response_nonce: bytes, chunked: bool) -> tuple[Any, bytes]:
    label = b"message/bhttp chunked response" if chunked else b"message/bhttp response"
    key = hpke.extract(enc + response_nonce, context.export(label, _answer_size(aead)))
    cipher, size = hpke.AEADS[aead]
    return cipher(hpke.expand(key, b"key", size)), hpke.expand(key, b"nonce", NONCE)
