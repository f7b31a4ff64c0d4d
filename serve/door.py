"""The door of a model: the keys that open sealed requests for it, and what it says of them in public.

The key store has a secret for each model, in versions (`NAME-hpke-1`, `-2`, …); `heliograph rotate-keys --requests` adds one.
From it comes an X25519 key for the model as a whole and one for each version of it, so that a request that was sealed for
version 3 is opened as one for version 3 or not at all. The newest is offered; those before it open requests for a grace time
after it came, for clients that still hold them. A replica looks at the key store when a request names a key that it does not
know, and whenever it is asked for its keys: no request fails because another replica saw a new key first. And it looks twice
a second, so that a key that was removed opens nothing any more.
"""

import base64
import logging
import time

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ..cluster.audit import Audit
from ..cluster.keys import KeyStore, request_key
from ..errors import KeyStoreError
from . import ohttp
from .client import signed_text

log = logging.getLogger("heliograph")
MOST_KEYS = 255
"""That a configuration's one-byte key id can tell apart."""
OFFER_SECONDS = 86_400.0
"""What a signed configuration is good for, and no longer than a key's grace."""
FRESH_NS = 50_000_000
"""A folder that changed as lately as this may change again without its time telling."""


class Door:
    """version: None for requests that name no version. grace: seconds. Raises KeyStoreError."""

    def __init__(self, keys: KeyStore, model: str, version: int | None, grace: float):
        self.model, self.version, self._keys, self._grace = model, version, keys, grace
        self._private: dict[int, bytes] = {}
        """By the secret's version; the newest is last."""
        self._seen, self._next = 0, 0.0
        """The folder's time when it was read; when the next key's grace ends."""
        self._offer: tuple[bytes, str, float] | None = None
        if not keys.versions(request_key(model)):
            keys.rotate(request_key(model))
        self._read()

    def open_request(self, capsule: bytes, chunked: bool) -> ohttp.Opened:
        """Raises CapsuleError, the same for every cause."""
        if time.time() >= self._next or not self.gateway.knows(capsule):
            self.look()
        return self.gateway.open_request(capsule, chunked)

    def look(self) -> None:
        """Take up keys that came and let go of those whose time is over, if there are any."""
        try:
            changed = self._keys.folder.stat().st_mtime_ns
            if changed != self._seen or time.time() >= self._next:
                self._read()
        except (OSError, KeyStoreError) as error:
            log.error("the keys of `%s` cannot be read anew: %s", self.model, error)

    def offer(self) -> tuple[bytes, str, int]:
        """(the key configurations, their signature, seconds until a client should ask again)."""
        self.look()
        seconds = min(OFFER_SECONDS, self._grace)
        if self._offer is None or time.time() > self._offer[2] + seconds / 4:
            newest = list(self._private)[-1]
            configs = ohttp.encode_configs([ohttp.KeyConfig(newest & 0xFF, ohttp.public_key(self._private[newest]))])
            expires = int(time.time() + seconds) + 1
            text = signed_text(self.model, self.version, configs, expires)
            self._offer = configs, f"{expires} {_sign(self._keys, text)}", time.time()
        return self._offer[0], self._offer[1], int(seconds / 2)

    def _read(self) -> None:
        stamp, now = self._keys.folder.stat().st_mtime_ns, time.time()
        made = self._keys.made(request_key(self.model))
        over = dict(zip(made, [*(at + self._grace for at in list(made.values())[1:]), float("inf")], strict=True))
        alive = [version for version, end in over.items() if end > now][-MOST_KEYS:]
        if not alive:
            raise KeyStoreError(f"{self._keys.folder}: has no key `{request_key(self.model)}-1`: restore it from a backup")
        if alive != list(self._private):
            self._private = {v: self._private.get(v) or self._derive(v) for v in alive}
            self.gateway = ohttp.Gateway({version & 0xFF: key for version, key in self._private.items()})
            self._offer = None
            opening = ", ".join(f"{request_key(self.model)}-{v}" for v in alive[-4:])
            Audit(self._keys).write("open requests", self.model, must=False, keys=opening)
        self._next = min(over[version] for version in alive)
        self._seen = stamp if time.time_ns() - stamp > FRESH_NS else 0

    def _derive(self, version: int) -> bytes:
        of = f"heliograph sealed requests\0{self.model}\0{self.version or ''}".encode()
        return HKDF(hashes.SHA256(), 32, salt=None, info=of).derive(self._keys.secret(f"{request_key(self.model)}-{version}"))


def _sign(keys: KeyStore, text: bytes) -> str:
    private = serialization.load_pem_private_key(keys.signing_key(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    return base64.b64encode(private.sign(text, ec.ECDSA(hashes.SHA256()))).decode()
