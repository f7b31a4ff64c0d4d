"""Evaluate: how good the model is on rows that nothing was fitted on.

Ray Data reads the raw test shards and runs the engine on them, so the figures are of the preprocessing and the model that
answer requests; scikit-learn computes them.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster.keys import KeyStore
from ..cluster.storage import write_json
from ..datasets import shards
from ..datasets.ingest import Part
from ..datasets.schema import Schema, to_numpy
from ..datasets.shards import TARGET, Manifest, SplitName
from ..recipes import FIGURES
from .engine import Engine


def evaluate(
    prepared: Path, trained: Path, keys: KeyStore | None, sealing: KeyStore, folder: Path, update: Callable[..., None]
) -> None:
    """Write `metrics.json`: see `classification` and `regression` for what is in it.

    keys: opens the shards, if they are encrypted. sealing: opens the model, if it is sealed."""
    import ray.data

    files = [prepared / s.file for s in Manifest.read(prepared).splits["test"]]
    update("predicting the test split")
    predict: Any = functools.partial(_predict, files=files, prepared=prepared, trained=trained, keys=keys, sealing=sealing)
    numbers = ray.data.range(len(files), override_num_blocks=min(len(files), 8))
    done = numbers.map_batches(predict, batch_format="numpy", batch_size=None)
    found = list(done.iter_batches(batch_size=None, batch_format="numpy"))
    target = np.concatenate([f["target"] for f in found])
    outputs = np.concatenate([f["outputs"] for f in found])
    update("computing metrics")
    schema = Schema.read(prepared)
    write_json(folder / "metrics.json", figures(target, outputs, schema))


def figures(target: np.ndarray, outputs: np.ndarray, schema: Schema) -> dict[str, Any]:
    """Of the schema's task; of several each under its name, of the rows that have it, and means over those that have a figure."""
    if not schema.tasks:
        return classification(target, outputs, schema) if schema.classes else regression(target, outputs)
    tasks = {}
    for i, (alone, of) in enumerate(schema.parts):
        has = np.isfinite(target[:, i])
        kind = np.int64 if alone.classes else np.float32
        tasks[alone.target] = figures(target[has, i].astype(kind), outputs[has, of], alone) if has.any() else {"rows": 0}
    means = {}
    for name in FIGURES:
        every = [found[name] for found in tasks.values() if found.get(name) is not None]
        means |= {name: float(np.mean(every))} if every else {}
    return {"rows": len(target), **means, "tasks": tasks}


def judged(engine: Engine, prepared: Path, split: SplitName, keys: KeyStore | None) -> dict[str, Any]:
    """Figures of a split, computed in this process; none for one without rows."""
    manifest = Manifest.read(prepared)
    if not manifest.rows(split):
        return {}
    if split == "test":
        found = _of_files(engine, [prepared / s.file for s in manifest.splits["test"]], keys)
    else:
        found = _of_windows(engine, Part(prepared, manifest, split, keys, 0, 1, 1, None))
    targets, outputs = zip(*found, strict=True)
    return figures(np.concatenate(targets), np.concatenate(outputs), engine.schema)


def _of_windows(engine: Engine, part: Part) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same of shards that are prepared."""
    for window in range(part.windows):
        columns = part.read_window(window, 1)
        yield columns[TARGET], engine.forward({name: columns[name] for name in engine.schema.inputs})


@functools.lru_cache(maxsize=1)
def _engine(trained: Path, prepared: Path, sealing: Path) -> Engine:
    return Engine(trained, prepared, threads=1, keys=KeyStore(sealing))


def _predict(
    batch: dict[str, Any], files: list[Path], prepared: Path, trained: Path, keys: KeyStore | None, sealing: KeyStore
) -> dict[str, Any]:
    engine = _engine(trained, prepared, sealing.folder)
    targets, outputs = zip(*_of_files(engine, [files[int(number)] for number in batch["id"]], keys), strict=True)
    return {"target": np.concatenate(targets), "outputs": np.concatenate(outputs)}


def _of_files(engine: Engine, files: list[Path], keys: KeyStore | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Targets and outputs of raw shards."""
    for file in files:
        with shards.open_shard(file, keys) as shard:
            table = shards.read_table(shard, file)
        yield to_numpy(table.column(TARGET)), engine.predict(engine.schema.columns(table))


def classification(target: np.ndarray, outputs: np.ndarray, schema: Schema) -> dict[str, Any]:
    """target: class indices `[rows]`; outputs: probabilities `[rows, classes]`.

    ROC-AUC is one class against the rest, averaged over the classes that the rows hold both sides of.
    """
    metrics: Any = importlib.import_module("sklearn.metrics")
    classes = range(len(schema.classes))
    guess = outputs.argmax(axis=1)
    precision, recall, f1, support = metrics.precision_recall_fscore_support(target, guess, labels=list(classes), zero_division=0)
    averages = {
        name: dict(zip(("precision", "recall", "f1"), map(float, metrics.precision_recall_fscore_support(
            target, guess, labels=list(classes), average=name, zero_division=0)[:3]), strict=True))
        for name in ("macro", "weighted")
    }  # fmt: skip
    areas = {
        c: float(metrics.roc_auc_score(target == c, outputs[:, c])) for c in classes if 0 < (target == c).sum() < len(target)
    }
    return {
        "rows": len(target),
        "accuracy": float(metrics.accuracy_score(target, guess)),
        "roc_auc": float(np.mean(list(areas.values()))) if areas else None,
        **averages,
        "classes": [
            {
                "class": schema.classes[c],
                "precision": float(precision[c]),
                "recall": float(recall[c]),
                "f1": float(f1[c]),
                "roc_auc": areas.get(c),
                "rows": int(support[c]),
            }
            for c in classes
        ],
        "confusion": metrics.confusion_matrix(target, guess, labels=list(classes)).tolist(),
    }


def regression(target: np.ndarray, outputs: np.ndarray) -> dict[str, Any]:
    """target: values `[rows]`; outputs `[rows, 1]`. `r2` is null for a single row."""
    from sklearn import metrics

    guess = outputs[:, 0]
    return {
        "rows": len(target),
        "mae": float(metrics.mean_absolute_error(target, guess)),
        "rmse": float(metrics.root_mean_squared_error(target, guess)),
        "r2": float(metrics.r2_score(target, guess)) if len(target) > 1 else None,
    }
