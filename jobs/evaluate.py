"""Evaluate: how good the model is on rows that nothing was fitted on.

Ray Data reads the raw test shards and runs the engine on them, so the figures are of the preprocessing and the model that
answer requests. Each task sums up its shards, and the sums are merged (`figures.py`); of all rows, or of a random part where
there are very many, outputs are kept for intervals and for the search of parts that the model does badly on.
"""

import functools
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..cluster.keys import KeyStore
from ..cluster.storage import write_json
from ..datasets import shards
from ..datasets.ingest import Part
from ..datasets.schema import Columns, Schema, arrow_column, to_numpy
from ..datasets.shards import TARGET, Manifest, SplitName
from ..errors import DataError
from ..project import FILE
from ..trust import ACROSS, Costs, Evaluate
from . import figures as states_of
from .engine import Engine
from .export import sample
from .figures import MOST_KEPT, RANGE, State, figures, intervals, merged
from .slices import MOST_VALUES, Slice, comparable, parsed, worst

MOST_MEMBERS = 5000
"""Rows that a membership inference is tried on."""
METRICS = "metrics.json"


@dataclass(frozen=True)
class Sources:
    """Where rows and model are. keys: opens the shards, if they are encrypted; sealing: the model, if it is sealed."""

    prepared: Path
    trained: Path
    keys: KeyStore | None
    sealing: KeyStore

    def engine(self) -> Engine:
        return Engine(self.trained, self.prepared, threads=1, keys=self.sealing)


@dataclass
class Found:
    """What a task found in its shards. kept: target, outputs and the columns that can be compared, of a part of the rows."""

    rows: int
    every: list[State | None]
    slices: dict[str, tuple[int, list[State | None]]] = field(default_factory=dict)
    target: np.ndarray = field(default_factory=lambda: np.empty(0))
    outputs: np.ndarray = field(default_factory=lambda: np.empty(0))
    columns: pa.Table | None = None

    def merge(self, other: "Found") -> "Found":
        slices = dict(self.slices)
        for name, (rows, found) in other.slices.items():
            slices[name] = (slices[name][0] + rows, merged(slices[name][1], found)) if name in slices else (rows, found)
        assert self.columns is not None and other.columns is not None
        return Found(
            self.rows + other.rows, merged(self.every, other.every), slices, np.concatenate([self.target, other.target]),
            np.concatenate([self.outputs, other.outputs]), pa.concat_tables([self.columns, other.columns]),
        )  # fmt: skip


def evaluate(sources: Sources, settings: Evaluate, folder: Path, update: Callable[..., None]) -> None:
    """Write `metrics.json`: figures (`figures.Classified` and `Regressed`), `intervals`, `slices`, `worst`, `membership`.

    Raises DataError for a slice of columns that are not there, and for one that no row is in."""
    schema, manifest = Schema.read(sources.prepared), Manifest.read(sources.prepared)
    cuts = parsed(settings.slices, schema, "evaluate.slices")
    costs_of(settings.costs, schema)
    update("predicting the test split")
    runs = folder / ".runs"
    runs.mkdir(exist_ok=True)
    found = _over_shards(sources, cuts, runs if manifest.rows("test") > RANGE else None)
    update("computing metrics")
    said = states_of.written(found.every, schema, found.rows)
    for (alone, of), of_target in zip(schema.parts, said.get("tasks", {"": said}).values(), strict=True):
        target, outputs, has = _of_part(found, schema, alone, of)
        if settings.resamples and has.any():
            of_target["intervals"] = intervals(
                of_target, target, outputs, alone, found.rows, settings.resamples, settings.confidence
            )
            of_target["confidence"] = settings.confidence
    said["slices"] = _sliced(found, cuts, schema)
    if settings.worst and not schema.tasks:
        said["worst"] = _worst(found, schema, settings.worst)
    if all(task.classes for task in schema.tasks) and schema.tasks:
        said |= _together(found, schema)
    if settings.costs or not schema.tasks:
        update("asking the model about training rows")
        said |= _beside(sources, settings, schema, found)
    write_json(folder / METRICS, said)
    shutil.rmtree(runs)


