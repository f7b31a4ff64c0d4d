"""Sealed files: what comes out is what went in, or nothing."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from heliograph.cluster.keys import KeyStore
from heliograph.cluster.sealed import CHUNK, FORMAT, KEY_FILE, SALT, SEALED_KEY, TAG, Seal, create, opened, read, rewrap_all
from heliograph.errors import KeyStoreError, SealError
from heliograph.jobs import checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

HEAD, STRIDE = len(FORMAT) + SALT, CHUNK + TAG
EDGES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 5]


def seal(folder: Path, name: str = "a") -> Seal:
    (folder / name).mkdir(exist_ok=True)
    return Seal.make(folder / name, KeyStore(folder / "keys"))


def written(file: Path, own: Seal, content: bytes, piece: int = 1 << 20) -> bytes:
    with create(file, own) as out:
        for at in range(0, len(content), piece):
            out.write(content[at : at + piece])
    return content


@pytest.mark.parametrize("size", EDGES)
def test_what_was_sealed_is_read_whole_and_in_any_order(tmp_path, size):
    own, file = seal(tmp_path), tmp_path / "a" / "model.onnx"
    content = written(file, own, np.random.default_rng(size).bytes(size), piece=10_000)
    assert read(file, own) == content
    assert size < 64 or content[:64] not in file.read_bytes()

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, size + 10), st.integers(0, 2 * CHUNK)), max_size=6))
    def seeks(steps):
        with opened(file, own) as source:
            for at, length in steps:
                source.seek(at)
                assert source.read(length) == content[at : at + length]

    seeks()


def changes(sealed: bytes) -> dict[str, bytes]:
    body = sealed[HEAD:]
    chunks = [body[at : at + STRIDE] for at in range(0, len(body), STRIDE)]
    rng = np.random.default_rng(0)
    flipped = {}
    for at in [0, len(FORMAT), HEAD, len(sealed) - 1, *map(int, rng.integers(0, len(sealed), 60))]:
        flipped[f"a bit at {at}"] = sealed[:at] + bytes([sealed[at] ^ 1 << int(rng.integers(8))]) + sealed[at + 1 :]
    return flipped | {
        "the last chunk is missing": sealed[:HEAD] + b"".join(chunks[:-1]),
        "the first chunk is missing": sealed[:HEAD] + b"".join(chunks[1:]),
        "two chunks are swapped": sealed[:HEAD] + b"".join([chunks[1], chunks[0], *chunks[2:]]),
        "a chunk stands twice": sealed[:HEAD] + b"".join([chunks[0], *chunks]),
        "it is cut in a chunk": sealed[:-7],
        "it is cut in its head": sealed[:9],
        "it is empty": b"",
        "something is added": sealed + b"x",
    }


def test_nothing_that_was_changed_is_read(tmp_path):
    own, file = seal(tmp_path), tmp_path / "a" / "model.onnx"
    written(file, own, bytes(range(256)) * 800)
    for what, content in changes(file.read_bytes()).items():
        file.write_bytes(content)
        with pytest.raises(SealError):
            print(what, len(read(file, own)))


def test_a_file_is_not_taken_for_another_and_not_for_a_plain_one(tmp_path):
    own, other = seal(tmp_path), seal(tmp_path, "b")
    file = tmp_path / "a" / "model.onnx"
    written(file, own, b"weights")
    file.rename(tmp_path / "a" / "model.keras")
    with pytest.raises(SealError, match="as another file"):
        read(tmp_path / "a" / "model.keras", own)
    with pytest.raises(SealError):
        read((tmp_path / "a" / "model.keras").rename(file), other)
    file.write_bytes(b"plain" * 20)
    with pytest.raises(SealError, match="is not sealed, though its folder is"):
        read(file, own)


def test_a_lost_or_wrong_key_is_named_and_rotation_wraps_anew(tmp_path):
    keys, file = KeyStore(tmp_path / "keys"), tmp_path / "a" / "model.onnx"
    content = written(file, seal(tmp_path), b"weights" * 100)
    before = file.read_bytes()
    keys.rotate(SEALED_KEY)
    assert rewrap_all(tmp_path, keys) == 1
    assert keys.retire(SEALED_KEY) == 1
    assert read(file, Seal.of(tmp_path / "a", keys)) == content
    assert file.read_bytes() == before
    key = tmp_path / "keys" / "sealed-2.key"
    key.rename(tmp_path / "sealed-2.key")
    with pytest.raises(KeyStoreError, match=r"sealed-2\.key: no such key"):
        Seal.of(tmp_path / "a", keys)
    keys.secret("sealed-2", create=True)
    with pytest.raises(KeyStoreError, match="`sealed-2` is not the one"):
        Seal.of(tmp_path / "a", keys)
    with pytest.raises(SealError, match="the key store is needed"):
        Seal.of(tmp_path / "a", None)
    assert Seal.of(tmp_path, keys) is None


def test_a_data_key_stays_in_its_process(tmp_path):
    with pytest.raises(TypeError, match="stays in its process"):
        pickle.dumps(seal(tmp_path))


def test_a_sealed_checkpoint_is_read_by_its_step_and_a_plain_one_is_not(tmp_path):
    own = seal(tmp_path)
    values = [np.arange(6, dtype=np.float32).reshape(2, 3), np.float32(0.5), np.zeros((0, 4), np.float32)]
    values = [np.asarray(v) for v in values]
    sha = checkpoint.digest(values)
    said: list[str] = []
    for step in (5, 6):
        folder = checkpoint.place(tmp_path / "a", step)
        folder.mkdir()
        checkpoint.write(folder, values, {"step": step}, sha, own)
    note, found = checkpoint.read(checkpoint.place(tmp_path / "a", 5), own)
    assert note["step"] == 5
    assert all((a == b).all() for a, b in zip(found, values, strict=True))
    newest = checkpoint.place(tmp_path / "a", 6)
    newest.rename(checkpoint.place(tmp_path / "a", 9))  # an old one in a newer one's place
    plain = checkpoint.place(tmp_path / "a", 10)
    plain.mkdir()
    checkpoint.write(plain, values, {"step": 10}, sha, None)
    steps = [note["step"] for _, note, _ in checkpoint.whole(tmp_path / "a", own, said.append)]
    assert steps == [5]
    assert len(said) == 2
    assert KEY_FILE in {p.name for p in (tmp_path / "a").iterdir()}
