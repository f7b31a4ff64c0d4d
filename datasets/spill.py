"""Rows aside, in buckets: a file of Arrow streams, one a bucket, each sealed with AES-256-GCM when there are keys.

Unlike Parquet, whose footer grows with columns times row groups and is read whole, a bucket is found by its offset alone.
The data key of a file is drawn anew, and lies in its index wrapped by the key store.
"""

import base64
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import BaseModel

from ..cluster.keys import DATA_KEY, KeyStore
from ..errors import DataError
from .schema import Columns, arrow_column

NONCE = 12


class Index(BaseModel):
    """Where the buckets of a file are: bucket `i` from `ends[i - 1]` to `ends[i]`."""

    file: str
    ends: list[int]
    key: str = ""
    """Wrapped, in base64."""


def write(file: Path, buckets: Iterator[Columns | None], keys: KeyStore | None) -> Index:
    """Write one bucket after the other (None: an empty one), aside, and put the file in its place.

    Its name gets an ending of its own, so that a task of a killed job that is not dead yet cannot write over it."""
    file = file.with_name(f"{file.name}-{secrets.token_hex(4)}")
    key = AESGCM.generate_key(256) if keys else b""
    aside = file.with_name(f".{file.name}.{os.getpid()}.part")
    ends: list[int] = []
    try:
        with aside.open("wb") as out:
            for i, columns in enumerate(buckets):
                if columns is not None:
                    sink = pa.BufferOutputStream()
                    table = pa.table({name: arrow_column(values) for name, values in columns.items()})
                    with pa.ipc.new_stream(sink, table.schema) as stream:
                        stream.write_table(table)
                    content = sink.getvalue().to_pybytes()
                    if key:
                        nonce = secrets.token_bytes(NONCE)
                        out.write(nonce)
                        out.write(AESGCM(key).encrypt(nonce, content, f"{file.name} {i}".encode()))
                    else:
                        out.write(content)
                ends.append(out.tell())
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
    return Index(file=file.name, ends=ends, key=base64.b64encode(keys.wrap(DATA_KEY, key)).decode() if keys else "")


def read(folder: Path, index: Index, buckets: Iterator[int] | range, keys: KeyStore | None) -> Iterator[pa.Table]:
    """Some buckets that are not empty. Raises DataError for a byte that differs, KeyStoreError for a wrong key."""
    key = keys.unwrap(DATA_KEY, base64.b64decode(index.key)) if keys else b""
    with (folder / index.file).open("rb") as opened:
        for i in buckets:
            start = index.ends[i - 1] if i else 0
            if index.ends[i] == start:
                continue
            opened.seek(start)
            content = opened.read(index.ends[i] - start)
            if key:
                try:
                    content = AESGCM(key).decrypt(content[:NONCE], content[NONCE:], f"{index.file} {i}".encode())
                except InvalidTag:
                    raise DataError(f"{folder / index.file}: is damaged: remove {folder} and prepare it again") from None
            yield pa.ipc.open_stream(content).read_all()
