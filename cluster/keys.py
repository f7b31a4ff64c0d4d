"""The key store: a folder of key files that only their owner can read.

    data-1.key        32 bytes: wraps the data keys of encrypted shards (AES-256-GCM); `rotate` adds data-2, data-3, …
    signing.key/.pub  EC P-256, PEM: signs bundles and key configurations
    NAME-hpke-1.key   32 bytes: what opens the encapsulated requests of the model NAME comes from it; rotated likewise
    sealed-1.key      32 bytes: wraps the data keys of sealed models and run folders; rotated likewise
    guard.json        where key files are locked by more than the system's permissions (`guard`)

A key store is handed around as its folder's path. Whoever needs a key opens the store where the key is used, so that
keys never travel through Ray's object store, a configuration or a log.
"""

import contextlib
import os
import secrets
import stat
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..errors import KeyStoreError
from . import guard
from .storage import write_bytes, write_json

DATA_KEY = "data"


def request_key(model: str) -> str:
    """The name of the key that opens the sealed requests of a model."""
    return f"{model}-hpke"


class KeyStore:
    def __init__(self, folder: Path | str):
        self.folder = Path(folder)

    def secret(self, key_id: str, create: bool = False) -> bytes:
        """The 32 bytes of a key. Raises KeyStoreError when it is missing, damaged or readable by others."""
        file = self.folder / f"{key_id}.key"
        if create and not file.exists():
            self._add(file, guard.lock(self.folder, file.name, secrets.token_bytes(32)))
        key = self.read(file)
        if len(key) != 32:
            raise KeyStoreError(f"{file}: has {len(key)} bytes, a key has 32: restore it from a backup")
        return key

    def versions(self, name: str) -> list[int]:
        """Of a key that can be rotated, oldest first."""
        return list(self.made(name))

    def made(self, name: str) -> dict[int, float]:
        """When each version of a key was made, by the clock; oldest first."""
        found = {}
        for file in self.folder.glob(f"{name}-*.key"):
            version = file.stem.removeprefix(f"{name}-")
            if version.isdigit():
                with contextlib.suppress(FileNotFoundError):  # removed just now
                    found[int(version)] = file.stat().st_mtime
        return dict(sorted(found.items()))

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

    def signing_key(self) -> bytes:
        """The private signing key (PEM), made when it is missing, with `signing.pub` beside it."""
        file = self.folder / "signing.key"
        if not file.exists():
            private = ec.generate_private_key(ec.SECP256R1())
            public = private.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
            pem = private.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            locked = guard.lock(self.folder, file.name, pem)
            self._add(self.folder / "signing.pub", public)
            self._add(file, locked)
        return self.read(file)

    def guard_by(self, told: dict[str, str] | None) -> int:
        """Lock all key files by something else: see `guard`. None: by the system's permissions alone. How many there are.

        A file is replaced at once and says itself how it is opened, so an interruption leaves a store that works.
        """
        files = sorted(self.folder.glob("*.key"))
        plain = {file: self.read(file) for file in files}
        if told is None:
            (self.folder / guard.FILE).unlink(missing_ok=True)
        else:
            made = self.folder / guard.FILE
            before = made.read_bytes() if made.exists() else None
            write_json(made, told)
            try:
                guard.unlock(guard.lock(self.folder, "try", b"try"), "try")
            except KeyStoreError:
                made.unlink() if before is None else write_bytes(made, before)
                raise
        for file, content in plain.items():
            times = file.stat()
            write_bytes(file, guard.lock(self.folder, file.name, content), mode=0o600)
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # which say when a key was made
        return len(files)

    def public_key(self) -> Path:
        """The file of the public key that bundles must be signed by."""
        file = self.folder / "signing.pub"
        if not file.is_file():
            raise KeyStoreError(f"{file}: not found: it is the key that the bundle's signature is checked with")
        return file

    def _add(self, file: Path, content: bytes) -> None:
        """Write a file that is not there yet, whole; where another process was faster, its file stays."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        try:
            os.link(aside, file)
        except FileExistsError:
            pass
        finally:
            aside.unlink()

    def read(self, file: Path) -> bytes:
        """A secret file of the store. Raises KeyStoreError when it is missing or open to others."""
        try:
            mode = file.stat().st_mode
            content = file.read_bytes()
        except FileNotFoundError:
            raise KeyStoreError(f"{file}: no such key: restore it, or point `keys` at the store that has it") from None
        except PermissionError:
            raise KeyStoreError(f"{file}: may not be read by this user") from None
        if stat.S_IMODE(mode) & 0o077:
            raise KeyStoreError(f"{file}: is open to other users: run `chmod 600 {file}`")
        return guard.unlock(content, file.name)