def _over_shards(sources: Sources, cuts: list[Slice], runs: Path | None) -> Found:
    import ray.data

    manifest = Manifest.read(sources.prepared)
    files = [sources.prepared / s.file for s in manifest.splits["test"]]
    share = min(1.0, MOST_KEPT / max(1, manifest.rows("test")))
    look: Any = functools.partial(_look, files=files, sources=sources, cuts=cuts, share=share, runs=runs)
    numbers = ray.data.range(len(files), override_num_blocks=min(len(files), 8))
    done = numbers.map_batches(look, batch_format="numpy", batch_size=None)
    every = [pickle.loads(b) for batch in done.iter_batches(batch_size=None, batch_format="numpy") for b in batch["found"]]  # noqa: S301  ours
    return functools.reduce(Found.merge, every)


@functools.lru_cache(maxsize=1)
def _engine(trained: Path, prepared: Path, sealing: Path) -> Engine:
    return Engine(trained, prepared, threads=1, keys=KeyStore(sealing))


def _look(
    batch: dict[str, Any], files: list[Path], sources: Sources, cuts: list[Slice], share: float, runs: Path | None
) -> dict[str, Any]:
    engine = _engine(sources.trained, sources.prepared, sources.sealing.folder)
    out = []
    for number in map(int, batch["id"]):
        (table, target, outputs) = next(_of_files(engine, [files[number]], sources.keys))
        out.append(pickle.dumps(_summed(table, target, outputs, engine.schema, cuts, share, number, runs)))
    return {"found": np.array(out, dtype=object)}


def _summed(
    table: pa.Table, target: np.ndarray, outputs: np.ndarray, schema: Schema, cuts: list[Slice], share: float, number: int,
    runs: Path | None,
) -> Found:  # fmt: skip
    every = states_of.states(target, outputs, schema)
    columns = schema.columns(table)
    parts = {}
    for name, mask in (part for cut in cuts for part in cut.masks(columns)):
        if mask.any():
            parts[name] = (int(mask.sum()), states_of.states(target[mask], outputs[mask], schema))
    if runs:
        for i, each in enumerate(every):
            if each:
                each.spill(runs, f"{number}-{i}")
    kept = np.random.default_rng([number, 1]).random(len(target)) < share if share < 1 else np.ones(len(target), bool)
    some = pa.table({name: arrow_column(columns[name]) for name in comparable(schema)} or {"": pa.nulls(len(target))})
    return Found(len(target), every, parts, target[kept], outputs[kept], some.filter(pa.array(kept)))


