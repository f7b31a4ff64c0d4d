"""Prepare: from a source to encrypted shards, on Ray Data, with memory that does not grow with the rows.

    1. sort     each piece of the source: read, check, hash, and write aside in the order of the hashes (`rows/`)
    2. fit      the preprocessing, from statistics that came with the sorting, or one more pass where they do not suffice
    3. write    each shard: its range of hashes from all sorted pieces, preprocessed

Sorted pieces are cut at the same hashes everywhere (*buckets*), so a shard reads what it needs and no more; what it holds at
a time is a bucket. Neither the order nor the layout of the source's files changes a shard.

A piece and a shard are each there as a whole, with a record beside them, or not at all: a killed job goes on with the missing
ones. Everything aside is encrypted like the shards, and goes when the manifest is written.

The training and validation shards hold the model's inputs, so an epoch reads them and does nothing else; the test shards
hold raw features, so evaluation goes through the same preprocessing that a request will.
"""

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from ..cluster.keys import KeyStore
from ..cluster.storage import read_json, write_bytes, write_json
from ..datasets import schema as schemas
from ..datasets import shards, spill
from ..datasets.preprocess import (
    SAMPLE_ROWS,
    Preprocessing,
    Statistics,
    check_steps,
    decode,
    finite,
    fit,
    merged,
    optional,
    statistics,
)
from ..datasets.profile import profile
from ..datasets.schema import Bad, Columns, Feature, Labels, Schema
from ..datasets.shards import TARGET, WEIGHT, Manifest, Shard, SplitName
from ..datasets.sources import Chunk, FunctionSource, Piece, PieceSource, Source, open_source
from ..errors import DataError
from ..project import Data

HASH = "heliograph-hash"
BUCKET_BYTES = 32 << 20
"""Of the rows of a bucket, over all pieces, about: what a writer holds at a time."""
MOST_TASKS = 32
"""Of one pass over pieces or shards."""
CACHED_ROWS = 8192
"""Rows that are preprocessed at a time, so that their columns stay in a core's cache."""
SHOWN = 10
KEPT_REASONS = 10_000
"""Bad rows of a piece that are written down; all are counted."""


@dataclass(frozen=True)
class Plan:
    """What all tasks must know; keys go by reference."""

    data: Data
    source: Source
    features: tuple[Feature, ...]
    numbers: tuple[bool, ...]
    """Whether each target is numbers."""
    edges: np.ndarray
    """Of the buckets: the first hash of each, and the end."""
    folder: Path
    keys: KeyStore | None

    @property
    def rows(self) -> Path:
        return self.folder / "rows"

    @property
    def columns(self) -> list[str]:
        """Of the source, each once."""
        more = filter(None, (*self.data.targets, self.data.weight))
        return list(dict.fromkeys([*(f.name for f in self.features), *more]))

    @property
    def targets(self) -> list[tuple[str, Data, bool]]:
        """The name of each target's column here, the data with that target alone, and whether it is numbers."""
        names = shards.target_columns(len(self.numbers))
        return list(zip(names, self.data.of_targets, self.numbers, strict=True))

    @property
    def first_train(self) -> int:
        return shards.first_train_hash(self.data.split)


class SortedTarget(BaseModel):
    labels: list[str | float] = []
    whole: bool = True
    classes: dict[str, int] = {}
    """Training rows of each label."""
    lacking: int = 0
    """Training rows without it."""
    known: Statistics | None = None
    """Of a number, over the training rows."""


class Sorted(BaseModel):
    """The record of one sorted piece."""

    index: spill.Index
    buckets: list[int]
    """Rows of each."""
    raw: dict[str, Statistics]
    """Of its training rows."""
    empty: dict[str, int]
    """Empty cells, over all its rows."""
    targets: list["SortedTarget"]
    unlabelled: int
    """Rows without a target, all of which are training rows."""
    bad: int
    reasons: list[tuple[str, str, str]]
    """(row, column, reason) of the bad ones."""

    @property
    def count(self) -> int:
        return sum(self.buckets)


