"""Shards: a split's rows as a few Parquet files of equal length, encrypted, in an order that only the rows decide.

Every row has a 63-bit hash of its content and the seed. The hash says which split it belongs to, and rows are sorted by
it, so neither the order nor the layout of the source's files matters, and equal rows never stand in two splits: a split
cannot leak exact copies into another. Sorted
rows are cut into `n` shards whose lengths differ by one at most: position `p` of an epoch lies in shard `p % n` at place
`p // n`, which is what lets `ingest` give any number of workers the same batches.

A shard is sealed with Parquet Modular Encryption (AES-GCM), which costs nothing to measure, detects a flipped byte, and
is read by Spark and DuckDB too. Its data keys are wrapped by the key store and lie beside it (`_KEY_MATERIAL_FOR_…`), so
rotating the store's key wraps them anew (`rotate`) and touches no data.

What a row has of an array is stored as bytes of a fixed length, with the shape and type beside: they are read 11 times faster
than Arrow's tensors, whose every number has levels of its own in Parquet.
"""

import base64
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from ..cluster.keys import DATA_KEY, KeyStore
from ..cluster.storage import read_json, write_json
from ..errors import DataError, KeyStoreError
from ..project import Split
from . import schema as schemas
from .schema import Column, Columns, hash64

SplitName = Literal["train", "validation", "test"]
TARGET, WEIGHT = "heliograph-target", "heliograph-weight"
SHAPE = b"heliograph-shape"


def target_columns(count: int) -> list[str]:
    """What rows that are not written yet call their targets."""
    return [TARGET] if count == 1 else [f"{TARGET}-{i}" for i in range(count)]


WINDOW_BYTES = 4 << 20
MATERIAL = "_KEY_MATERIAL_FOR_"
"""How the Parquet format names the file that holds a shard's wrapped keys."""


class Shard(BaseModel):
    model_config = ConfigDict(frozen=True)
    file: str
    rows: int
    sha256: str
    """Of the values, column by column in windows: equal rows, equal hash, however they are encrypted."""


class Manifest(BaseModel):
    """What `prepare` made: `manifest.json`, written last, so shards without it do not exist."""

    model_config = ConfigDict(frozen=True)
    splits: dict[str, list[Shard]]
    window: int
    """Rows of a row group: the unit that is read and shuffled in memory."""
    row_bytes: int
    """Of a row in memory."""
    encrypted: bool
    class_rows: list[int] = []
    """Training rows of each class (classification)."""
    unlabelled: int = 0
    """Training rows without a target."""
    lacking: list[int] = []
    """Training rows without each of several targets."""

    @property
    def labelled(self) -> float:
        """The share of the training rows that have a target."""
        return 1 - self.unlabelled / max(1, self.rows("train"))

    def rows(self, split: SplitName) -> int:
        return sum(s.rows for s in self.splits[split])

    def of_train(self, share: float) -> "Manifest":
        """The same with a share of the training shards, one at least: rows drawn at random, since hashes place them."""
        every = self.splits["train"]
        some = every[: max(1, round(share * len(every)))]
        unlabelled = round(self.unlabelled * sum(s.rows for s in some) / max(1, self.rows("train")))
        return self.model_copy(update={"splits": {**self.splits, "train": some}, "unlabelled": unlabelled})

    def write(self, folder: Path) -> None:
        write_json(folder / "manifest.json", self.model_dump())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        return cls.model_validate(read_json(folder / "manifest.json"))


def row_hashes(columns: Columns, target: Column, seed: int) -> np.ndarray:
    """int64 `[rows]` in [0, 2^63): of a row's values (numbers as float32, in the order of the columns' names) and its target.

    Multilinear hashing modulo 2^64 with coefficients drawn by the seed (Dietzfelbinger, 1996; Lemire and Kaser, 2014), then
    the finaliser of SplitMix64; text and images by their BLAKE2b.
    """
    salt = hashlib.blake2b(str(seed).encode(), digest_size=16).digest()
    total = np.zeros(len(target), np.uint64)
    for name in [*sorted(columns), ""]:
        draw = np.random.default_rng(hash64(name.encode(), salt))
        words = _words(columns[name] if name else target, salt)
        coefficients = draw.integers(0, 2**64, words.shape[1], np.uint64) | np.uint64(1)
        for first in range(0, words.shape[1], 64):  # so that no product of all values is held at once
            part = slice(first, first + 64)
            total += (words[:, part].astype(np.uint64) * coefficients[part]).sum(axis=1, dtype=np.uint64)
        total = mixed(total)
    return (total >> np.uint64(1)).astype(np.int64)


def mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), of uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _words(values: Column, salt: bytes) -> np.ndarray:
    """A column as whole numbers `[rows, words]`, equal where the values are."""
    if isinstance(values, np.ndarray):
        # + 0.0 turns -0.0 to 0.0: equal numbers, equal rows.
        return (values.astype(np.float32).reshape(len(values), -1) + np.float32(0)).view(np.uint32)
    if pa.types.is_string(values.type):
        found = values.dictionary_encode()
        known = np.array([*(hash64(v.encode(), salt) for v in found.dictionary.to_pylist()), 1], np.uint64)
        return known[found.indices.fill_null(len(known) - 1).to_numpy(zero_copy_only=False)][:, None]
    if pa.types.is_binary(values.type):
        return np.array([hash64(v.as_buffer(), salt) if v.is_valid else 1 for v in values], np.uint64)[:, None]
    rows = values.to_pylist()
    return np.array([hash64(np.array(r, np.float32).tobytes(), salt) if r is not None else 1 for r in rows], np.uint64)[:, None]


def split_ranges(split: Split) -> list[tuple[SplitName, float, int, int]]:
    """(split, share, first hash, hash that it ends before), in the order of the hashes."""
    shares: list[tuple[SplitName, float]] = [("test", split.test), ("validation", split.validation)]
    shares.append(("train", 1 - split.test - split.validation))
    edges = [int(edge * 2**63) for edge in itertools.accumulate((share for _, share in shares[:2]), initial=0.0)] + [2**63]
    return [(name, share, a, b) for (name, share), (a, b) in zip(shares, itertools.pairwise(edges), strict=True)]


def first_train_hash(split: Split) -> int:
    return split_ranges(split)[-1][2]


