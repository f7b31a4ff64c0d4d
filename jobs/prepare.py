"""Prepare: from the source to encrypted shards, on Ray Data.

    read → check, hash and number the rows → fit preprocessing on the training rows → sort by hash → cut → write

The training and validation shards hold the model's inputs, so an epoch reads them and does nothing else; the test shards
hold raw features, so evaluation goes through the same preprocessing that a request will.
"""

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import pyarrow as pa

from ..cluster.keys import KeyStore
from ..cluster.storage import write_bytes
from ..datasets import shards
from ..datasets.preprocess import Moments, Preprocessing, fit, moments
from ..datasets.schema import Schema, arrays, labels, list_column, to_numpy
from ..datasets.shards import TARGET, Manifest, Shard, SplitName
from ..datasets.sources import infer_schema, open_source
from ..errors import DataError
from ..project import Data

if TYPE_CHECKING:
    import ray.data

HASH = "heliograph-hash"


def prepare(data: Data, base: Path, keys: KeyStore | None, folder: Path, update: Callable[..., None]) -> None:
    """Fill `folder` with shards, `manifest.json`, `schema.json` and `preprocess.json`.

    base: what relative paths start from. keys: seals the shards (None: in clear). Raises DataError.
    """
    import ray

    update("reading the schema")
    source = open_source(data, base)
    schema = infer_schema(source, data)
    check_steps(data, schema)

    update("reading rows")
    columns = [f.name for f in schema.features] + [schema.target]
    checked = functools.partial(_check_rows, schema=schema, seed=data.split.seed)
    rows = source.dataset(columns).map_batches(checked, batch_format="pyarrow", batch_size=None).materialize()
    hashes, targets = _collect(rows)
    plan = _plan(hashes, data, source.where)
    if schema.classes:
        _check_classes(targets[np.searchsorted(hashes, shards.first_train_hash(data.split)) :], schema, source.where)

    update("fitting the preprocessing")
    train = functools.partial(_moments, schema=schema, first_hash=shards.first_train_hash(data.split))
    found = rows.map_batches(train, batch_format="pyarrow", batch_size=None).take_all()
    preprocessing = fit(data.preprocess, [_unpack(row) for row in found], schema)

    update("sorting")
    pieces = rows.sort(HASH).split_at_indices(list(itertools.accumulate(length for _, _, length in plan))[:-1])
    bytes_per_row = 4 * sum(int(np.prod(f.shape, dtype=int)) for f in schema.features) + 8
    window = shards.window_rows(bytes_per_row, max(length for _, _, length in plan))
    write = ray.remote(_write)
    refs = [
        write.remote(folder / file, split, schema, preprocessing, window, keys, *piece.to_arrow_refs())
        for (split, file, _), piece in zip(plan, pieces, strict=True)
    ]
    done: dict[str, list[Shard]] = {split: [] for split in get_args(SplitName)}
    for i, ((split, _, _), ref) in enumerate(zip(plan, refs, strict=True)):
        done[split].append(ray.get(ref))
        update(f"writing shards, {len(hashes):,} rows", i + 1, len(refs))
    write_bytes(folder / "schema.json", schema.model_dump_json(indent=1).encode())
    write_bytes(folder / "preprocess.json", preprocessing.model_dump_json(indent=1).encode())
    Manifest(splits=done, window=window, row_bytes=bytes_per_row, encrypted=keys is not None).write(folder)


def _check_rows(table: pa.Table, schema: Schema, seed: int) -> pa.Table:
    """Features as float32, the target as class index or value, and each row's hash."""
    features, target = arrays(table, schema), labels(table, schema)
    out = {name: list_column(values) for name, values in features.items()}
    return pa.table({**out, TARGET: target, HASH: shards.row_hashes(features, target, seed)})


def _rows(table: pa.Table, schema: Schema) -> tuple[dict[str, np.ndarray], np.ndarray]:
    features = {f.name: to_numpy(table.column(f.name)).reshape(len(table), *f.shape) for f in schema.features}
    return features, to_numpy(table.column(TARGET))


def _moments(table: pa.Table, schema: Schema, first_hash: int) -> pa.Table:
    """The moments of a block's training rows, as one row of JSON (none where the block has no training row)."""
    train = to_numpy(table.column(HASH)) >= first_hash
    if not train.any():
        return pa.table({"moments": pa.array([], pa.string())})
    features, _ = _rows(table, schema)
    found = moments({name: values[train] for name, values in features.items()})
    return pa.table({"moments": [json.dumps({name: m.model_dump() for name, m in found.items()})]})


def _unpack(row: dict[str, str]) -> dict[str, Moments]:
    return {name: Moments(**values) for name, values in json.loads(row["moments"]).items()}


def _plan(hashes: np.ndarray, data: Data, where: str) -> list[tuple[SplitName, str, int]]:
    """The shards, in the order of the sorted rows: split, file, length. Raises DataError for a split without rows."""
    plan = []
    for split, share, first, end in shards.split_ranges(data.split):
        count = int((hashes < end).sum() - (hashes < first).sum())
        if share and not count:
            raise DataError(f"{where}: the {split} split is empty: {share:.3g} of {len(hashes)} rows; give it a larger share")
        lengths = shards.shard_lengths(count, data.shards)
        plan += [(split, f"{split}-{i:05d}.parquet", length) for i, length in enumerate(lengths) if length]
    return plan


def _write(
    file: Path,
    split: SplitName,
    schema: Schema,
    preprocessing: Preprocessing,
    window: int,
    keys: KeyStore | None,
    *tables: pa.Table,
) -> Shard:
    features, target = _rows(pa.concat_tables(tables), schema)
    if split != "test":
        features = preprocessing.apply(features, schema)
    return shards.write_shard(file, {**features, TARGET: target}, window, keys)


def check_steps(data: Data, schema: Schema) -> None:
    names = [f.name for f in schema.features]
    for i, step in enumerate(data.preprocess):
        for column in step.columns or []:
            if column not in names:
                raise DataError(f"data.preprocess[{i}].columns: `{column}` is not a feature: they are {', '.join(names[:12])}")


def _collect(rows: "ray.data.Dataset") -> tuple[np.ndarray, np.ndarray]:
    """All hashes, sorted, and the targets in their order: 16 bytes a row on the driver."""
    batches = list(rows.select_columns([HASH, TARGET]).iter_batches(batch_size=None, batch_format="numpy"))
    hashes = np.concatenate([b[HASH] for b in batches])
    order = np.argsort(hashes, kind="stable")
    return hashes[order], np.concatenate([b[TARGET] for b in batches])[order]


def _check_classes(train: np.ndarray, schema: Schema, where: str) -> None:
    """A class that no training row has can never be learnt."""
    missing = [str(c) for i, c in enumerate(schema.classes) if not (train == i).any()]
    if missing:
        raise DataError(
            f"{where}: no training row of class {', '.join(missing[:5])}: more rows of it are needed, or another seed"
        )