def prepare(data: Data, base: Path, keys: KeyStore | None, folder: Path, update: Callable[..., None]) -> None:
    """Fill `folder` with shards, `manifest.json`, `schema.json`, `preprocess.json`, `profile.json`, `quarantine.jsonl`.

    base: what relative paths start from. keys: seals the shards (None: in clear). Raises DataError.
    """
    update("reading the schema")
    source = open_source(data, base)
    _, features, numbers = look(source, data)
    check_steps(data, features, base)
    plan = _planned(data, source, optional(data, features), numbers, folder, keys)
    plan.rows.mkdir(exist_ok=True)

    pieces = _sort(plan, update)
    _quarantine(pieces, data, source.where, folder)
    of_target = [[piece.targets[i] for piece in pieces if piece.targets] for i in range(len(plan.targets))]
    classes = []
    for (_, view, _), found in zip(plan.targets, of_target, strict=True):
        labels = Labels({v for p in found for v in p.labels}, all(p.whole for p in found))
        classes.append(labels.classes(view, source.where))
    counts = np.sum([p.buckets for p in pieces], axis=0)
    layout = _layout(counts, plan, source.where)
    class_rows = [_class_rows(found, labels, source.where) for found, labels in zip(of_target, classes, strict=True)]

    update("fitting the preprocessing")
    features = _narrowed(plan, pieces)
    raw = merged(p.raw for p in pieces)
    gather = functools.partial(_gather, plan, pieces, int(counts[_first_bucket(plan) :].sum()))
    preprocessing = fit(data, features, raw, gather, base)
    one = preprocessing.apply(next(iter(_read_buckets(plan, pieces, np.flatnonzero(counts)[:1])))[1])
    scales = [functools.reduce(Statistics.merge, (p.known for p in found if p.known), Statistics(rows=0, missing=0))
              for found in of_target]  # fmt: skip
    schema = _schema(data, list(zip(classes, scales, strict=True)), features, preprocessing, one)
    row_bytes = sum(values.nbytes // len(values) for values in one.values()) + 12
    window = shards.window_rows(row_bytes, max(rows for *_, rows in layout))

    write = functools.partial(_write, plan, pieces, counts, schema, preprocessing, window)
    done: dict[str, list[Shard]] = {split: [] for split in get_args(SplitName)}
    found = across(write, layout, update, f"writing shards, {int(counts.sum()):,} rows")
    for (split, *_), record in zip(layout, found, strict=True):
        done[split].append(Shard.model_validate(record))

    update("profiling")
    sample = _sample(plan, pieces, int(counts.sum()))
    described = profile(
        sample, schema, raw, {p: sum(s.rows for s in found) for p, found in done.items()}, shards.split_ranges(data.split)
    )
    described = described.model_copy(update={"bad_rows": sum(p.bad for p in pieces)})
    write_bytes(folder / "profile.json", described.model_dump_json(indent=1).encode())
    write_bytes(folder / "schema.json", schema.model_dump_json(indent=1).encode())
    write_bytes(folder / "preprocess.json", preprocessing.model_dump_json(indent=1).encode())
    manifest = Manifest(
        splits=done, window=window, row_bytes=row_bytes, encrypted=keys is not None,
        class_rows=[] if data.several else class_rows[0], unlabelled=sum(p.unlabelled for p in pieces),
        lacking=[sum(p.lacking for p in found) for found in of_target] if data.several else [],
    )  # fmt: skip
    manifest.write(folder)
    shutil.rmtree(plan.rows)
    for record in folder.glob("*.done"):
        record.unlink()


def look(source: Source, data: Data) -> tuple[pa.Table, tuple[Feature, ...], tuple[bool, ...]]:
    """The first rows of a source, what they hold, and whether each target is numbers. Raises DataError."""
    head = source.head()
    features = schemas.infer(head, data, source.where)
    try:
        numbers = tuple(schemas.number_target(head.column(view.one), view) for view in data.of_targets)
        return head, features, numbers
    except DataError as error:
        raise DataError(f"{source.where}: {error}") from None


def sniff(data: Data, base: Path) -> tuple[Schema, Preprocessing]:
    """What a project's data would become, by its first rows (the target by all of them). Raises DataError."""
    source = open_source(data, base)
    head, features, numbers = look(source, data)
    check_steps(data, features, base)
    bad = Bad(len(head))
    found: list[tuple[tuple[str | int, ...], Statistics | None]] = []
    for view, number in zip(data.of_targets, numbers, strict=True):
        name, labels = view.one, Labels()
        if isinstance(source, FunctionSource):
            labels.add(schemas.targets(head.column(name), view, number, bad))
        else:
            for piece in source.pieces():
                for chunk in source.read(piece, [name]):
                    if len(chunk.table):
                        labels.add(schemas.targets(chunk.table.column(0), view, number, Bad(len(chunk.table))))
        seen = schemas.targets(head.column(name), view, number, Bad(len(head)))
        found.append((labels.classes(view, source.where), statistics(seen) if isinstance(seen, np.ndarray) else None))
    columns = schemas.typed(head, optional(data, features), bad)
    good = _taken(columns, np.flatnonzero(~bad.mask))
    if bad.mask.all():
        column, reason = bad.reasons[0]
        raise DataError(f"{source.where}: column `{column}`: {reason} in each of the first {len(head)} rows")
    features = _settled(data, features, {n: statistics(v).missing for n, v in good.items()})
    raw = {name: statistics(values) for name, values in good.items()}

    def gather(so_far: Preprocessing, needs: dict[str, str]) -> dict[str, Any]:
        made = so_far.run(good)
        return {n: finite(made[n]) if need == "sample" else statistics(made[n], need) for n, need in needs.items()}

    preprocessing = fit(data, features, raw, gather, base)
    return _schema(data, found, features, preprocessing, preprocessing.apply(_taken(good, np.arange(1)))), preprocessing


def _schema(
    data: Data, targets: list[tuple[tuple[str | int, ...], Statistics | None]], features: tuple[Feature, ...],
    preprocessing: Preprocessing, inputs: dict[str, np.ndarray],
) -> Schema:  # fmt: skip
    """targets: the classes of each, or what its numbers are like. inputs: of a row or more."""
    tasks = tuple(
        schemas.Task(name=name, classes=labels, scale=_scale(known) if not labels else (0.0, 1.0))
        for name, (labels, known) in zip(data.targets, targets, strict=True)
    )
    return Schema(
        task="several" if data.several else "classification" if tasks[0].classes else "regression",
        target=", ".join(data.targets),
        classes=() if data.several else tasks[0].classes,
        scale=(0.0, 1.0) if data.several else tasks[0].scale,
        tasks=tasks if data.several else (),
        features=features,
        inputs={name: tuple(values.shape[1:]) for name, values in inputs.items()},
        ids=tuple(name for name, values in inputs.items() if values.dtype == np.int32),
        vocabulary={
            name: count for name, (part, *_) in preprocessing.inputs.items() if (count := preprocessing.vocabulary(part))
        },
    )


def _scale(known: Statistics | None) -> tuple[float, float]:
    if not (known and known.moments):
        return 0.0, 1.0
    return known.moments.mean, known.moments.deviation or 1.0


def across(work: Callable[[Any], Any], items: list[Any], update: Callable[..., None], text: str) -> list[Any]:
    """`work` of every item, by tasks of Ray Data's on whatever machines have room; results are JSON, in order."""
    import ray.data

    def run(batch: Any) -> Any:
        for i in batch["id"]:
            yield {"id": [int(i)], "found": [json.dumps(work(items[int(i)]))]}

    update(text, 0, len(items))
    found: list[Any] = [None] * len(items)
    # Blocks that are there already: an operator that made them would hold half of the CPUs that Ray Data gives out.
    # Several items a task, one after the other, since a task costs a tenth of a second.
    tasks = min(len(items), MOST_TASKS)
    numbers = ray.data.from_items([{"id": i} for i in range(len(items))], override_num_blocks=tasks)
    for done, row in enumerate(numbers.map_batches(run, batch_size=None).iter_rows(), 1):
        found[row["id"]] = json.loads(row["found"])
        update(text, done, len(items))
    return found


# --- 1. sort ---------------------------------------------------------------------------------------------------------------


def _planned(
    data: Data, source: Source, features: tuple[Feature, ...], numbers: tuple[bool, ...], folder: Path, keys: KeyStore | None
) -> Plan:
    """How many buckets there are does not decide what comes out, only how much a task holds at a time."""
    size = sum(s[1] for s in source.identity() if isinstance(s, list) and len(s) > 2)
    count = max(1, min(4096, 2 * size // BUCKET_BYTES))
    edges = {int(i * 2**63 / count) for i in range(count)}
    edges |= {first for *_, first, _ in shards.split_ranges(data.split)}
    return Plan(data, source, features, numbers, np.array([*sorted(edges), 2**63 - 1], np.int64), folder, keys)


def _sort(plan: Plan, update: Callable[..., None]) -> list[Sorted]:
    if isinstance(plan.source, FunctionSource):
        rows = plan.source.dataset().select_columns(plan.columns)
        work = functools.partial(_sort_block, plan)
        found = rows.map_batches(work, batch_size=None, batch_format="pyarrow").take_all()
        records = [json.loads(row["found"]) for row in found]
        return [Sorted.model_validate(r) for r in sorted(records, key=lambda r: r["index"]["file"])]
    pieces = list(enumerate(plan.source.pieces()))
    found = across(functools.partial(_sort_piece, plan), pieces, update, "reading rows")
    return [Sorted.model_validate(record) for records in found for record in records]


def _sort_block(plan: Plan, table: pa.Table) -> dict[str, Any]:
    """A block of a Ray Dataset, which has no place in a file: it is named by what is in it."""
    return {"found": [json.dumps(_sorted(plan, Chunk(table, plan.source.where), None).model_dump())]}


def _sort_piece(plan: Plan, item: tuple[int, Piece]) -> list[dict[str, Any]]:
    number, piece = item
    record = plan.rows / f"{number:06d}.json"
    if not record.exists():
        assert isinstance(plan.source, PieceSource)
        chunks = enumerate(plan.source.read(piece, plan.columns))
        write_json(record, [_sorted(plan, chunk, f"{number:06d}-{i:04d}").model_dump() for i, chunk in chunks])
    return read_json(record)


def _sorted(plan: Plan, chunk: Chunk, file: str | None) -> Sorted:
    """Check and type a chunk's rows, and write them aside in the order of their hashes, by bucket."""
    weights = plan.data.weight
    reasons = [(s.row, s.column, s.reason) for s in chunk.skipped]
    columns: Columns = {}
    table, bad = chunk.table, Bad(len(chunk.table))
    if len(table):
        found = {name: schemas.targets(table.column(view.one), view, number, bad) for name, view, number in plan.targets}
        if plan.data.several:
            none = np.all([schemas.without_target(values) for values in found.values()], axis=0)
            bad.add(none, ", ".join(plan.data.targets), "all empty")
        columns = schemas.typed(table, plan.features, bad) | found
        if weights:
            columns[WEIGHT] = schemas.typed(table, (Feature(name=weights),), bad)[weights]
            bad.add(columns[WEIGHT] < 0, weights, "a weight below 0")
        _check_images(columns, plan, bad)
        if bad.mask.any():
            columns = _taken(columns, np.flatnonzero(~bad.mask))
    bad_rows = len(reasons) + len(bad.reasons)
    reasons += [(chunk.name(row), *reason) for row, reason in sorted(bad.reasons.items())[:KEPT_REASONS]]
    counts, raw, empty, unlabelled, targets = [0] * (len(plan.edges) - 1), {}, {}, 0, []
    index = spill.Index(file="", ends=[])
    (first, *_), *others = plan.targets
    if columns and len(columns[first]):
        features = {name: columns[name] for name in (*(f.name for f in plan.features), *(name for name, *_ in others))}
        hashes = shards.row_hashes(features, columns[first], plan.data.split.seed)
        if plan.data.unlabelled:
            none = schemas.without_target(columns[first])
            unlabelled = int(none.sum())
            hashes = np.where(none, plan.first_train + hashes % (2**63 - plan.first_train), hashes)
        order = np.argsort(hashes, kind="stable")
        hashes, columns = hashes[order], _taken(columns, order)
        cuts = np.searchsorted(hashes, plan.edges[:-1])
        counts = np.diff([*cuts, len(hashes)]).tolist()
        ends = [*cuts[1:].tolist(), len(hashes)]
        train = slice(int(np.searchsorted(hashes, plan.first_train)), None)
        file = file or f"{hashes[0]:016x}-{int(hashes.sum()) & (2**63 - 1):016x}"
        rows = {**columns, HASH: hashes}
        buckets = ({n: v[a:b] for n, v in rows.items()} if b > a else None for a, b in zip(cuts.tolist(), ends, strict=True))
        index = spill.write(plan.rows / file, buckets, plan.keys)
        for feature in plan.features:
            values = columns[feature.name]
            empty[feature.name] = _missing(values)
            if len(hashes[train]):
                raw[feature.name] = statistics(values[train])
        targets = [_sorted_target(columns[name], train) for name, *_ in plan.targets]
    return Sorted(
        index=index,
        buckets=counts,
        raw=raw,
        empty=empty,
        targets=targets,
        unlabelled=unlabelled,
        bad=bad_rows,
        reasons=reasons,
    )


def _sorted_target(values: schemas.Column, train: slice) -> SortedTarget:
    """train: which of its rows are training rows."""
    labels = Labels()
    labels.add(values)
    given = np.flatnonzero(~schemas.without_target(values)[train]) + train.start
    classes: dict[str, int] = {}
    if len(labels.values) <= Labels.MOST:
        found = schemas.arrow_column(_some(values, given)).value_counts()
        classes = dict(zip(map(str, found.field(0).to_pylist()), found.field(1).to_pylist(), strict=True))
    lacking = len(values) - train.start - len(given)
    known = statistics(values[given]) if isinstance(values, np.ndarray) else None
    return SortedTarget(labels=list(labels.values), whole=labels.whole, classes=classes, lacking=lacking, known=known)


def _check_images(columns: Columns, plan: Plan, bad: Bad) -> None:
    """An image that cannot be decoded is found here, before any row has its place."""
    for feature in plan.features:
        if feature.kind == "image":
            broken = np.zeros(len(bad.mask), bool)
            for i, content in enumerate(columns[feature.name]):
                if content.is_valid and not bad.mask[i]:
                    try:
                        decode(memoryview(content.as_buffer()), 8, 8, 3, "stretch")
                    except Exception:
                        broken[i] = True
            bad.add(broken, feature.name, "not an image that can be decoded")


def _missing(values: schemas.Column) -> int:
    if isinstance(values, np.ndarray):
        return int(np.isnan(values).sum()) if values.ndim == 1 else 0
    return values.null_count


def _some(values: schemas.Column, rows: np.ndarray) -> schemas.Column:
    return values[rows] if isinstance(values, np.ndarray) else values.take(pa.array(rows))


def _taken(columns: Columns, rows: np.ndarray) -> Columns:
    return {name: _some(values, rows) for name, values in columns.items()}


def _joined(parts: list[schemas.Column]) -> Any:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else pa.concat_arrays(parts)


def _quarantine(pieces: list[Sorted], data: Data, where: str, folder: Path) -> None:
    """Write the bad rows down. Raises DataError with the first of them when they are too many."""
    bad, rows = sum(p.bad for p in pieces), sum(p.count for p in pieces)
    reasons = [reason for p in pieces for reason in p.reasons]
    lines = [json.dumps(dict(zip(("row", "column", "reason"), reason, strict=True))) for reason in reasons]
    write_bytes(folder / "quarantine.jsonl", "".join(line + "\n" for line in lines).encode())
    if not rows and not bad:
        raise DataError(f"{where}: has no rows")
    if bad > data.max_bad_rows * (bad + rows):
        shown = "; ".join(f"{row}: {f'`{column}` ' if column else ''}{reason}" for row, column, reason in reasons[:SHOWN])
        more = f"; and {bad - SHOWN:,} more" if bad > SHOWN else ""
        raise DataError(
            f"{where}: {bad:,} of {bad + rows:,} rows cannot be used (data.max_bad_rows allows {data.max_bad_rows:.3g}): "
            f"{shown}{more}: mend them, fill empty cells with a step `impute`, or allow more"
        )


def _layout(counts: np.ndarray, plan: Plan, where: str) -> list[tuple[SplitName, str, int, int]]:
    """The shards in the order of the hashes: split, file, the first row's rank among all, rows. Raises DataError."""
    out: list[tuple[SplitName, str, int, int]] = []
    ends = np.concatenate([[0], np.cumsum(counts)])
    for split, share, first, end in shards.split_ranges(plan.data.split):
        low, high = (int(ends[np.searchsorted(plan.edges, min(edge, 2**63 - 1))]) for edge in (first, end))
        if share and low == high:
            total = int(ends[-1])
            raise DataError(f"{where}: the {split} split is empty: {share:.3g} of {total} rows; give it a larger share")
        for i, length in enumerate(shards.shard_lengths(high - low, plan.data.shards)):
            if length:
                out.append((split, f"{split}-{i:05d}.parquet", low, length))
                low += length
    return out


def _class_rows(pieces: list[SortedTarget], classes: tuple[str | int, ...], where: str) -> list[int]:
    """Training rows of each class. Raises DataError for a class without one, which can never be learnt."""
    total: dict[str, int] = {}
    for piece in pieces:
        for label, rows in piece.classes.items():
            total[label] = total.get(label, 0) + rows
    found = [total.get(str(c) if isinstance(c, str) else str(float(c)), 0) for c in classes]
    missing = [str(name) for name, rows in zip(classes, found, strict=True) if not rows]
    if missing:
        raise DataError(
            f"{where}: no training row of class {', '.join(missing[:5])}: more rows of it are needed, or another seed"
        )
    return found


# --- 2. fit ----------------------------------------------------------------------------------------------------------------


def _settled(data: Data, features: tuple[Feature, ...], empty: dict[str, int]) -> tuple[Feature, ...]:
    """Which features a request may leave empty: where no step says it, those that the source leaves empty."""
    if data.preprocess is not None:
        return optional(data, features)
    return tuple(f.model_copy(update={"optional": bool(empty[f.name])}) for f in features)


def _narrowed(plan: Plan, pieces: list[Sorted]) -> tuple[Feature, ...]:
    empty = {f.name: sum(p.empty.get(f.name, 0) for p in pieces) for f in plan.features}
    return _settled(plan.data, plan.features, empty)


def _first_bucket(plan: Plan) -> int:
    return int(np.searchsorted(plan.edges, plan.first_train))


def _gather(plan: Plan, pieces: list[Sorted], rows: int, so_far: Preprocessing, needs: dict[str, str]) -> dict[str, Any]:
    """One pass over the training rows: statistics of some columns as the steps so far leave them."""
    found: dict[str, Any] = {}
    if exact := {n: need for n, need in needs.items() if need != "sample"}:
        work = functools.partial(_statistics, plan, so_far, exact)
        parts = across(work, [p for p in pieces if p.count], lambda *_: None, "")
        found |= merged({n: Statistics.model_validate(s) for n, s in part.items()} for part in parts)
    if drawn := [n for n, need in needs.items() if need == "sample"]:
        # Hashes are uniform: the rows below one of them are a sample, the same however the source lies.
        share = min(1.0, SAMPLE_ROWS / max(1, rows))
        end = plan.first_train + int(share * (2**63 - 1 - plan.first_train))
        columns = [columns for _, columns in _read_up_to(plan, pieces, _sources_of(plan, so_far, drawn), plan.first_train, end)]
        made = [so_far.run(c) for c in columns]
        found |= {n: np.concatenate([finite(m[n]) for m in made]) if made else np.empty(0) for n in drawn}
    return found


def _statistics(plan: Plan, so_far: Preprocessing, needs: dict[str, str], piece: Sorted) -> dict[str, Any]:
    names = _sources_of(plan, so_far, list(needs))
    parts = []
    for _, columns in _read_piece(plan, piece, range(_first_bucket(plan), len(piece.buckets)), names):
        made = so_far.run(columns)
        parts.append({n: statistics(made[n], need) for n, need in needs.items()})
    return {n: s.model_dump() for n, s in merged(parts).items()}


def _sources_of(plan: Plan, so_far: Preprocessing, names: list[str]) -> list[str]:
    """The features that these columns are made of."""
    wanted = set(names)
    for step in reversed(so_far.steps):
        if step.step == "function" and step.settings["name"] in wanted:
            wanted |= set(step.columns)
    return [f.name for f in plan.features if f.name in wanted]


def _read_piece(plan: Plan, piece: Sorted, buckets: Any, names: list[str] | None) -> Iterator[tuple[np.ndarray, Columns]]:
    """(hashes, columns) of some buckets of a sorted piece, one bucket at a time."""
    if piece.count:
        for table in spill.read(plan.rows, piece.index, buckets, plan.keys):
            kept = table if names is None else table.select(names)
            yield schemas.to_numpy(table.column(HASH)), _columns(plan, kept)


def _columns(plan: Plan, table: pa.Table) -> Columns:
    kinds: dict[str, Any] = {f.name: f.kind for f in plan.features} | {
        WEIGHT: "number",
        **{name: "number" if number else "text" for name, _, number in plan.targets},
    }
    return {n: schemas.column_of(table.column(n), kinds[n]) for n in table.column_names if n != HASH}


def _read_up_to(
    plan: Plan, pieces: list[Sorted], names: list[str] | None, first: int, end: int
) -> Iterator[tuple[np.ndarray, Columns]]:
    """The rows whose hash lies in a range, a bucket of a piece at a time."""
    low, high = int(np.searchsorted(plan.edges, first, "right")) - 1, int(np.searchsorted(plan.edges, end))
    for piece in pieces:
        for hashes, columns in _read_piece(plan, piece, range(low, min(high, len(piece.buckets))), names):
            rows = np.flatnonzero((hashes >= first) & (hashes < end))
            if len(rows):
                yield hashes[rows], _taken(columns, rows)


# --- 3. write --------------------------------------------------------------------------------------------------------------


def _read_buckets(plan: Plan, pieces: list[Sorted], buckets: Any) -> Iterator[tuple[int, Columns]]:
    """(bucket, its columns over all pieces in the order of the hashes), one at a time."""
    for bucket in buckets:
        found = [part for piece in pieces for part in _read_piece(plan, piece, [bucket], None)]
        if found:
            order = np.argsort(np.concatenate([h for h, _ in found]), kind="stable")
            yield bucket, {n: _some(_joined([c[n] for _, c in found]), order) for n in found[0][1]}


def _write(
    plan: Plan, pieces: list[Sorted], counts: np.ndarray, schema: Schema, preprocessing: Preprocessing, window: int, item: Any
) -> dict[str, Any]:
    """One shard, unless it is there already; its record."""
    split, name, first, rows = item
    record = plan.folder / f"{name}.done"
    if record.exists():
        return read_json(record)
    ends = np.cumsum(counts)
    low, high = int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, first + rows))
    with shards.Writer(plan.folder / name, window, plan.keys) as writer:
        for bucket, columns in _read_buckets(plan, pieces, range(low, high + 1)):
            start = int(ends[bucket] - counts[bucket])
            own = range(max(0, first - start), min(int(counts[bucket]), first + rows - start))
            for at in range(own.start, own.stop, CACHED_ROWS):
                mine = {n: v[at : min(at + CACHED_ROWS, own.stop)] for n, v in columns.items()}
                target = _written_target(plan, mine, schema)
                weight = {WEIGHT: mine.pop(WEIGHT).astype(np.float32)} if WEIGHT in mine else {}
                made = mine if split == "test" else preprocessing.apply(mine)
                writer.write({**made, TARGET: target, **weight})
        shard = writer.close()
    write_json(record, shard.model_dump())
    return shard.model_dump()


def _written_target(plan: Plan, columns: Columns, schema: Schema) -> np.ndarray:
    """Of several `[rows, targets]` float32, classes by their index, NaN where there is none; takes them out of the columns."""
    found = [schemas.class_index(columns.pop(name), of) for (name, *_), (of, _) in zip(plan.targets, schema.parts, strict=True)]
    if not schema.tasks:
        return found[0]
    return np.stack([np.where(v < 0, np.nan, v) if v.dtype == np.int64 else v for v in found], axis=1).astype(np.float32)


def _sample(plan: Plan, pieces: list[Sorted], rows: int) -> Any:
    """Some rows of every split for the profile: (hashes, columns with the target)."""
    share = min(1.0, 20_000 / max(1, rows))
    found = []
    for _, _, first, end in shards.split_ranges(plan.data.split):
        if end > first:
            found += list(_read_up_to(plan, pieces, None, first, first + int(share * (min(end, 2**63 - 1) - first)) + 1))
    if not found:
        return np.empty(0, np.int64), {}
    return np.concatenate([h for h, _ in found]), {n: _joined([c[n] for _, c in found]) for n in found[0][1]}
