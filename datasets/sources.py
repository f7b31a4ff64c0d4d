"""Where rows come from: scikit-learn's bundled sets, Parquet files, CSV files.

A source gives two things: `table(columns, limit)`, read here without Ray, which the schema is inferred from and which
`heliograph check` uses; and `dataset(columns)`, the same rows as a Ray Dataset, read across the cluster.
"""

import glob
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ..errors import DataError
from ..project import Data
from . import schema

if TYPE_CHECKING:
    import ray.data

SKLEARN = ("digits", "iris", "wine", "breast_cancer", "diabetes")
SNIFFED_ROWS = 1000


class SklearnSource:
    """`sklearn://digits`: images become an 8×8 tensor column `image`; tables keep their feature names."""

    def __init__(self, name: str):
        if name not in SKLEARN:
            raise DataError(f"sklearn://{name}: no such set: there are {', '.join(SKLEARN)}")
        self.where = f"sklearn://{name}"
        self._name = name

    def identity(self) -> list:
        return [self.where, importlib.metadata.version("scikit-learn")]

    def table(self, columns: list[str] | None = None, limit: int | None = None) -> pa.Table:
        from sklearn import datasets

        bunch: Any = getattr(datasets, f"load_{self._name}")()
        if "images" in bunch:
            features = {"image": schema.tensor_column(bunch.images)}
        else:
            features = {str(n): pa.array(bunch.data[:, i]) for i, n in enumerate(bunch.feature_names)}
        table = pa.table(features | {"target": pa.array(bunch.target)})
        return table.select(columns or table.column_names).slice(0, limit)

    def dataset(self, columns: list[str]) -> "ray.data.Dataset":
        import ray.data

        return ray.data.from_arrow(self.table(columns))


class FileSource:
    """A file, a folder or a glob of one format."""

    def __init__(self, pattern: str, base: Path):
        self.where = pattern
        place = base / pattern
        if place.is_dir():
            found = [p for p in sorted(place.rglob("*")) if p.suffix in (".parquet", ".csv")]
        else:
            found = [p for p in sorted(map(Path, glob.glob(str(place), recursive=True))) if p.is_file()]  # noqa: PTH207 (absolute globs too)
        if not found:
            raise DataError(f"{place}: not found: data.source names a .parquet or .csv file, a folder or a glob of them")
        kinds = {p.suffix for p in found}
        if len(kinds) != 1 or not kinds <= {".parquet", ".csv"}:
            raise DataError(f"{place}: files of one kind are needed, .parquet or .csv; found {', '.join(sorted(kinds))}")
        self.files = [str(p.resolve()) for p in found]
        self.format = kinds.pop()[1:]

    def identity(self) -> list:
        """Changes when a file does: paths, sizes and times, since hashing terabytes would take a run's time."""
        return [[f, Path(f).stat().st_size, Path(f).stat().st_mtime_ns] for f in self.files]

    def table(self, columns: list[str] | None = None, limit: int | None = None) -> pa.Table:
        import pyarrow.dataset as pds

        try:
            data = pds.dataset(self.files, format=self.format)
            schema.require(columns or [], data.schema.names, self.where)
            table = data.head(limit, columns=columns) if limit else data.to_table(columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.where}: cannot be read as {self.format}: {_first_line(error)}") from None
        if not len(table):
            raise DataError(f"{self.where}: has no rows")
        return table

    def dataset(self, columns: list[str]) -> "ray.data.Dataset":
        import pyarrow.csv
        import pyarrow.dataset as pds
        import ray.data

        if self.format == "parquet":
            return ray.data.read_parquet(self.files).select_columns(columns)
        whole = pds.dataset(self.files, format="csv").schema
        kinds = {c: whole.field(c).type for c in columns}
        options = pyarrow.csv.ConvertOptions(column_types=kinds, include_columns=columns)
        return ray.data.read_csv(self.files, convert_options=options)


Source = SklearnSource | FileSource


def open_source(data: Data, base: Path) -> Source:
    """The source that `data.source` names; paths are relative to the project. Raises DataError when it is not there."""
    if data.source.startswith("sklearn://"):
        return SklearnSource(data.source.removeprefix("sklearn://"))
    if "://" in data.source:
        kind = data.source.split("://")[0]
        raise DataError(f"{data.source}: unknown kind of source `{kind}`: use sklearn://NAME or a path")
    return FileSource(data.source, base)


def infer_schema(source: Source, data: Data) -> schema.Schema:
    """Types from the first rows, the target from all of them. Raises DataError."""
    head = source.table(limit=SNIFFED_ROWS)
    schema.require([data.target, *(data.features or [])], head.column_names, source.where)
    return schema.infer(head, source.table([data.target]).column(0), data, source.where)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
