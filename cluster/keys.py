"""The key store: a folder of key files that only their owner can read.

    data-1.key        32 bytes: wraps the data keys of encrypted shards (AES-256-GCM); `rotate` adds data-2, data-3, …
    signing.key/.pub  EC P-256, PEM: signs bundles and key configurations
    NAME-hpke-1.key   32 bytes, X25519: opens the encapsulated requests of the model NAME

A key store is handed around as its folder's path. Whoever needs a key opens the store where the key is used, so that
keys never travel through Ray's object store, a configuration or a log.
"""

import os
import secrets
import stat
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..errors import KeyStoreError

DATA_KEY = "data"


class KeyStore:
    def __init__(self, folder: Path | str):
        self.folder = Path(folder)

    def secret(self, key_id: str, create: bool = False) -> bytes:
        """The 32 bytes of a key. Raises KeyStoreError when it is missing, damaged or readable by others."""
        file = self.folder / f"{key_id}.key"
        if create and not file.exists():
            self._add(file, secrets.token_bytes(32))
        key = self._read(file)
        if len(key) != 32:
            raise KeyStoreError(f"{file}: has {len(key)} bytes, a key has 32: restore it from a backup")
        return key

    def versions(self, name: str) -> list[int]:
        """Of a key that can be rotated, oldest first."""
        found = (f.stem.removeprefix(f"{name}-") for f in self.folder.glob(f"{name}-*.key"))
        return sorted(int(v) for v in found if v.isdigit())

    def rotate(self, name: str) -> int:
        """Add a version of a key, the first one too; what is wrapped from now on is wrapped by it."""
        version = max(self.versions(name), default=0) + 1
        self.secret(f"{name}-{version}", create=True)
        return version

    def retire(self, name: str) -> int:
        """Remove all versions but the newest; how many. What they wrapped and nobody wrapped anew is lost."""
        old = self.versions(name)[:-1]
        for version in old:
            (self.folder / f"{name}-{version}.key").unlink()
        return len(old)

    def wrap(self, name: str, plain: bytes) -> bytes:
        """Encrypt a data key with the newest version: 4 bytes version, 12 bytes nonce, then AES-256-GCM with the key's id as
        associated data."""
        version = max(self.versions(name), default=1)
        key_id, nonce = f"{name}-{version}", secrets.token_bytes(12)
        return version.to_bytes(4) + nonce + AESGCM(self.secret(key_id)).encrypt(nonce, plain, key_id.encode())

    def unwrap(self, name: str, wrapped: bytes) -> bytes:
        """The inverse of `wrap`. Raises KeyStoreError when this store's key is not the one that wrapped."""
        key_id = f"{name}-{int.from_bytes(wrapped[:4])}"
        try:
            return AESGCM(self.secret(key_id)).decrypt(wrapped[4:16], wrapped[16:], key_id.encode())
        except InvalidTag:
            raise KeyStoreError(f"{self.folder}: its key `{key_id}` is not the one that encrypted this data") from None

    def signing_key(self) -> Path:
        """The private signing key's file (PEM), made when it is missing, with `signing.pub` beside it."""
        file = self.folder / "signing.key"
        if not file.exists():
            private = ec.generate_private_key(ec.SECP256R1())
            public = private.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
            self._add(self.folder / "signing.pub", public)
            self._add(
                file,
                private.private_bytes(
                    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                ),
            )
        self._read(file)
        return file

    def public_key(self) -> Path:
        """The file of the public key that bundles must be signed by."""
        file = self.folder / "signing.pub"
        if not file.is_file():
            raise KeyStoreError(f"{file}: not found: it is the key that the bundle's signature is checked with")
        return file

    def _add(self, file: Path, content: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = file.with_name(f".{file.name}.part")
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        aside.replace(file)

    def _read(self, file: Path) -> bytes:
        try:
            mode = file.stat().st_mode
            content = file.read_bytes()
        except FileNotFoundError:
            raise KeyStoreError(f"{file}: no such key: restore it, or point `keys` at the store that has it") from None
        except PermissionError:
            raise KeyStoreError(f"{file}: may not be read by this user") from None
        if stat.S_IMODE(mode) & 0o077:
            raise KeyStoreError(f"{file}: is open to other users: run `chmod 600 {file}`")
        return content
