"""Oblivious HTTP (RFC 9458): requests that only the model's replica can read, as pure functions of bytes.

    encapsulated request   key id, KEM, KDF, AEAD (7 bytes) ‖ HPKE encapsulated key (32) ‖ sealed binary HTTP request
    encapsulated response  nonce (16 or 32 bytes) ‖ sealed binary HTTP response

HPKE (RFC 9180) is pyhpke's; the response key comes from the request's HPKE context, so an answer opens with nothing but
the secret of the request that it answers. Whatever cannot be opened gets one answer, whatever the cause.
"""

import secrets
import struct
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pyhpke import AEADId, CipherSuite, KDFId, KEMId
from pyhpke.exceptions import PyHPKEError

from ..errors import CapsuleError

REQUEST_TYPE = "message/ohttp-req"
RESPONSE_TYPE = "message/ohttp-res"
KEYS_TYPE = "application/ohttp-keys"
SIGNATURE_HEADER = "heliograph-signature"
"""Beside a key configuration: the operator's signature over it and the model's name."""
KEM = KEMId.DHKEM_X25519_HKDF_SHA256
KDF = KDFId.HKDF_SHA256
AEADS = {AEADId.AES128_GCM: (AESGCM, 16), AEADId.AES256_GCM: (AESGCM, 32), AEADId.CHACHA20_POLY1305: (ChaCha20Poly1305, 32)}
"""What seals an answer, and the length of its key; every nonce has 12 bytes."""
NONCE = 12
ENCAPSULATED_KEY = 32


@dataclass(frozen=True)
class KeyConfig:
    """A public key and the algorithms that it is used with (section 3.1)."""

    key_id: int
    public_key: bytes
    aeads: tuple[AEADId, ...] = (AEADId.AES128_GCM, AEADId.CHACHA20_POLY1305)

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


def seal_request(message: bytes, config: KeyConfig) -> tuple[bytes, Callable[[bytes], bytes]]:
    """Encapsulate a binary HTTP request (section 4.3).

    Returns the encapsulated request (message + 55 bytes) and the function that opens its answer, which raises
    CapsuleError for anything but that answer.
    """
    aead = config.aeads[0]
    suite = CipherSuite.new(KEM, KDF, aead)
    header = struct.pack(">BHHH", config.key_id, KEM.value, KDF.value, aead.value)
    enc, context = suite.create_sender_context(suite.kem.deserialize_public_key(config.public_key), _request_info(header))

    def open_answer(capsule: bytes) -> bytes:
        size = max(NONCE, AEADS[aead][1])
        key, nonce = _answer_keys(context, aead, enc, capsule[:size])
        try:
            return key.decrypt(nonce, capsule[size:], b"")
        except (InvalidTag, ValueError):
            raise CapsuleError("the answer cannot be opened: it is not the answer to this request") from None

    return header + enc + context.seal(message), open_answer


class Gateway:
    """The private keys of one model, by key id."""

    def __init__(self, private_keys: dict[int, bytes]):
        suite = CipherSuite.new(KEM, KDF, AEADId.AES128_GCM)
        self._keys = {key_id: suite.kem.deserialize_private_key(key) for key_id, key in private_keys.items()}
        self._suites = {aead.value: CipherSuite.new(KEM, KDF, aead) for aead in AEADS}

    def open_request(self, capsule: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
        """The binary HTTP request inside, and the function that seals its answer (section 4.4).

        Raises CapsuleError, the same for every cause.
        """
        refused = CapsuleError("the encapsulated request cannot be opened: fetch the key configuration again")
        if len(capsule) < 7 + ENCAPSULATED_KEY + 16:
            raise refused
        key_id, kem, kdf, aead_id = struct.unpack_from(">BHHH", capsule)
        suite, key = self._suites.get(aead_id), self._keys.get(key_id)
        if kem != KEM.value or kdf != KDF.value or suite is None or key is None:
            raise refused
        enc = capsule[7 : 7 + ENCAPSULATED_KEY]
        try:
            context = suite.create_recipient_context(enc, key, _request_info(capsule[:7]))
            message = context.open(capsule[7 + ENCAPSULATED_KEY :])
        except (PyHPKEError, ValueError):
            raise refused from None
        aead = AEADId(aead_id)

        def seal_answer(answer: bytes) -> bytes:
            response_nonce = secrets.token_bytes(max(NONCE, AEADS[aead][1]))
            key, nonce = _answer_keys(context, aead, enc, response_nonce)
            return response_nonce + key.encrypt(nonce, answer, b"")

        return message, seal_answer


def _request_info(header: bytes) -> bytes:
    return b"message/bhttp request\0" + header


def _answer_keys(context, aead: AEADId, enc: bytes, response_nonce: bytes):
    cipher, size = AEADS[aead]
    secret = context.export(b"message/bhttp response", max(NONCE, size))

    def derive(label: bytes, length: int) -> bytes:
        return HKDF(hashes.SHA256(), length, salt=enc + response_nonce, info=label).derive(secret)

    return cipher(derive(b"key", size)), derive(b"nonce", NONCE)
