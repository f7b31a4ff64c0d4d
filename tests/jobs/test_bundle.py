"""A bundle is what was signed, or it is refused."""

import shutil

import pytest
from heliograph.cluster.keys import KeyStore
from heliograph.errors import BundleError, SignatureError
from heliograph.jobs import bundle

FILES = {"model.onnx": b"weights" * 50, "schema.json": b"{}", "preprocess.json": b"[]"}


@pytest.fixture
def keys(tmp_path) -> KeyStore:
    return KeyStore(tmp_path / "keys")


@pytest.fixture
def made(tmp_path, keys):
    parts = []
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
        parts.append(tmp_path / name)
    folder = tmp_path / "bundle"
    folder.mkdir()
    bundle.make(folder, "x", {"source": "s"}, parts, keys)
    return folder


def test_what_was_signed_is_accepted(made, keys):
    note = bundle.verify(made, keys.public_key())
    assert note["name"] == "x"
    assert note["lineage"] == {"source": "s"}
    moved = made.with_name("elsewhere")
    shutil.copytree(made, moved)
    assert bundle.verify(moved, keys.public_key()) == note


@pytest.mark.parametrize("name", [*FILES, "bundle.json"])
def test_one_changed_byte_is_refused(made, keys, name):
    content = (made / name).read_bytes()
    for at in {0, len(content) // 2, len(content) - 1}:
        (made / name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(SignatureError, match="was changed"):
            bundle.verify(made, keys.public_key())
        (made / name).write_bytes(content)
    bundle.verify(made, keys.public_key())


def test_a_changed_byte_of_the_signature_is_refused(made, keys):
    content = (made / bundle.SIGNATURE).read_bytes()
    for at in range(0, len(content), 7):
        (made / bundle.SIGNATURE).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(BundleError):
            bundle.verify(made, keys.public_key())


def test_a_file_more_or_less_is_refused(made, keys):
    (made / "extra").write_bytes(b"")
    with pytest.raises(SignatureError):
        bundle.verify(made, keys.public_key())
    (made / "extra").unlink()
    (made / "schema.json").unlink()
    with pytest.raises(SignatureError):
        bundle.verify(made, keys.public_key())


def test_a_foreign_signature_is_refused(made, keys, tmp_path):
    stranger = KeyStore(tmp_path / "stranger")
    stranger.signing_key()
    with pytest.raises(SignatureError, match="another key signed it"):
        bundle.verify(made, stranger.public_key())


def test_a_folder_without_signature_is_no_bundle(made, keys):
    (made / bundle.SIGNATURE).unlink()
    with pytest.raises(BundleError, match="is not a bundle"):
        bundle.verify(made, keys.public_key())
