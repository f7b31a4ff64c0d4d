"""Shards: a split's rows as a few Parquet files of equal length, encrypted, in an order that only the rows decide.

Every row has a 63-bit hash of its content and the seed. The hash says which split it belongs to, and rows are sorted by
it, so neither the order nor the layout of the source's files matters, and equal rows never stand in two splits. Sorted
rows are cut into `n` shards whose lengths differ by one at most: position `p` of an epoch lies in shard `p % n` at place
`p // n`, which is what lets `ingest` give any number of workers the same batches.

A shard is sealed with Parquet Modular Encryption (AES-GCM), which costs nothing to measure, detects a flipped byte, and
is read by Spark and DuckDB too. Its data keys are wrapped by the key store.
"""

import base64
import functools
import hashlib
import itertools
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from ..cluster.keys import DATA_KEY, KeyStore
from ..cluster.storage import read_json, write_json
from ..errors import DataError
from ..project import Split
from . import schema as schemas
from .schema import Schema

SplitName = Literal["train", "validation", "test"]
TARGET = "heliograph-target"
WINDOW_BYTES = 32 << 20


class Shard(BaseModel):
    model_config = ConfigDict(frozen=True)
    file: str
    rows: int
    sha256: str


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

    def rows(self, split: SplitName) -> int:
        return sum(s.rows for s in self.splits[split])

    def write(self, folder: Path) -> None:
        write_json(folder / "manifest.json", self.model_dump())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        return cls.model_validate(read_json(folder / "manifest.json"))


def row_hashes(features: dict[str, np.ndarray], target: np.ndarray, seed: int) -> np.ndarray:
    """int64 `[rows]` in [0, 2^63): BLAKE2b of a row's float32 features (in the order of their names) and its target."""
    rows = len(target)
    # + 0.0 turns -0.0 to 0.0: equal numbers, equal rows.
    parts = [np.ascontiguousarray(features[n] + np.float32(0)).reshape(rows, -1).view(np.uint8) for n in sorted(features)]
    parts.append(np.ascontiguousarray(target).reshape(rows, 1).view(np.uint8))
    content = np.concatenate([p.reshape(rows, -1) for p in parts], axis=1)
    salt = hashlib.blake2b(str(seed).encode(), digest_size=16).digest()
    digests = b"".join(hashlib.blake2b(row.data, digest_size=8, salt=salt).digest() for row in content)
    return (np.frombuffer(digests, ">u8") >> np.uint64(1)).astype(np.int64)


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


def write_shard(file: Path, columns: dict[str, np.ndarray], window: int, keys: KeyStore | None) -> Shard:
    """Write one shard aside and put it in place. keys: seals it; None leaves it in clear."""
    table = pa.table({name: schemas.tensor_column(values) for name, values in columns.items()})
    aside = file.with_suffix(f".{os.getpid()}.part")
    sealed = _crypto(keys.folder).file_encryption_properties(_connection(), _encryption()) if keys else None
    pq.write_table(table, aside, row_group_size=window, compression="zstd", encryption_properties=sealed)
    digest = hashlib.sha256(aside.read_bytes()).hexdigest()
    aside.replace(file)
    return Shard(file=file.name, rows=len(table), sha256=digest)


def open_shard(file: Path, keys: KeyStore | None) -> pq.ParquetFile:
    """A shard, opened with the store's keys. Raises DataError when it is damaged, KeyStoreError for a wrong key."""
    opened = _crypto(keys.folder).file_decryption_properties(_connection()) if keys else None
    try:
        return pq.ParquetFile(file, decryption_properties=opened, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from None


def read_rows(shard: pq.ParquetFile, file: Path, groups: list[int] | None = None) -> dict[str, np.ndarray]:
    """Columns `[rows, *shape]` of some row groups (default: all). Raises DataError when a byte differs."""
    try:
        table = shard.read() if groups is None else shard.read_row_groups(groups)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from None
    return {name: schemas.to_numpy(table.column(name)) for name in table.column_names}


def to_features(columns: dict[str, np.ndarray], schema: Schema) -> dict[str, np.ndarray]:
    return {f.name: columns[f.name] for f in schema.features}


def window_rows(bytes_per_row: int, shard_rows: int) -> int:
    """Rows of a row group: as many as WINDOW_BYTES hold."""
    return max(1, min(shard_rows, WINDOW_BYTES // max(1, bytes_per_row)))


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(f"{file}: is damaged or sealed with another key ({str(error).splitlines()[0][:120]}): prepare it again")


def _encryption() -> Any:
    import pyarrow.parquet.encryption as pe

    return pe.EncryptionConfiguration(footer_key=DATA_KEY, uniform_encryption=True, encryption_algorithm="AES_GCM_V1")


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