def _of_part(found: Found, schema: Schema, alone: Schema, of: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(targets, outputs, which rows have it) of one target of the kept rows."""
    target = found.target[:, schema.parts.index((alone, of))] if schema.tasks else found.target
    has = np.isfinite(target) & ((target >= 0) if alone.classes else True)
    return target[has].astype(np.int64 if alone.classes else np.float64), found.outputs[has][:, of], has


def _sliced(found: Found, cuts: list[Slice], schema: Schema) -> list[dict[str, Any]]:
    out = []
    for i, cut in enumerate(cuts):
        own = {n: f for n, f in found.slices.items() if n == cut.text or (cut.sign is None and n.startswith(f"{cut.column} == "))}
        if not own:
            raise DataError(
                f"{FILE}: evaluate.slices[{i}]: `{cut.text}` is true of none of the {found.rows:,} test rows: leave it out, or "
                f"look what `{cut.column}` holds in the report"
            )
        if cut.sign is None and len(own) > MOST_VALUES:
            raise DataError(
                f"{FILE}: evaluate.slices[{i}]: `{cut.column}` has {len(own)} values, {MOST_VALUES} at most become slices: "
                f"compare it, such as `{cut.column} > 10`"
            )
        for name, (rows, states) in sorted(own.items()):
            figures_of = states_of.written(states, schema, rows)
            out.append({"slice": name, **{k: figures_of[k] for k in ACROSS if figures_of.get(k) is not None}})
    return out


def _worst(found: Found, schema: Schema, most: int) -> list[dict[str, Any]]:
    target, outputs, has = _of_part(found, schema, *schema.parts[0])
    losses = (outputs.argmax(axis=1) != target).astype(float) if schema.classes else np.square(outputs[:, 0] - target)
    assert found.columns is not None
    columns = {n: found.columns.column(n).filter(pa.array(has)).combine_chunks() for n in comparable(schema)}
    out = []
    for part in worst(columns, losses, most):
        mask = part.pop("mask")
        of_slice = figures(target[mask], outputs[mask], schema)
        out.append({**part, **{k: of_slice[k] for k in ACROSS[1:] if of_slice.get(k) is not None}})
    return out


def _together(found: Found, schema: Schema) -> dict[str, Any]:
    """Several classes at once: rows that are right in all, and the share of answers that are wrong."""
    right = []
    for alone, of in schema.parts:
        target = found.target[:, schema.parts.index((alone, of))]
        right.append(np.where(np.isfinite(target), found.outputs[:, of].argmax(axis=1) == target, True))
    every = np.stack(right)
    return {"all_right": float(every.all(axis=0).mean()), "hamming_loss": float(1 - every.mean())}


def _beside(sources: Sources, settings: Evaluate, schema: Schema, found: Found) -> dict[str, Any]:
    """What needs rows of other splits."""
    manifest, engine = Manifest.read(sources.prepared), sources.engine()
    target, outputs, _ = _of_part(found, schema, *schema.parts[0])
    out: dict[str, Any] = {}

    def some(split: SplitName, rows: int) -> tuple[np.ndarray, np.ndarray]:
        inputs, targets = sample(sources.prepared, sources.keys, split, rows)
        has = targets >= 0 if schema.classes else np.isfinite(targets)
        return targets[has], engine.forward(inputs)[has]

    def losses_of(targets: np.ndarray, answers: np.ndarray) -> np.ndarray:
        if schema.classes:
            return states_of.losses(answers[np.arange(len(targets)), targets])
        return np.square(answers[:, 0] - targets)

    if not schema.tasks:
        inside, outside = losses_of(*some("train", MOST_MEMBERS)), losses_of(target[:MOST_MEMBERS], outputs[:MOST_MEMBERS])
        if len(inside) and len(outside):
            out["membership"] = membership(inside, outside)
    if settings.costs:
        chosen_by: SplitName = "validation" if manifest.rows("validation") else "train"
        out["costs"] = threshold(settings.costs, schema, some(chosen_by, MOST_KEPT), (target, outputs)) | {"chosen_by": chosen_by}
    return out


def membership(inside: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    """How well a row's loss tells whether the model was trained on it (Yeom et al., Privacy risk in machine learning, 2018).
    inside, outside: losses of training rows and of others. `advantage`: the largest difference, over all thresholds, of the share
    of training rows and of others that are taken for training rows; 0 tells nothing, 1 everything. `auc`: 0.5 tells nothing."""
    values = np.concatenate([inside, outside])
    order = np.argsort(values, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)
    of = np.cumsum(order < len(inside))[ends] / len(inside)
    others = np.cumsum(order >= len(inside))[ends] / len(outside)
    area = float(np.trapezoid(np.append(0, of), np.append(0, others)))
    return {"advantage": float(max(0.0, (of - others).max())), "auc": area, "rows": len(inside), "others": len(outside)}


def costs_of(costs: Costs | None, schema: Schema) -> int:
    """The number of the class that costs speak of. Raises DataError."""
    if costs is None:
        return 0
    names = [str(c) for c in schema.classes]
    if len(names) != 2:
        kind = f"{len(names)} classes" if names else "a number to predict"
        raise DataError(f"{FILE}: evaluate.costs: a threshold is for two classes, and there is {kind}")
    if costs.positive not in names:
        raise DataError(f"{FILE}: evaluate.costs.positive: `{costs.positive}` is no class: there are {', '.join(names)}")
    return names.index(costs.positive)


def threshold(
    costs: Costs, schema: Schema, chosen: tuple[np.ndarray, np.ndarray], judged: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    """The probability from which on a row is taken for `costs.positive`: the one that costs least on the rows that choose. Its
    cost a row on the rows that judge, and that of one half."""
    positive = costs_of(costs, schema)

    def cost(rows: tuple[np.ndarray, np.ndarray], at: float) -> float:
        said, true = rows[1][:, positive] >= at, rows[0] == positive
        return float((costs.false_positive * (said & ~true) + costs.false_negative * (~said & true)).mean())

    scores = np.unique(chosen[1][:, positive])
    middles = np.concatenate([[0.0], (scores[1:] + scores[:-1]) / 2, [1.0 + 1e-6]])
    order = np.argsort(chosen[1][:, positive])
    true = (chosen[0] == positive)[order]
    place = np.searchsorted(chosen[1][:, positive][order], middles)
    missed = np.append(0, np.cumsum(true))[place]
    alarms = (~true).sum() - np.append(0, np.cumsum(~true))[place]
    total = costs.false_negative * missed + costs.false_positive * alarms
    # Of all that cost least, the one that is nearest to what perfect probabilities would need (Elkan, 2001).
    ideal = costs.false_positive / max(costs.false_positive + costs.false_negative, 1e-12)
    cheapest = middles[total <= total.min() + 1e-9]
    best = cheapest[np.argmin(np.abs(cheapest - ideal))]
    return {"positive": costs.positive, "threshold": float(best), "cost": cost(judged, best), "cost_at_half": cost(judged, 0.5)}


def judged(engine: Engine, prepared: Path, split: SplitName, keys: KeyStore | None) -> dict[str, Any]:
    """Figures that are one number, of a split, computed in this process; none for one without rows."""
    if not Manifest.read(prepared).rows(split):
        return {}
    found = figures(*predicted(engine, prepared, split, keys), engine.schema)
    return {name: value for name, value in found.items() if not isinstance(value, (list, dict))}


def predicted(engine: Engine, prepared: Path, split: SplitName, keys: KeyStore | None) -> tuple[np.ndarray, np.ndarray]:
    """Targets and outputs of a split that has rows, computed in this process."""
    manifest = Manifest.read(prepared)
    if split == "test":
        found = [(t, o) for _, t, o in _of_files(engine, [prepared / s.file for s in manifest.splits["test"]], keys)]
    else:
        found = list(_of_windows(engine, Part(prepared, manifest, split, keys, 0, 1, 1, None)))
    targets, outputs = zip(*found, strict=True)
    return np.concatenate(targets), np.concatenate(outputs)


def test_rows(sources: Sources, most: int | None) -> tuple[Columns, np.ndarray]:
    """Raw test rows, all or the first ones, and their targets."""
    tables, count = [], 0
    for shard in Manifest.read(sources.prepared).splits["test"]:
        file = sources.prepared / shard.file
        with shards.open_shard(file, sources.keys) as opened:
            tables.append(shards.read_table(opened, file))
        count += shard.rows
        if most and count >= most:
            break
    table = pa.concat_tables(tables).slice(0, most)
    return Schema.read(sources.prepared).columns(table), to_numpy(table.column(TARGET))


def _of_windows(engine: Engine, part: Part) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Targets and outputs of shards that are prepared."""
    for window in range(part.windows):
        columns = part.read_window(window, 1)
        yield columns[TARGET], engine.forward({name: columns[name] for name in engine.schema.inputs})


def _of_files(engine: Engine, files: list[Path], keys: KeyStore | None) -> Iterator[tuple[pa.Table, np.ndarray, np.ndarray]]:
    """Rows, targets and outputs of raw shards."""
    for file in files:
        with shards.open_shard(file, keys) as shard:
            table = shards.read_table(shard, file)
        yield table, to_numpy(table.column(TARGET)), engine.predict(engine.schema.columns(table))
