"""Files that are sealed at rest: models, checkpoints, bundles and whole run folders.

    FOLDER/key.wrapped   the folder's data key, wrapped by the key store's key `sealed` (envelope encryption)
    FOLDER/…             a sealed file: 8 bytes of format, 16 of salt, then chunks of 64 KiB, 16 bytes of tag behind each

A file's key is HKDF-SHA256 of the data key, the file's salt and its name, so a file is not taken for another one. A chunk is
AES-256-GCM with its number and whether it is the last as its nonce: one that is missing, moved or cut off is found (STREAM of
Hoang, Reyhanitabar, Rogaway and Vizár, 2015, as in the format `age`). Chunks stand at known places, so a reader can seek.

Rotation writes `key.wrapped` anew and nothing else; for that it stands outside of a bundle's signature, which it does not
need: only who holds the key store's key can make one, and another folder's key opens nothing here.
"""

import io
import os
from pathlib import Path
from typing import Any, BinaryIO, cast

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ..errors import SealError
from .keys import KeyStore
from .storage import write_bytes

SEALED_KEY = "sealed"
KEY_FILE = "key.wrapped"
FORMAT = b"hgseal1\n"
SALT, TAG, CHUNK = 16, 16, 1 << 16


class Seal:
    """A folder's data key."""

    def __init__(self, key: bytes):
        self._key = key

    @classmethod
    def make(cls, folder: Path, keys: KeyStore) -> "Seal":
        """The folder's seal, made where it has none."""
        if not (folder / KEY_FILE).exists():
            if not keys.versions(SEALED_KEY):
                keys.rotate(SEALED_KEY)
            write_bytes(folder / KEY_FILE, keys.wrap(SEALED_KEY, os.urandom(32)))
        return cls(keys.unwrap(SEALED_KEY, (folder / KEY_FILE).read_bytes()))

    @classmethod
    def of(cls, folder: Path, keys: KeyStore | None) -> "Seal | None":
        """The folder's seal, if it has one. Raises KeyStoreError, which names the key, when that is missing or another."""
        if not (folder / KEY_FILE).exists():
            return None
        if keys is None:
            raise SealError(f"{folder}: is sealed: the key store is needed that has its key")
        return cls(keys.unwrap(SEALED_KEY, (folder / KEY_FILE).read_bytes()))

    def __reduce__(self) -> Any:
        raise TypeError("a data key stays in its process: send the key store's folder instead")

    def cipher(self, salt: bytes, name: str) -> AESGCM:
        return AESGCM(HKDF(hashes.SHA256(), 32, salt, FORMAT + name.encode()).derive(self._key))


def rewrap_all(folder: Path, keys: KeyStore) -> int:
    """Wrap the keys of all sealed folders below one with the newest key; how many there are."""
    files = sorted(folder.rglob(KEY_FILE))
    for file in files:
        write_bytes(file, keys.wrap(SEALED_KEY, keys.unwrap(SEALED_KEY, file.read_bytes())))
    return len(files)


def create(file: Path, seal: Seal | None, name: str = "") -> BinaryIO:
    """A new file to write, sealed where there is a seal. name: what it is called when it is opened (default: its own name)."""
    opened = file.open("wb")
    return opened if seal is None else cast(BinaryIO, _Writer(opened, seal, name or file.name))


def opened(file: Path, seal: Seal | None, name: str = "") -> BinaryIO:
    """A file to read, in any order. Where there is a seal it must be sealed. Raises SealError, also while it is read."""
    if seal is None:
        return file.open("rb")
    return io.BufferedReader(_Reader(file, seal, name or file.name), CHUNK)


def read(file: Path, seal: Seal | None) -> bytes:
    with opened(file, seal) as source:
        return source.read()


def copy(file: Path, target: Path, keys: KeyStore, seal: Seal | None) -> None:
    """A file, opened where its own folder is sealed, in another place, sealed there where there is a seal."""
    with create(target, seal) as out:
        out.write(read(file, Seal.of(file.parent, keys)))


class _Writer(io.RawIOBase):
    def __init__(self, out: BinaryIO, seal: Seal, name: str):
        salt = os.urandom(SALT)
        self._out, self._cipher, self._count, self._held = out, seal.cipher(salt, name), 0, bytearray()
        out.write(FORMAT + salt)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._held += data
        whole = max(0, (len(self._held) - 1) // CHUNK) * CHUNK  # the last one is known when the file is closed
        for at in range(0, whole, CHUNK):
            self._chunk(self._held[at : at + CHUNK], last=False)
        del self._held[:whole]
        return memoryview(data).nbytes

    def _chunk(self, plain: bytearray, last: bool) -> None:
        self._out.write(self._cipher.encrypt(_nonce(self._count, last), bytes(plain), None))
        self._count += 1

    def close(self) -> None:
        if not self.closed:
            try:
                self._chunk(self._held, last=True)
                self._out.flush()
                os.fsync(self._out.fileno())
            finally:
                self._out.close()
                super().close()


class _Reader(io.RawIOBase):
    def __init__(self, file: Path, seal: Seal, name: str):
        self._file, self._source, self._at = file, file.open("rb"), 0
        head = self._source.read(len(FORMAT) + SALT)
        length = os.fstat(self._source.fileno()).st_size - len(head)
        self._chunks = max(1, -(-length // (CHUNK + TAG)))
        self._size = length - TAG * self._chunks
        if not head.startswith(FORMAT) or len(head) < len(FORMAT) + SALT or self._size < 0:
            self._source.close()
            raise SealError(f"{file}: is not sealed, though its folder is: somebody replaced or cut it")
        self._cipher = seal.cipher(head[len(FORMAT) :], name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, into: Any) -> int:
        number, skip = divmod(self._at, CHUNK)
        if number >= self._chunks or (self._at >= self._size and self._size):
            return 0
        self._source.seek(len(FORMAT) + SALT + number * (CHUNK + TAG))
        try:
            plain = self._cipher.decrypt(_nonce(number, number == self._chunks - 1), self._source.read(CHUNK + TAG), None)
        except InvalidTag:
            raise SealError(f"{self._file}: was changed, cut or sealed as another file (chunk {number}): restore it") from None
        part = plain[skip : skip + len(into)]
        into[: len(part)] = part
        self._at += len(part)
        return len(part)

    def close(self) -> None:
        self._source.close()
        super().close()


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11) + bytes([last])
