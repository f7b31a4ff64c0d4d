"""Batch prediction: a whole dataset through a model of the registry, across the cluster by Ray Data.

A task reads a piece of the source, checks its rows against the schema, runs them and publishes one Parquet file: the rows
as they were, with `prediction`, the scores, and `problem` for a row that cannot be predicted. A file that is there is done.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..cluster.keys import KeyStore
from ..cluster.runtime import LocalCluster
from ..cluster.storage import exclusive, read_json, write_bytes, write_json
from ..datasets.schema import Bad, prediction_columns, require, typed
from ..datasets.sources import FunctionSource, PieceSource, open_source
from ..errors import RunError
from ..project import Project
from . import bundle
from .display import Display
from .engine import Engine
from .prepare import across
from .run import key_store, registry

ROWS = 4096
"""Of a call of the engine."""


def predict_source(project: Project, base: Path, run: Path, given: str, out: Path, version: int | None, display: Display) -> str:
    """Write predictions for the source `given` to the folder `out`; says what was done.

    Raises RegistryError, SignatureError, DataError, and RunError when `out` holds something else.
    """
    models = registry(project, base)
    version = version or models.resolve(project.name)
    folder = models.bundle(project.name, version)
    keys = key_store(project, base, run)
    bundle.verify(folder, keys.public_key())
    data = project.data.model_copy(update={"source": given})
    source = open_source(data, Path.cwd())
    if isinstance(source, FunctionSource):
        raise RunError(f"{given}: a function is no source for predictions yet: write its rows to files first")
    pieces = source.pieces()
    with exclusive(out):
        note = {"source": source.identity(), "model": f"{project.name}@{version}"}
        if (out / "source.json").exists() and read_json(out / "source.json") != note:
            raise RunError(f"{out}: holds predictions of another source or version: name another folder")
        write_json(out / "source.json", note)
        missing = [i for i in range(len(pieces)) if not _file(out, i).exists()]
        with LocalCluster(logs=out / "ray-logs") as cluster, display.open(), display.stage("predict"):
            if missing:
                cluster.start()
                work = functools.partial(_predict, source, (str(folder), str(keys.folder)), str(out.resolve()))
                across(work, [(i, pieces[i]) for i in missing], display.update, f"predicting {given}")
    rows = bad = 0
    for i in range(len(pieces)):
        counts = pq.read_table(_file(out, i), columns=["problem"]).column("problem")
        rows, bad = rows + len(counts), bad + len(counts) - counts.null_count
    return f"{rows:,} rows by {project.name}@{version} in {out}" + (f"; {bad:,} have a problem, see that column" if bad else "")


def _file(out: Path, number: int) -> Path:
    return out / f"part-{number:05}.parquet"


@functools.lru_cache(1)
def _engine(bundle: str, keys: str) -> Engine:
    return Engine(Path(bundle), Path(bundle), threads=1, keys=KeyStore(keys))


def _predict(source: PieceSource, model: tuple[str, str], out: str, item: tuple[int, Any]) -> int:
    """model: the folders of its bundle and of the key store."""
    number, piece = item
    engine = _engine(*model)
    tables = []
    for chunk in source.read(piece):
        tables += [_predicted(engine, chunk.table.slice(at, ROWS), chunk.where) for at in range(0, len(chunk.table), ROWS)]
    sink = pa.BufferOutputStream()
    if not tables:
        tables = [pa.table({"problem": pa.array([], pa.string())})]
    pq.write_table(pa.concat_tables(tables, promote_options="default"), sink, compression="zstd")
    write_bytes(_file(Path(out), number), sink.getvalue().to_pybytes())
    return number


def _predicted(engine: Engine, table: pa.Table, where: str) -> pa.Table:
    schema = engine.schema
    require([f.name for f in schema.features if not f.optional], table.column_names, where)
    bad = Bad(len(table))
    columns = typed(table, schema.features, bad)
    outputs = np.zeros((len(table), schema.outputs), np.float32)
    if (good := np.flatnonzero(~bad.mask)).size:
        outputs[good] = engine.predict({n: c[good] if isinstance(c, np.ndarray) else c.take(good) for n, c in columns.items()})
    made = prediction_columns(outputs, schema, bad.mask)
    problems = [f"{bad.reasons[i][0]}: {bad.reasons[i][1]}" if bad.mask[i] else None for i in range(len(table))]
    made["problem"] = pa.array(problems, pa.string())
    for name, values in made.items():
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, values)
    return table
