"""The key store: a folder of key files that only their owner can read.

    data-1.key        32 bytes: wraps the data keys of encrypted shards (AES-256-GCM)
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

DATA_KEY = "data-1"


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

    def wrap(self, key_id: str, plain: bytes) -> bytes:
        """Encrypt a data key: 12 bytes nonce, then AES-256-GCM with the key's id as associated data."""
        nonce = secrets.token_bytes(12)
        return nonce + AESGCM(self.secret(key_id)).encrypt(nonce, plain, key_id.encode())

    def unwrap(self, key_id: str, wrapped: bytes) -> bytes:
        """The inverse of `wrap`. Raises KeyStoreError when this store's key is not the one that wrapped."""
        try:
            return AESGCM(self.secret(key_id)).decrypt(wrapped[:12], wrapped[12:], key_id.encode())
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
