"""Evaluate: how good the model is on rows that nothing was fitted on.

Ray Data reads the raw test shards and runs the engine on them, so the figures are of the preprocessing and the model that
answer requests; scikit-learn computes them.
"""

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster.keys import KeyStore
from ..cluster.storage import write_json
from ..datasets import shards
from ..datasets.schema import Schema, to_numpy
from ..datasets.shards import TARGET, Manifest
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
    write_json(
        folder / "metrics.json", classification(target, outputs, schema) if schema.classes else regression(target, outputs)
    )


@functools.lru_cache(maxsize=1)
def _engine(trained: Path, prepared: Path, sealing: Path) -> Engine:
    return Engine(trained, prepared, threads=1, keys=KeyStore(sealing))


def _predict(
    batch: dict[str, Any], files: list[Path], prepared: Path, trained: Path, keys: KeyStore | None, sealing: KeyStore
) -> dict[str, Any]:
    engine = _engine(trained, prepared, sealing.folder)
    targets, outputs = [], []
    for number in batch["id"]:
        file = files[int(number)]
        with shards.open_shard(file, keys) as shard:
            table = shards.read_table(shard, file)
        targets.append(to_numpy(table.column(TARGET)))
        outputs.append(engine.predict(engine.schema.columns(table)))
    return {"target": np.concatenate(targets), "outputs": np.concatenate(outputs)}


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