def shard_lengths(rows: int, shards: int) -> list[int]:
    """Lengths of `shards` pieces of `rows`, the longer ones first, so that position `p` exists in shard `p % shards`."""
    return [(rows - i + shards - 1) // shards for i in range(shards)]


class Writer:
    """A Parquet file that is written table by table, aside, and put in its place by `close`; a block that fails leaves none.

    window: rows of its row groups. keys: seals it; None leaves it in clear.
    """

    def __init__(self, file: Path, window: int, keys: KeyStore | None):
        self.file, self.window, self.rows = file, window, 0
        self._aside = file.with_name(f".{file.name}.{os.getpid()}.part")
        self._sealed = None
        if keys:
            _key_material(self._aside).unlink(missing_ok=True)
            self._sealed = _crypto(keys.folder).file_encryption_properties(_connection(), _encryption(), self._aside)
        self._held: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None
        self._digest = hashlib.sha256()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind:
            if self._writer:
                self._writer.close()
            self._aside.unlink(missing_ok=True)
            _key_material(self._aside).unlink(missing_ok=True)

    def write(self, columns: Columns) -> None:
        packed = [_packed(name, values) for name, values in columns.items()]
        self._held.append(pa.Table.from_arrays([a for _, a in packed], schema=pa.schema([f for f, _ in packed])))
        while sum(map(len, self._held)) >= self.window:
            self._put(self._taken(self.window))

    def _taken(self, rows: int) -> pa.Table:
        together = pa.concat_tables(self._held)
        self._held = [together.slice(rows)] if rows < len(together) else []
        return together.slice(0, rows).combine_chunks()

    def _put(self, table: pa.Table) -> None:
        if self._writer is None:
            # Numbers are not packed: it would cost a core more than it saves of a disk.
            text = [f.name for f in table.schema if pa.types.is_string(f.type)]
            options: Any = {"compression": "none", "use_dictionary": text, "write_statistics": False}
            if text:
                options["compression"] = {name: "zstd" if name in text else "none" for name in table.column_names}
            self._writer = pq.ParquetWriter(self._aside, table.schema, encryption_properties=self._sealed, **options)
        for column in table.columns:
            self._digest.update(_values(column))
        self._writer.write_table(table, row_group_size=max(1, len(table)))
        self.rows += len(table)

    def close(self) -> Shard:
        if rest := sum(map(len, self._held)):
            self._put(self._taken(rest))
        assert self._writer, "a shard has at least one row"
        self._writer.close()
        if self._sealed:
            _key_material(self._aside).replace(_key_material(self.file))
        self._aside.replace(self.file)
        return Shard(file=self.file.name, rows=self.rows, sha256=self._digest.hexdigest())


def _values(column: pa.ChunkedArray) -> Any:
    """What a hash of a column is over."""
    kind = column.type
    if pa.types.is_floating(kind) or pa.types.is_integer(kind):
        return np.ascontiguousarray(schemas.to_numpy(column)).data.cast("B")
    if pa.types.is_fixed_size_binary(kind):
        return _bytes(column)
    return "\0".join(map(repr, column.to_pylist())).encode()


def _packed(name: str, values: Column) -> tuple[pa.Field, pa.Array]:
    """A column as a shard keeps it."""
    if not isinstance(values, np.ndarray) or values.ndim == 1:
        array = schemas.arrow_column(values)
        return pa.field(name, array.type, nullable=not isinstance(values, np.ndarray)), array
    shape, flat = values.shape[1:], np.ascontiguousarray(values)
    kind = pa.binary(math.prod(shape) * values.itemsize)
    array = pa.FixedSizeBinaryArray.from_buffers(kind, len(values), [None, pa.py_buffer(flat)])
    return pa.field(name, kind, nullable=False, metadata={SHAPE: json.dumps([values.dtype.str, *shape])}), array


def _unpacked(table: pa.Table) -> pa.Table:
    for i, field in enumerate(table.schema):
        if field.metadata and SHAPE in field.metadata:
            kind, *shape = json.loads(field.metadata[SHAPE])
            values = np.frombuffer(_bytes(table.column(i)), kind).reshape(len(table), *shape)
            table = table.set_column(i, field.name, schemas.arrow_column(values))
    return table


def _bytes(column: pa.ChunkedArray) -> memoryview:
    """Of a column of bytes of fixed length."""
    array = schemas.one_array(column)
    width = column.type.byte_width
    return memoryview(array.buffers()[1] or b"")[array.offset * width : (array.offset + len(array)) * width]


def write_shard(file: Path, columns: Columns, window: int, keys: KeyStore | None) -> Shard:
    """Write one shard at once."""
    with Writer(file, window, keys) as writer:
        writer.write(columns)
        return writer.close()


def open_shard(file: Path, keys: KeyStore | None) -> pq.ParquetFile:
    """A shard, opened with the store's keys. Raises DataError when it is damaged, KeyStoreError for a wrong key."""
    try:
        opened = _crypto(keys.folder).file_decryption_properties(_connection(), None, file) if keys else None
        return pq.ParquetFile(file, decryption_properties=opened, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from None


def read_table(shard: pq.ParquetFile, file: Path, groups: list[int] | None = None) -> pa.Table:
    """Some row groups (default: all). Raises DataError when a byte differs."""
    try:
        every = list(range(shard.num_row_groups)) if groups is None else groups
        return _unpacked(shard.read_row_groups(every, use_threads=False))
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from None


def read_rows(shard: pq.ParquetFile, file: Path, groups: list[int] | None = None) -> dict[str, np.ndarray]:
    """The same, as arrays `[rows, *shape]` (of what the model reads, and targets)."""
    table = read_table(shard, file, groups)
    return {name: schemas.to_numpy(table.column(name)) for name in table.column_names}


def window_rows(bytes_per_row: int, shard_rows: int) -> int:
    """Rows of a row group: as many as WINDOW_BYTES hold."""
    return max(1, min(shard_rows, WINDOW_BYTES // max(1, bytes_per_row)))


def rotate(file: Path, keys: KeyStore) -> None:
    """Wrap a shard's data keys with the newest version of the store's key; a kill at any moment leaves one that opens it."""
    material = _key_material(file)
    kept = material.with_name(material.name + ".kept")
    if kept.exists():  # the last one was cut off
        kept.replace(material)
    if not material.exists():
        raise KeyStoreError(f"{file}: its data keys are not beside it ({material.name}): prepare it again")
    shutil.copyfile(material, kept)
    try:
        _crypto.cache_clear()
        _crypto(keys.folder).rotate_master_keys(_connection(), file)
    except (pa.ArrowException, OSError) as error:
        kept.replace(material)
        raise _damaged(file, error) from None
    kept.unlink()


def rotate_all(folder: Path, keys: KeyStore) -> int:
    """`rotate` every shard below a folder; how many there are."""
    names = {str(p.parent / p.name.removesuffix(".kept").removesuffix(".json")) for p in folder.rglob(f"{MATERIAL}*")}
    files = [Path(name.replace(f"/{MATERIAL}", "/")) for name in sorted(names)]
    files = [f for f in files if f.exists()]  # one that is being written has no name yet
    for file in files:
        rotate(file, keys)
    return len(files)


def _key_material(file: Path) -> Path:
    return file.with_name(f"{MATERIAL}{file.name}.json")


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(f"{file}: is damaged or sealed with another key ({str(error).splitlines()[0][:120]}): prepare it again")


def _encryption() -> Any:
    import pyarrow.parquet.encryption as pe

    return pe.EncryptionConfiguration(
        footer_key=DATA_KEY, uniform_encryption=True, encryption_algorithm="AES_GCM_V1", internal_key_material=False
    )


def _connection() -> Any:
    import pyarrow.parquet.encryption as pe

    return pe.KmsConnectionConfig()


@functools.lru_cache
def _crypto(folder: Path) -> Any:
    """Parquet's view of the key store in `folder`; built in each process, since it cannot be pickled."""
    import pyarrow.parquet.encryption as pe

    class Kms(pe.KmsClient):
        def __init__(self):
            super().__init__()
            self.store = KeyStore(folder)

        def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> str:
            return base64.b64encode(self.store.wrap(master_key_identifier, key_bytes)).decode()

        def unwrap_key(self, wrapped_key: bytes, master_key_identifier: str) -> bytes:
            return self.store.unwrap(master_key_identifier, base64.b64decode(wrapped_key))

    return pe.CryptoFactory(lambda _: Kms())
