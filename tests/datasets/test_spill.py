"""Rows aside come back by bucket, and show nothing to who has no key."""

import numpy as np
import pyarrow as pa
import pytest
from heliograph.cluster.keys import DATA_KEY, KeyStore
from heliograph.datasets import spill
from heliograph.errors import DataError, KeyStoreError

BUCKETS = [
    {"x": np.arange(6.0).reshape(3, 2), "t": pa.array(["secret words", None, "b"])},
    None,
    {"x": np.ones((1, 2)), "t": pa.array([""])},
]


@pytest.fixture
def keys(tmp_path) -> KeyStore:
    store = KeyStore(tmp_path / "keys")
    store.rotate(DATA_KEY)
    return store


@pytest.mark.parametrize("sealed", [True, False])
def test_buckets_come_back_in_any_order_and_empty_ones_are_none(tmp_path, keys, sealed):
    given = keys if sealed else None
    index = spill.write(tmp_path / "a", iter(BUCKETS), given)
    assert [len(t) for t in spill.read(tmp_path, index, range(3), given)] == [3, 1]
    last, first = spill.read(tmp_path, index, iter([2, 0]), given)
    assert first["t"].to_pylist() == ["secret words", None, "b"]
    assert last["x"].to_pylist() == [[1.0, 1.0]]
    assert (b"secret words" in (tmp_path / index.file).read_bytes()) != sealed
    assert list(tmp_path.glob("*.part")) == []


def test_a_changed_byte_and_another_key_are_refused(tmp_path, keys):
    index = spill.write(tmp_path / "a", iter(BUCKETS), keys)
    file = tmp_path / index.file
    content = bytearray(file.read_bytes())
    content[40] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        list(spill.read(tmp_path, index, range(3), keys))
    keys.rotate(DATA_KEY)
    keys.retire(DATA_KEY)
    with pytest.raises(KeyStoreError, match="no such key"):
        list(spill.read(tmp_path, index, range(3), keys))
