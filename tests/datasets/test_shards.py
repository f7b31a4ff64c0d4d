"""Splits that only the rows decide, shards that differ by a row at most, and bytes that nobody else can read."""

import numpy as np
import pyarrow as pa
import pytest
from heliograph.cluster.keys import DATA_KEY, KeyStore
from heliograph.datasets import shards
from heliograph.datasets.shards import TARGET
from heliograph.errors import DataError, KeyStoreError
from heliograph.project import Split
from hypothesis import given, settings
from hypothesis import strategies as st


def rows(count: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    draw = np.random.default_rng(0)
    return {"b": draw.normal(size=(count, 2, 2)).astype("f4"), "a": draw.normal(size=count).astype("f4")}, np.arange(count)


@given(st.permutations(range(20)), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_a_rows_hash_depends_on_its_content_and_the_seed_alone(order, seed):
    features, target = rows(20)
    whole = shards.row_hashes(features, target, seed)
    moved = shards.row_hashes({n: v[order] for n, v in reversed(features.items())}, target[order], seed)
    assert np.array_equal(whole[order], moved)
    one = shards.row_hashes({n: v[3:4] for n, v in features.items()}, target[3:4], seed)
    assert one[0] == whole[3]
    assert not np.array_equal(whole, shards.row_hashes(features, target, seed + 1))


def test_equal_rows_have_equal_hashes_and_any_other_row_another():
    features, target = rows(2)
    zero = shards.row_hashes({**features, "a": np.array([0.0, -0.0], "f4")}, target, 0)
    same = shards.row_hashes({n: v[[0, 0]] for n, v in features.items()}, target[[0, 0]], 0)
    assert same[0] == same[1]
    assert zero[0] != zero[1]
    assert (zero >= 0).all()


def test_splits_have_their_shares():
    features, target = rows(20_000)
    hashes = shards.row_hashes(features, target, 7)
    ranges = shards.split_ranges(Split(validation=0.2, test=0.1))
    assert [name for name, *_ in ranges] == ["test", "validation", "train"]
    assert (ranges[0][2], ranges[-1][3]) == (0, 2**63)
    counts = [((hashes >= first) & (hashes < end)).mean() for _, _, first, end in ranges]
    assert sum(counts) == 1
    assert counts == pytest.approx([0.1, 0.2, 0.7], abs=0.01)


@given(st.integers(0, 1000), st.integers(1, 50))
def test_shards_differ_by_one_row_at_most_and_the_longer_come_first(count, pieces):
    lengths = shards.shard_lengths(count, pieces)
    assert sum(lengths) == count
    assert sorted(lengths, reverse=True) == lengths
    assert lengths[0] - lengths[-1] <= 1


@pytest.fixture
def keys(tmp_path) -> KeyStore:
    store = KeyStore(tmp_path / "keys")
    store.rotate(DATA_KEY)
    return store


@pytest.fixture
def columns() -> dict[str, np.ndarray]:
    features, target = rows(100)
    return {**features, TARGET: target}


def test_a_shard_comes_back_as_it_was_written(tmp_path, keys, columns):
    file = tmp_path / "a.parquet"
    written = shards.write_shard(file, columns, 16, keys)
    with shards.open_shard(file, keys) as shard:
        back = shards.read_rows(shard, file)
        group = shards.read_rows(shard, file, [2])
    assert written.rows == 100
    for name, values in columns.items():
        assert np.array_equal(back[name], values)
        assert np.array_equal(group[name], values[32:48])
    assert list(tmp_path.glob("*.part")) == []


def test_a_sealed_shard_shows_neither_values_nor_column_names(tmp_path, keys, columns):
    columns = {"diagnosis": np.full(100, 1234.5, "f4"), TARGET: columns[TARGET]}
    shards.write_shard(tmp_path / "sealed", columns, 16, keys)
    shards.write_shard(tmp_path / "clear", columns, 16, None)
    sealed, clear = (tmp_path / "sealed").read_bytes(), (tmp_path / "clear").read_bytes()
    needles = [b"diagnosis", TARGET.encode(), np.float32(1234.5).tobytes()]
    assert all(needle in clear for needle in needles)
    assert not any(needle in sealed for needle in needles)


def test_another_key_no_key_and_a_changed_byte_are_refused(tmp_path, keys, columns):
    file = tmp_path / "a.parquet"
    shards.write_shard(file, columns, 16, keys)
    other = KeyStore(tmp_path / "other")
    with pytest.raises(KeyStoreError, match="no such key"):
        shards.open_shard(file, other)
    other.rotate(DATA_KEY)
    with pytest.raises(KeyStoreError, match="is not the one that encrypted"):
        shards.open_shard(file, KeyStore(tmp_path / "other"))
    with pytest.raises(DataError, match="damaged or sealed"):
        shards.open_shard(file, None)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="damaged"), shards.open_shard(file, keys) as shard:
        shards.read_rows(shard, file)


def test_a_key_that_others_may_read_is_refused(keys):
    (keys.folder / f"{DATA_KEY}-1.key").chmod(0o644)
    with pytest.raises(KeyStoreError, match="chmod 600"):
        keys.wrap(DATA_KEY, b"x" * 16)


def test_a_rotated_key_opens_what_it_never_wrote_and_no_data_is_written_again(tmp_path, keys, columns):
    file = tmp_path / "a.parquet"
    shards.write_shard(file, columns, 16, keys)
    before = file.read_bytes()
    assert keys.rotate(DATA_KEY) == 2
    shards.rotate(file, keys)
    assert keys.retire(DATA_KEY) == 1
    assert keys.versions(DATA_KEY) == [2]
    assert file.read_bytes() == before
    shards._crypto.cache_clear()  # as another process
    with shards.open_shard(file, keys) as shard:
        assert np.array_equal(shards.read_rows(shard, file)["a"], columns["a"])


def test_a_rotation_that_is_cut_off_is_finished_by_the_next(tmp_path, keys, columns):
    file = tmp_path / "a.parquet"
    shards.write_shard(file, columns, 16, keys)
    material = shards._key_material(file)
    material.rename(material.with_name(material.name + ".kept"))  # killed after the old one was removed
    keys.rotate(DATA_KEY)
    shards.rotate(file, keys)
    keys.retire(DATA_KEY)
    shards._crypto.cache_clear()
    with shards.open_shard(file, keys) as shard:
        assert shard.metadata.num_rows == 100
    assert [f.name for f in tmp_path.iterdir() if f.name.endswith((".kept", ".part"))] == []


def test_texts_images_and_lists_come_back_and_count_in_the_hash(tmp_path):
    texts, lists = pa.array(["a", None, "b"]), pa.array([[1.0], [], [2.0, 3.0]])
    columns = {"t": texts, "l": lists, TARGET: np.arange(3)}
    shards.write_shard(tmp_path / "a", columns, 2, None)
    with shards.open_shard(tmp_path / "a", None) as shard:
        table = shards.read_table(shard, tmp_path / "a")
    assert table["t"].to_pylist() == ["a", None, "b"]
    assert table["l"].to_pylist() == [[1.0], [], [2.0, 3.0]]
    target = np.zeros(3)
    hashes = shards.row_hashes({"t": texts, "l": lists}, target, 0)
    assert len(set(hashes)) == 3
    assert (hashes[::-1] == shards.row_hashes({"t": texts.take([2, 1, 0]), "l": lists.take([2, 1, 0])}, target, 0)).all()


def test_equal_rows_have_one_content_hash_whether_sealed_or_not(tmp_path, keys, columns):
    sealed = shards.write_shard(tmp_path / "a", columns, 16, keys)
    clear = shards.write_shard(tmp_path / "b", columns, 16, None)
    again = shards.write_shard(tmp_path / "c", columns, 16, keys)
    assert sealed.sha256 == clear.sha256 == again.sha256
    assert shards.write_shard(tmp_path / "d", {**columns, TARGET: np.ones(100)}, 16, keys).sha256 != sealed.sha256
