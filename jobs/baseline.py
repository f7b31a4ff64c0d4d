"""What scikit-learn makes of the same rows: a linear model and gradient-boosted trees, beside which a model is judged.

They learn from the prepared training rows (numbers as they are, images coarser, words counted), with their own defaults, and
answer the same test rows; whether the model is better than the better one of them is tested as `compare` does it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster.storage import write_json
from ..datasets.schema import Schema, as_fed
from .compare import paired
from .evaluate import Sources, test_rows
from .export import sample

BASELINE = "baseline.json"
MOST_ROWS = 20_000
MOST_NUMBERS = 1024
"""Of an image, which is made coarser until it has no more."""


def baseline(sources: Sources, folder: Path, update: Callable[..., None]) -> None:
    """Write `baseline.json`: figures of the model and of each other one, and the verdict of each comparison."""
    engine = sources.engine()
    schema = engine.schema
    columns, target = test_rows(sources, MOST_ROWS)
    outputs = engine.predict(columns)
    rows = {n: as_fed(v) for n, v in engine.preprocessing.apply(columns).items()}
    inputs, known = sample(sources.prepared, sources.keys, "train", MOST_ROWS)
    has = known >= 0 if schema.classes else np.isfinite(known)
    table, asked = _table({n: v[has] for n, v in inputs.items()}, rows, schema)
    said = []
    for name, model in _models(schema, words=bool(schema.ids)).items():
        update(f"fitting scikit-learn's {name}")
        model.fit(table, known[has])
        if schema.classes:
            answers = np.zeros((len(target), len(schema.classes)), np.float32)
            answers[:, model.classes_.astype(int)] = model.predict_proba(asked)
        else:
            answers = model.predict(asked).astype(np.float32)[:, None]
        found = paired(target.astype(np.int64 if schema.classes else np.float64), answers, outputs, schema)
        own = {n: f["a"] for n, f in found["figures"].items()}
        verdict = {"the second is better": "the model is better", "the first is better": "the model is worse"}
        said.append({
            "name": name, "figures": own, "gap": {n: [f["b"] - f["a"], f["low"], f["high"]] for n, f in found["figures"].items()},
            "p": found["p"], "verdict": verdict.get(found["verdict"], found["verdict"]),
        })  # fmt: skip
    write_json(folder / BASELINE, {"rows": len(target), "learnt_from": int(has.sum()), "models": said})


def _models(schema: Schema, words: bool) -> dict[str, Any]:
    from sklearn import ensemble, linear_model
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scaled = StandardScaler(with_mean=not words)
    if not schema.classes:
        linear = {"ridge regression": make_pipeline(scaled, linear_model.RidgeCV(np.logspace(-3, 3, 13)))}
        return linear if words else linear | {"gradient boosting": ensemble.HistGradientBoostingRegressor(random_state=0)}
    linear = {"logistic regression": make_pipeline(scaled, linear_model.LogisticRegression(max_iter=1000))}
    return linear if words else linear | {"gradient boosting": ensemble.HistGradientBoostingClassifier(random_state=0)}


def _table(train: dict[str, np.ndarray], test: dict[str, np.ndarray], schema: Schema) -> tuple[Any, Any]:
    """Both as matrices with a row each: numbers, or sparse where there are words."""
    from scipy import sparse
    from sklearn.feature_extraction.text import TfidfTransformer

    parts: tuple[list[Any], list[Any]] = ([], [])
    for name in schema.inputs:
        if name in schema.ids:
            count = 1 + int(max(train[name].max(), test[name].max()))
            weigh = TfidfTransformer().fit(_counted(train[name], count))
            made = [weigh.transform(_counted(rows[name], count)) for rows in (train, test)]
        else:
            made = [_coarse(rows[name]) for rows in (train, test)]
        for part, found in zip(parts, made, strict=True):
            part.append(found)
    joined = sparse.hstack if schema.ids else np.hstack
    return joined(parts[0]), joined(parts[1])


def _counted(ids: np.ndarray, count: int) -> Any:
    """`[rows, ids]`: how often each word is there; 0 is padding."""
    from scipy import sparse

    row, place = np.nonzero(ids)
    return sparse.csr_matrix((np.ones(len(row)), (row, ids[row, place].astype(int))), shape=(len(ids), count))


def _coarse(rows: np.ndarray) -> np.ndarray:
    while rows.ndim >= 3 and rows[0].size > MOST_NUMBERS and min(rows.shape[1:3]) > 1:
        even = rows[:, : rows.shape[1] // 2 * 2, : rows.shape[2] // 2 * 2]
        rows = (even[:, ::2, ::2] + even[:, 1::2, ::2] + even[:, ::2, 1::2] + even[:, 1::2, 1::2]) / 4
    return rows.reshape(len(rows), -1)
