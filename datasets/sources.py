"""Where rows come from.

A source is cut into pieces (`pieces`), each read by itself on any machine (`read`): part of a file, a file, or a few dozen
images. Rows keep the name of where they stood (`photos.csv:17`), so a bad one can be found again. What cannot be split
into rows at all, such as a line of a CSV file with too many cells, is given back as `Skipped`.
"""

import codecs
import contextlib
import csv
import fnmatch
import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import os
import re
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import DataError
from ..project import Data
from . import schema
from .schema import PATH, listed

if TYPE_CHECKING:
    import ray.data

SKLEARN = ("digits", "iris", "wine", "breast_cancer", "diabetes")
SNIFFED_ROWS = 1000
PIECE_BYTES = 48 << 20
"""Of a piece in memory, about."""
MOST_HASHED_BYTES = 64 << 20
LET_GO_SECONDS = 30
PIECE_IMAGES = 128
MOSTLY = 0.95
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".npz": "npz",
    ".tfrecord": "tfrecord",
    ".tfrecords": "tfrecord",
} | dict.fromkeys(IMAGES, "images")
LABEL = "label"


@dataclass(frozen=True)
class Skipped:
    """A row that is none."""

    row: str
    column: str
    reason: str


@dataclass(frozen=True)
class Chunk:
    """Rows, and where they stood: the one at `i` is `where:numbers[i]`, or `names[i]`."""

    table: pa.Table
    where: str
    numbers: Any = range(1 << 62)
    skipped: list[Skipped] = field(default_factory=list)

    def name(self, row: int) -> str:
        found = self.numbers[row]
        return found if isinstance(found, str) else f"{self.where}:{found}"


@dataclass(frozen=True)
class Piece:
    files: tuple[str, ...]
    first: int = 0
    end: int = 0
    """Of a Parquet file, its row groups; of an array, its rows."""
    values: tuple[tuple[str, Any], ...] = ()
    """Columns that the path tells (Hive partitions)."""


class PieceSource(ABC):
    """A source that is read piece by piece. where: how people call it."""

    where: str

    @abstractmethod
    def identity(self) -> list:
        """What changes when the rows do."""

    @abstractmethod
    def pieces(self) -> list[Piece]: ...

    @abstractmethod
    def read(self, piece: Piece, columns: list[str] | None = None) -> Iterator[Chunk]:
        """A piece's rows in chunks of about PIECE_BYTES at most. Raises DataError for what cannot be read."""

    def head(self) -> pa.Table:
        """The first rows. Raises DataError when there are none."""
        for piece in self.pieces():
            for chunk in self.read(piece):
                if len(chunk.table):
                    return chunk.table.slice(0, SNIFFED_ROWS)
        raise DataError(f"{self.where}: has no rows")


class SklearnSource(PieceSource):
    """`sklearn://digits`: images become an 8×8 tensor column `image`; tables keep their feature names."""

    def __init__(self, name: str):
        if name not in SKLEARN:
            raise DataError(f"sklearn://{name}: no such set: there are {', '.join(SKLEARN)}")
        self.where = f"sklearn://{name}"
        self._name = name

    def identity(self) -> list:
        return [self.where, importlib.metadata.version("scikit-learn")]

    def pieces(self) -> list[Piece]:
        return [Piece(())]

    def read(self, piece: Piece, columns: list[str] | None = None) -> Iterator[Chunk]:
        from sklearn import datasets

        bunch: Any = getattr(datasets, f"load_{self._name}")()
        if "images" in bunch:
            features = {"image": schema.arrow_column(bunch.images)}
        else:
            features = {str(n): pa.array(bunch.data[:, i]) for i, n in enumerate(bunch.feature_names)}
        table = pa.table(features | {"target": pa.array(bunch.target)})
        yield Chunk(table.select(columns or table.column_names), self.where)


