"""Prepare: from the source to encrypted shards, on Ray Data.

    read → check and hash the rows → fit preprocessing on the training rows → cut by the order of the hashes → write

Ray Data reads and checks; the shuffle is two plain tasks a block and a shard, since Ray Data's own sort fails on tensor
columns with this pyarrow, and took 11 s of starting processes for 1,797 rows.

The training and validation shards hold the model's inputs, so an epoch reads them and does nothing else; the test shards
hold raw features, so evaluation goes through the same preprocessing that a request will.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from ..cluster.keys import KeyStore
from ..cluster.storage import write_bytes
from ..datasets import shards
from ..datasets.preprocess import Moments, Preprocessing, fit, moments
from ..datasets.schema import Schema, arrays, labels, tensor_column, to_numpy
from ..datasets.shards import TARGET, Manifest, Shard, SplitName
from ..datasets.sources import infer_schema, open_source
from ..errors import DataError
from ..project import Data

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
    blocks = source.dataset(columns).map_batches(checked, batch_format="pyarrow", batch_size=None).to_arrow_refs()

    update("fitting the preprocessing")
    summarise = ray.remote(_summarise)
    first_train = shards.first_train_hash(data.split)
    summaries = ray.get([summarise.remote(block, schema, first_train) for block in blocks])
    hashes, targets = (np.concatenate(parts) for parts in list(zip(*summaries, strict=True))[:2])
    plan = _plan(hashes, data, source.where)
    class_rows = _class_rows(targets[hashes >= first_train], schema, source.where)
    preprocessing = fit(data.preprocess, [found for *_, found in summaries], schema)

    update("writing shards")
    cut = ray.remote(_cut).options(num_returns=len(plan))
    starts = np.cumsum([len(block_hashes) for block_hashes, *_ in summaries])[:-1]
    shard_of = np.split(_shard_of_rows(hashes, [length for *_, length in plan]), starts)
    pieces: list[Any] = [cut.remote(block, numbers, len(plan)) for block, numbers in zip(blocks, shard_of, strict=True)]
    bytes_per_row = 4 * sum(int(np.prod(f.shape, dtype=int)) for f in schema.features) + 8
    window = shards.window_rows(bytes_per_row, max(length for *_, length in plan))
    write = ray.remote(_write)
    refs = [
        write.remote(folder / file, split, schema, preprocessing, window, keys, *(piece[i] for piece in pieces))
        for i, (split, file, _) in enumerate(plan)
    ]
    done: dict[str, list[Shard]] = {split: [] for split in get_args(SplitName)}
    for i, ((split, _, _), ref) in enumerate(zip(plan, refs, strict=True)):
        done[split].append(ray.get(ref))
        update(f"writing shards, {len(hashes):,} rows", i + 1, len(refs))
    write_bytes(folder / "schema.json", schema.model_dump_json(indent=1).encode())
    write_bytes(folder / "preprocess.json", preprocessing.model_dump_json(indent=1).encode())
    Manifest(splits=done, window=window, row_bytes=bytes_per_row, encrypted=keys is not None, class_rows=class_rows).write(folder)


def _check_rows(table: pa.Table, schema: Schema, seed: int) -> pa.Table:
    """Features as float32, the target as class index or value, and each row's hash."""
    features, target = arrays(table, schema), labels(table, schema)
    out = {name: tensor_column(values) for name, values in features.items()}
    return pa.table({**out, TARGET: target, HASH: shards.row_hashes(features, target, seed)})


def _summarise(table: pa.Table, schema: Schema, first_train: int) -> tuple[np.ndarray, np.ndarray, dict[str, Moments]]:
    """A block's hashes and targets (16 bytes a row on the driver), and the moments of its training rows."""
    hashes = to_numpy(table.column(HASH))
    train = hashes >= first_train
    found = moments({f.name: to_numpy(table.column(f.name))[train] for f in schema.features}) if train.any() else {}
    return hashes, to_numpy(table.column(TARGET)), found


def _shard_of_rows(hashes: np.ndarray, lengths: list[int]) -> np.ndarray:
    """For each row the number of the shard that its place among the sorted hashes lies in."""
    numbers = np.empty(len(hashes), np.int32)
    numbers[np.argsort(hashes, kind="stable")] = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return numbers


def _cut(table: pa.Table, numbers: np.ndarray, count: int) -> list[pa.Table]:
    """A block's rows by shard."""
    return [table.filter(numbers == number) for number in range(count)]


def _plan(hashes: np.ndarray, data: Data, where: str) -> list[tuple[SplitName, str, int]]:
    """The shards, in the order of the hashes: split, file, length. Raises DataError for a split without rows."""
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
    table = pa.concat_tables(tables).sort_by(HASH)
    features = {f.name: to_numpy(table.column(f.name)) for f in schema.features}
    if split != "test":
        features = preprocessing.apply(features, schema)
    return shards.write_shard(file, {**features, TARGET: to_numpy(table.column(TARGET))}, window, keys)


def check_steps(data: Data, schema: Schema) -> None:
    names = [f.name for f in schema.features]
    for i, step in enumerate(data.preprocess):
        for column in step.columns or []:
            if column not in names:
                raise DataError(f"data.preprocess[{i}].columns: `{column}` is not a feature: they are {', '.join(names[:12])}")


def _class_rows(train: np.ndarray, schema: Schema, where: str) -> list[int]:
    """Training rows of each class. Raises DataError for a class without one, which can never be learnt."""
    found = [int((train == i).sum()) for i in range(len(schema.classes))]
    missing = [str(name) for name, rows in zip(schema.classes, found, strict=True) if not rows]
    if missing:
        raise DataError(
            f"{where}: no training row of class {', '.join(missing[:5])}: more rows of it are needed, or another seed"
        )
    return found
