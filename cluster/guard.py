"""What guards the key files themselves: the system's permissions alone, or besides them a passphrase or AWS KMS.

    guard.json   in the key store's folder: what new key files are locked with; each file says itself how it is opened

A passphrase is read from the file that HELIOGRAPH_PASSPHRASE_FILE names, as systemd, Docker and Kubernetes hand out secrets:
so it is in nobody's environment. It becomes a key by scrypt (RFC 7914; N = 2¹⁷, r = 8, p = 1: 128 MiB and a third of a second,
once a process), which opens the files by AES-256-GCM. AWS KMS encrypts and decrypts each file itself, with the file's name as
its encryption context, so every opening is in CloudTrail; what boto3 knows of credentials, regions and endpoints counts.
"""

import functools
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from ..errors import KeyStoreError
from .storage import read_json

FILE = "guard.json"
VARIABLE = "HELIOGRAPH_PASSPHRASE_FILE"
BY_PASSPHRASE, BY_KMS = b"hgkey1 scrypt\n", b"hgkey1 kms\n"
SHORTEST = 12
"""Characters of a passphrase."""


def lock(folder: Path, name: str, plain: bytes) -> bytes:
    """A key file's content, as the store's guard has it."""
    try:
        told = read_json(folder / FILE)
    except FileNotFoundError:
        return plain
    if told["by"] == "kms":
        answer = _kms(lambda kms: kms.encrypt(KeyId=told["key"], Plaintext=plain, EncryptionContext={"heliograph": name}), name)
        return BY_KMS + answer["CiphertextBlob"]
    salt, nonce = bytes.fromhex(told["salt"]), secrets.token_bytes(12)
    return BY_PASSPHRASE + salt + nonce + AESGCM(_derived(_passphrase(), salt)).encrypt(nonce, plain, name.encode())


@functools.lru_cache(256)
def unlock(content: bytes, name: str) -> bytes:
    """The inverse of `lock`, whatever the guard is now. Raises KeyStoreError."""
    if content.startswith(BY_KMS):
        blob = content[len(BY_KMS) :]
        return _kms(lambda kms: kms.decrypt(CiphertextBlob=blob, EncryptionContext={"heliograph": name}), name)["Plaintext"]
    if not content.startswith(BY_PASSPHRASE):
        return content
    rest = content[len(BY_PASSPHRASE) :]
    try:
        return AESGCM(_derived(_passphrase(), rest[:16])).decrypt(rest[16:28], rest[28:], name.encode())
    except InvalidTag:
        raise KeyStoreError(
            f"{name}: the passphrase in {os.environ[VARIABLE]} does not open it: is it another store's?"
        ) from None


def _passphrase() -> bytes:
    file = os.environ.get(VARIABLE)
    if not file:
        raise KeyStoreError(f"the key store is locked by a passphrase: name the file that holds it in {VARIABLE}")
    try:
        found = Path(file).read_bytes().rstrip(b"\r\n")
    except OSError as error:
        raise KeyStoreError(f"{file}: the passphrase cannot be read: {error.strerror}") from None
    if len(found.decode(errors="replace")) < SHORTEST:
        raise KeyStoreError(f"{file}: a passphrase has {SHORTEST} characters or more")
    return found


@functools.lru_cache(4)
def _derived(passphrase: bytes, salt: bytes) -> bytes:
    return Scrypt(salt, length=32, n=1 << 17, r=8, p=1).derive(passphrase)


def _kms(ask: Callable[[Any], Any], name: str) -> Any:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return ask(boto3.client("kms"))
    except (BotoCoreError, ClientError) as error:
        raise KeyStoreError(f"{name}: AWS KMS did not open or lock it: {error}") from None
