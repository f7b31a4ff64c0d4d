"""Key files that are locked by a passphrase or by AWS KMS (moto's)."""

import os
import time
from pathlib import Path

import boto3
import pytest
from heliograph.cluster.guard import VARIABLE
from heliograph.cluster.keys import DATA_KEY, KeyStore
from heliograph.errors import KeyStoreError
from moto import mock_aws

BY_PASSPHRASE = {"by": "passphrase", "salt": "00" * 16}


@pytest.fixture
def keys(tmp_path) -> KeyStore:
    keys = KeyStore(tmp_path / "keys")
    keys.rotate(DATA_KEY)
    keys.signing_key()
    return keys


@pytest.fixture
def passphrase(tmp_path, monkeypatch) -> Path:
    file = tmp_path / "passphrase"
    file.write_text("correct horse battery\n")
    monkeypatch.setenv(VARIABLE, str(file))
    return file


def contents(keys: KeyStore) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in keys.folder.glob("*.key")}


def test_a_passphrase_locks_what_there_is_and_what_comes_later(keys, passphrase, monkeypatch):
    plain, wrapped = contents(keys), keys.wrap(DATA_KEY, b"k" * 32)
    made = keys.made(DATA_KEY)
    time.sleep(0.01)
    assert keys.guard_by(BY_PASSPHRASE) == 2
    keys.rotate(DATA_KEY)
    assert all(plain.get(name, b"\0" * 99) not in content for name, content in contents(keys).items())
    assert all(file.stat().st_mode & 0o077 == 0 for file in keys.folder.glob("*.key"))
    assert keys.made(DATA_KEY)[1] == made[1]
    assert keys.unwrap(DATA_KEY, wrapped) == b"k" * 32
    assert keys.signing_key() == plain["signing.key"]
    assert keys.unwrap(DATA_KEY, keys.wrap(DATA_KEY, b"2" * 32)) == b"2" * 32
    assert keys.guard_by(None) == 3
    assert {name: content for name, content in contents(keys).items() if name in plain} == plain


@pytest.mark.parametrize(
    ("given", "said"),
    [(None, VARIABLE), ("another one altogether", "does not open it"), ("short", "12 characters"), ("gone", "cannot be read")],
)
def test_without_the_passphrase_nothing_opens(keys, passphrase, monkeypatch, given, said):
    keys.guard_by(BY_PASSPHRASE | {"salt": os.urandom(16).hex()})
    if given is None:
        monkeypatch.delenv(VARIABLE)
    elif given == "gone":
        passphrase.unlink()
    else:
        passphrase.write_text(given)
    with pytest.raises(KeyStoreError, match=said):
        keys.secret("data-1")


def test_a_guard_that_does_not_work_is_not_taken(keys, passphrase):
    plain = contents(keys)
    passphrase.unlink()
    with pytest.raises(KeyStoreError, match="cannot be read"):
        keys.guard_by(BY_PASSPHRASE)
    assert contents(keys) == plain
    keys.rotate(DATA_KEY)
    assert len((keys.folder / "data-2.key").read_bytes()) == 32


def test_aws_kms_locks_and_says_what_it_refuses(keys, monkeypatch):
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "eu-central-1"}.items():
        monkeypatch.setenv(name, value)
    with mock_aws():
        kms = boto3.client("kms")
        key = kms.create_key()["KeyMetadata"]["KeyId"]
        kms.create_alias(AliasName="alias/heliograph", TargetKeyId=key)
        plain = contents(keys)
        keys.guard_by({"by": "kms", "key": "alias/heliograph"})
        assert all(plain[name] not in content for name, content in contents(keys).items())
        assert keys.secret("data-1") == plain["data-1.key"]
        keys.rotate(DATA_KEY)
        assert len(keys.secret("data-2")) == 32
        (keys.folder / "data-3.key").write_bytes((keys.folder / "data-1.key").read_bytes())  # one key in another's place
        (keys.folder / "data-3.key").chmod(0o600)
        with pytest.raises(KeyStoreError, match=r"data-3\.key: AWS KMS did not open"):
            keys.secret("data-3")
        (keys.folder / "data-3.key").unlink()
        with pytest.raises(KeyStoreError, match="alias/other"):
            keys.guard_by({"by": "kms", "key": "alias/other"})
        assert keys.rotate(DATA_KEY) == 3  # by the guard that stayed