class FunctionSource:
    """`file:function` of the project: called where the cluster is, it returns a Ray Dataset of rows."""

    def __init__(self, call: str, base: Path):
        self.where = call
        module, self._name = call.split(":")
        self._file = base / f"{module}.py"
        if not self._file.is_file():
            raise DataError(f"{self._file}: not found: data.source is `{call}`")

    def identity(self) -> list:
        return [self.where, self._file.read_text()]

    def dataset(self) -> "ray.data.Dataset":
        import ray.data

        spec = importlib.util.spec_from_file_location("heliograph_source", self._file)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            made = getattr(module, self._name)()
        except Exception as error:
            raise DataError(f"{self._file}: {self._name} failed: {type(error).__name__}: {_first_line(error)}") from None
        if not isinstance(made, ray.data.Dataset):
            raise DataError(f"{self._file}: {self._name} returned {type(made).__name__}, not a ray.data.Dataset")
        return made

    def head(self) -> pa.Table:
        rows = self.dataset().take_batch(SNIFFED_ROWS, batch_format="pyarrow")
        assert isinstance(rows, pa.Table)
        return rows


class FileSource(PieceSource):
    """Files of one format, found by a path, a folder or a glob, here or in S3 (credentials are found the AWS way)."""

    def __init__(self, pattern: str, base: Path, data: Data):
        self.where, self._base = pattern, base
        found, self._root = _s3_files(pattern) if pattern.startswith("s3://") else _local_files(pattern, base)
        self._stamps = {file: (size, changed) for file, size, changed in found}
        self._files = sorted(self._stamps)
        if not self._files:
            raise DataError(f"{self._root}: not found: data.source names files, a folder or a glob of {', '.join(FORMATS)}")
        kinds = {FORMATS[PurePosixPath(f).suffix.lower()] for f in self._files}
        if len(kinds) != 1:
            raise DataError(f"{self._root}: files of one kind are needed; found {', '.join(sorted(kinds))}")
        self.format = kinds.pop()
        self._types = data.types
        self._image_paths = [n for n, kind in data.types.items() if kind == "image"]

    def identity(self) -> list:
        """Paths, sizes and times, since hashing terabytes would take a run's time; of a few files that came with the project,
        what is in them, for the project may be moved, or sent to a cluster."""
        size = sum(size for size, _ in self._stamps.values())
        if size <= MOST_HASHED_BYTES and all(Path(file).is_relative_to(self._base) for file in self._files):
            hashes = {f: hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in self._files}
            return [[str(Path(f).relative_to(self._base)), self._stamps[f][0], hashes[f]] for f in self._files]
        return [[file, *self._stamps[file]] for file in self._files]

    def head(self) -> pa.Table:
        table = super().head()
        for name, kind in self.csv_types.items() if self.format == "csv" else ():
            if pa.types.is_string(table.column(name).type) and pa.types.is_floating(kind):  # but for a few cells
                table = table.set_column(table.column_names.index(name), name, pa.array(schema.numbers(table.column(name))))
        return table

    def pieces(self) -> list[Piece]:
        if self.format == "images":
            sizes = [max(self._stamps[file][0], PIECE_BYTES // PIECE_IMAGES) for file in self._files]
            return [Piece(tuple(self._files[a:b])) for a, b in _runs(sizes, PIECE_BYTES)]
        return [piece for file in self._files for piece in self._cut(file)]

    def _cut(self, file: str) -> list[Piece]:
        values = _hive(file.removeprefix(self._root)) if self.format == "parquet" else ()
        if self.format == "parquet":
            with self._opened(file) as (opened, _):
                import pyarrow.parquet as pq

                meta = pq.ParquetFile(opened).metadata
                sizes = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
            return [Piece((file,), a, b, values) for a, b in _runs(sizes, PIECE_BYTES)]
        if self.format == "npz":
            return [Piece((file,), a, b) for a, b in self._npz_runs(file)]
        return [Piece((file,))]

    def read(self, piece: Piece, columns: list[str] | None = None) -> Iterator[Chunk]:
        if self.format == "images":
            yield from self._images(piece, columns)
            return
        file = piece.files[0]
        wanted = None if columns is None else [c for c in columns if c not in dict(piece.values)]
        with self._opened(file) as (opened, name):
            for chunk in getattr(self, f"_{self.format}")(opened, name, piece, wanted):
                table = chunk.table
                for column, value in piece.values:
                    table = table.append_column(column, pa.array([value] * len(table)))
                if columns is not None:
                    schema.require(columns, table.column_names, name)
                    table = table.select(columns)
                for column in self._image_paths:
                    table = _with_files(table, column, str(PurePosixPath(file).parent))
                yield Chunk(table, chunk.where, chunk.numbers, chunk.skipped)

    def _opened(self, file: str) -> "_Opened":
        return _Opened(file, _name(file, self._root), self.format)

    def _parquet(self, opened: Any, name: str, piece: Piece, columns: list[str] | None) -> Iterator[Chunk]:
        import pyarrow.parquet as pq

        file = pq.ParquetFile(opened)
        schema.require(columns or [], file.schema_arrow.names, name)
        self._same_types(file.schema_arrow, name)
        before = sum(file.metadata.row_group(i).num_rows for i in range(piece.first))
        rows = sum(file.metadata.row_group(i).num_rows for i in range(piece.first, piece.end))
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(piece.first, piece.end))
        batch = max(1, int(rows * min(1.0, PIECE_BYTES / max(1, size))))
        for part in file.iter_batches(batch, list(range(piece.first, piece.end)), columns, use_threads=False):
            table = pa.Table.from_batches([part])
            yield Chunk(table, f"{name} row", range(before, before + len(table)))
            before += len(table)

    def _same_types(self, found: pa.Schema, name: str) -> None:
        """Numbers and text under one name, in files of one source, are a mistake somewhere."""
        first = self._first_schema
        for column in found.names:
            if column in first.names:
                here, there = (schema.kind_of(s.field(column).type) for s in (found, first))
                if here != there:
                    types = f"{found.field(column).type}, in {_name(self._files[0], self._root)} it is {first.field(column).type}"
                    raise DataError(f"{name}: column `{column}` is {types}: the files of a source have one type a column")

    @functools.cached_property
    def _first_schema(self) -> pa.Schema:
        import pyarrow.parquet as pq

        with self._opened(self._files[0]) as (opened, _):
            return pq.ParquetFile(opened).schema_arrow

    def _csv(self, opened: Any, name: str, _: Piece, columns: list[str] | None) -> Iterator[Chunk]:
        kinds = self.csv_types
        for chunk in _csv_text(opened, name, columns):
            made = {c: _castable(chunk.table.column(c), kinds.get(c)) for c in chunk.table.column_names}
            yield Chunk(pa.table(made), name, chunk.numbers, chunk.skipped)

    @functools.cached_property
    def csv_types(self) -> dict[str, pa.DataType]:
        """What the cells of a CSV column are, where they are not text: by the first rows of the first file."""
        with self._opened(self._files[0]) as (opened, name):
            first = next((chunk.table for chunk in _csv_text(opened, name, None) if len(chunk.table)), pa.table({}))
        given = {"number": pa.float64(), "time": pa.timestamp("us")}
        found = {}
        for column in first.column_names:
            cells = first.column(column).slice(0, SNIFFED_ROWS).drop_null()
            kind = self._types.get(column)
            tried = [given[kind]] if kind in given else [] if kind else [pa.int64(), pa.float64(), pa.timestamp("us")]
            fits = next((t for t in tried if not pa.types.is_string(_castable(cells, t).type)), None)
            if fits is None and not kind and _mostly_numbers(cells):
                fits = pa.float64()
            if fits is not None and len(cells):
                found[column] = fits
        return found

    def _jsonl(self, opened: Any, name: str, _: Piece, columns: list[str] | None) -> Iterator[Chunk]:
        rows: list[dict] = []
        numbers: list[int] = []
        skipped: list[Skipped] = []
        size = 0
        for number, line in enumerate(io.BufferedReader(opened), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                skipped.append(Skipped(f"{name}:{number}", "", "not a JSON object"))
                continue
            rows.append(row if columns is None else {c: row.get(c) for c in columns})
            numbers.append(number)
            size += len(line)
            if size > PIECE_BYTES // 4:
                yield Chunk(_rows_table(rows), name, numbers, skipped)
                rows, numbers, skipped, size = [], [], [], 0
        if rows or skipped:
            yield Chunk(_rows_table(rows), name, numbers, skipped)

    def _npz(self, opened: Any, name: str, piece: Piece, columns: list[str] | None) -> Iterator[Chunk]:
        with np.load(opened, allow_pickle=False) as arrays:
            schema.require(columns or [], list(arrays), name)
            made = {}
            for column in columns or list(arrays):
                values = arrays[column][piece.first : piece.end]
                if values.dtype.kind not in "biufU":
                    raise DataError(f"{name}: array `{column}` is {values.dtype}: numbers or text are read")
                if values.ndim > 1:
                    values = values.astype(np.float32)
                made[column] = schema.arrow_column(values if values.dtype.kind != "U" else pa.array(values.tolist()))
        yield Chunk(pa.table(made), f"{name} row", range(piece.first, piece.end))

    def _npz_runs(self, file: str) -> list[tuple[int, int]]:
        with self._opened(file) as (opened, name), np.load(opened, allow_pickle=False) as arrays:
            shapes = {column: arrays[column].shape for column in arrays}
            lengths = {column: shape[0] if shape else 0 for column, shape in shapes.items()}
            if len(set(lengths.values())) != 1:
                raise DataError(f"{name}: its arrays have different numbers of rows: {lengths}")
            rows = next(iter(lengths.values()))
            row_bytes = sum(8 * int(np.prod(shape[1:], dtype=int)) for shape in shapes.values())
        step = max(1, PIECE_BYTES // max(1, row_bytes))
        return [(a, min(a + step, rows)) for a in range(0, rows, step)]

    def _tfrecord(self, opened: Any, name: str, _: Piece, columns: list[str] | None) -> Iterator[Chunk]:
        """Records of `tf.train.Example`: a feature of one value is that value, one of several is a list."""
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        import tensorflow as tf

        rows: list[dict] = []
        first = 0
        for number, record in enumerate(_records(opened, name)):
            example: Any = tf.train.Example.FromString(record)
            row = {}
            for column, held in example.features.feature.items():
                values = list(getattr(held, held.WhichOneof("kind") or "float_list").value)
                row[column] = values[0] if len(values) == 1 else values or None
            rows.append(row if columns is None else {c: row.get(c) for c in columns})
            if len(rows) * max(1, len(record)) > PIECE_BYTES:
                yield Chunk(_rows_table(rows), f"{name} record", range(first, number + 1))
                rows, first = [], number + 1
        if rows:
            yield Chunk(_rows_table(rows), f"{name} record", range(first, first + len(rows)))

    def _images(self, piece: Piece, columns: list[str] | None) -> Iterator[Chunk]:
        names = [_name(f, self._root) for f in piece.files]
        folders = [PurePosixPath(f).parent.name for f in piece.files]
        wanted = columns is None or "image" in columns
        contents = [_content(f) if wanted else None for f in piece.files]
        given = {"image": pa.array(contents, pa.binary()), LABEL: folders, PATH: names}
        table = pa.table(given)
        schema.require(columns or [], table.column_names, self.where)
        yield Chunk(table.select(columns or table.column_names), "", names)


Source = PieceSource | FunctionSource


def open_source(data: Data, base: Path) -> Source:
    """The source that `data.source` names; paths are relative to the project. Raises DataError when it is not there."""
    given = data.source
    if given.startswith("sklearn://"):
        return SklearnSource(given.removeprefix("sklearn://"))
    if "://" in given and not given.startswith("s3://"):
        raise DataError(f"{given}: unknown kind of source `{given.split('://')[0]}`: use sklearn://NAME, s3://… or a path")
    if re.fullmatch(r"\w+:\w+", given):
        return FunctionSource(given, base)
    return FileSource(given, base, data)


# --- files ---------------------------------------------------------------------------------------------------------------


def _name(file: str, root: str) -> str:
    """What people know a file by: its path from the source's folder on."""
    return file.removeprefix(root).lstrip("/") or PurePosixPath(file).name


class _Opened:
    """A file, open, with the name that people know it by; every error of reading it is one line."""

    def __init__(self, file: str, name: str, format: str):
        self._file, self.name, self._format = file, name, format

    def __enter__(self) -> tuple[Any, str]:
        try:
            filesystem, path = _filesystem(self._file)
            self._opened: Any = filesystem.open_input_file(path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self._file}: cannot be read: {_first_line(error)}") from None
        return self._opened, self.name

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        self._opened.close()
        if isinstance(error, (pa.ArrowException, OSError, ValueError, EOFError)) and not isinstance(error, DataError):
            raise DataError(f"{self._file}: cannot be read as {self._format}: {_first_line(error)}") from None


@functools.lru_cache(1)
def _s3() -> Any:
    """The region, the keys and the endpoint are those that boto3 finds: environment, profile, instance role."""
    import boto3
    import pyarrow.fs as pfs

    session = boto3.Session()
    found, client = session.get_credentials(), session.client("s3", region_name=session.region_name or "us-east-1")
    options: dict[str, Any] = {"anonymous": True}
    if found:
        frozen = found.get_frozen_credentials()
        options = {"access_key": frozen.access_key, "secret_key": frozen.secret_key, "session_token": frozen.token}
    return pfs.S3FileSystem(endpoint_override=client.meta.endpoint_url, region=client.meta.region_name, **options)


def _filesystem(file: str) -> tuple[Any, str]:
    import pyarrow.fs as pfs

    return (_s3(), file.removeprefix("s3://")) if file.startswith("s3://") else (pfs.LocalFileSystem(), file)


def _usable(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in FORMATS and not path.name.startswith((".", "_"))


Found = list[tuple[str, int, int]]
"""(path, bytes, nanoseconds of the last change)."""


def _local_files(pattern: str, base: Path) -> tuple[Found, str]:
    """The files, and the folder that their names are told from."""

    def stamped(files: list[str]) -> Found:
        return [(file, (found := Path(file).stat()).st_size, found.st_mtime_ns) for file in files]

    place = (base / pattern).absolute()
    if place.is_dir():
        return stamped([str(p) for p in place.rglob("*") if p.is_file() and _usable(p.name)]), str(place)
    found = [p for p in sorted(glob.glob(str(place), recursive=True)) if Path(p).is_file()]  # noqa: PTH207 (absolute globs too)
    for file in found:
        if PurePosixPath(file).suffix.lower() not in FORMATS:
            raise DataError(f"{file}: is of no known format: they are {', '.join(FORMATS)}")
    root = str(place.parent) if len(found) == 1 else os.path.commonpath(found) if found else str(place)
    return stamped(found), root


def _s3_files(pattern: str) -> tuple[Found, str]:
    import pyarrow.fs as pfs

    parts = pattern.removeprefix("s3://").split("/")
    fixed = list(itertools.takewhile(lambda part: not any(c in part for c in "*?["), parts))
    try:
        place = "/".join(fixed).rstrip("/")
        info = _s3().get_file_info(place)
        if info.type == pfs.FileType.File:
            return [(f"s3://{place}", info.size, info.mtime_ns)], f"s3://{place.rpartition('/')[0]}"
        listed = _s3().get_file_info(pfs.FileSelector(place, recursive=True))
    except OSError as error:
        raise DataError(f"{pattern}: cannot be listed: {_first_line(error)}") from None
    files = [i for i in listed if i.type == pfs.FileType.File and _usable(i.path)]
    if len(fixed) < len(parts):
        files = [i for i in files if fnmatch.fnmatch(i.path, "/".join(parts).replace("**/", "*"))]
    return [(f"s3://{i.path}", i.size, i.mtime_ns) for i in files], f"s3://{place}"


def _content(file: str) -> bytes | None:
    try:
        filesystem, path = _filesystem(file)
        with filesystem.open_input_stream(path) as opened:
            return opened.read()
    except OSError:
        return None


def _with_files(table: pa.Table, column: str, folder: str) -> pa.Table:
    """A column of paths, relative to their table's folder, becomes the files' contents; null where there is none."""
    if column not in table.column_names or not pa.types.is_string(table.column(column).type):
        return table

    def place(name: str) -> str:
        return name if "://" in name or name.startswith("/") else f"{folder}/{name}"

    found = [_content(place(name)) if name else None for name in table.column(column).to_pylist()]
    return table.set_column(table.column_names.index(column), column, pa.array(found, pa.binary()))


def _hive(path: str) -> tuple[tuple[str, Any], ...]:
    """`year=2024/kind=a/x.parquet` to its columns; a value of digits is a number."""
    pairs = [part.split("=", 1) for part in path.split("/")[:-1] if "=" in part]
    return tuple((name, int(value) if value.lstrip("-").isdigit() else value) for name, value in pairs)


def _runs(sizes: list[int], most: int) -> list[tuple[int, int]]:
    """Ranges of items that follow each other, of no more than `most` together unless one alone is more."""
    out, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > most:
            out.append((start, i))
            start, total = i, 0
        total += size
    return [*out, (start, len(sizes))] if len(sizes) > start else out


def _csv_text(opened: Any, name: str, columns: list[str] | None) -> Iterator[Chunk]:
    """The cells of a CSV file as text. A line of too many or too few cells is skipped."""
    header = next(csv.reader(io.StringIO(_begin(opened.read(1 << 16), name))), [])
    schema.require(columns or [], header, name)
    if len(set(header)) < len(header):
        raise DataError(f"{name}: its first line names a column twice: {listed(header)}")
    opened.seek(0)
    skipped: list[Skipped] = []
    lost: list[int] = []

    def note(row: Any) -> None:
        skipped.append(Skipped(f"{name}:{row.number}", "", f"{row.actual_columns} cells, not {row.expected_columns}"))
        lost.append(row.number)

    held: list[pa.RecordBatch] = []
    first = 2
    for batch in itertools.chain(_csv_batches(opened, header, columns, note), [None]):
        if batch is not None:
            held.append(batch)
        if held and (batch is None or sum(b.nbytes for b in held) > PIECE_BYTES // 2):
            table = pa.Table.from_batches(held)
            numbers = np.setdiff1d(np.arange(first, first + len(table) + len(lost)), lost)[: len(table)]
            yield Chunk(table, name, numbers, list(skipped))
            first = int(numbers[-1]) + 1 if len(numbers) else first
            held, skipped[:] = [], []
    if skipped:
        yield Chunk(pa.table({c: pa.array([], pa.string()) for c in columns or header}), name, [], skipped)


def _begin(read: bytes, name: str) -> str:
    """As text, but for a character that is cut off. Raises DataError."""
    try:
        return codecs.getincrementaldecoder("utf-8-sig")().decode(read)
    except UnicodeDecodeError as error:
        line = read.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}:{line}: is not UTF-8: save it so (what Excel wrote: iconv -f WINDOWS-1252 -t UTF-8 {name} > utf8.csv)"
        ) from None


def _csv_batches(
    opened: Any, header: list[str], columns: list[str] | None, note: Callable[[Any], None]
) -> Iterator[pa.RecordBatch]:
    """Cells as text; `note` hears of each line of too many or too few. At its end Arrow's threads have let go of Python: one that
    frees what it was given while the process ends would abort it."""
    import pyarrow.csv as pcsv

    def handler(row: Any) -> str:
        note(row)
        return "skip"

    held = weakref.ref(handler)
    convert = pcsv.ConvertOptions(
        column_types=dict.fromkeys(header, pa.string()), include_columns=columns or [], strings_can_be_null=True
    )
    # One thread, so that a bad line knows its number.
    reading = pcsv.ReadOptions(use_threads=False, block_size=4 << 20)
    parsing = pcsv.ParseOptions(newlines_in_values=True, invalid_row_handler=handler)
    try:
        yield from pcsv.open_csv(opened, reading, parsing, convert)
    finally:
        del handler, parsing
        until = time.monotonic() + LET_GO_SECONDS
        while held() is not None and time.monotonic() < until:
            time.sleep(0.001)


def _castable(column: pa.ChunkedArray, kind: pa.DataType | None) -> pa.ChunkedArray:
    """Text as `kind`, or as it was where a cell does not fit."""
    try:
        return column if kind is None else column.cast(kind)
    except pa.ArrowException:
        return column


def _mostly_numbers(cells: pa.ChunkedArray) -> bool:
    """Whether a few cells are mistakes in a column of numbers."""
    fits = pc.match_substring_regex(cells, r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$")  # pyright: ignore[reportAttributeAccessIssue]
    return len(cells) > 0 and pc.sum(fits).as_py() >= MOSTLY * len(cells)  # pyright: ignore[reportAttributeAccessIssue]


def _rows_table(rows: list[dict]) -> pa.Table:
    """Rows of plain values; a column whose values are of several types becomes text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    made = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            made[name] = pa.array(values)
            if pa.types.is_binary(made[name].type):
                with contextlib.suppress(pa.ArrowInvalid):  # bytes that are UTF-8 throughout are text; no image is
                    made[name] = made[name].cast(pa.string())
        except (pa.ArrowException, TypeError):
            made[name] = pa.array([v if isinstance(v, str) or v is None else json.dumps(v) for v in values])
    return pa.table(made)


def _records(opened: Any, name: str) -> Iterator[bytes]:
    """TFRecord: length, its checksum, data, its checksum (the framing is fixed; checksums are masked CRC-32C)."""
    while head := opened.read(12):
        length = int.from_bytes(head[:8], "little")
        record = opened.read(length + 4)
        if len(head) < 12 or len(record) < length + 4:
            raise DataError(f"{name}: ends within a record")
        yield record[:length]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
