"""Suspects: training rows whose label is probably wrong, by confident learning (Northcutt, Jiang and Chuang, Confident learning:
estimating uncertainty in dataset labels, 2021).

Models that have not seen a row say how probable each class is for it: five support vector machines on the numbers that the model
reads, each trained on four fifths of the rows. A row is suspect where another class is more probable than that class usually is
for rows which bear its label, and more probable than the row's own. So many of them are named as the joint counts of given and
true labels suggest, the least probable labels first.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster.keys import KeyStore
from ..datasets.schema import Schema
from ..errors import DataError
from .export import sample

FOLDS = 5
MOST_ROWS = 20_000
"""That are looked at: a random part where there are more."""
MOST_SHOWN = 64
"""Numbers of a row that are written beside it, where the data are not encrypted."""
SUSPECTS = "suspects.jsonl"


def suspects(prepared: Path, keys: KeyStore | None, folder: Path, update: Callable[..., None]) -> str:
    """Write `suspects.jsonl`, the most suspect first; what was found, for people. Raises DataError."""
    schema = Schema.read(prepared)
    if not schema.classes:
        raise DataError(f"{prepared}: labels are looked at where one target has classes, and this is a {schema.task}")
    inputs, target = sample(prepared, keys, "train", MOST_ROWS)
    rows = np.concatenate([inputs[n].reshape(len(target), -1) for n in schema.inputs], axis=1)
    labelled = np.flatnonzero(target >= 0)
    rare = [schema.classes[c] for c, n in enumerate(np.bincount(target[labelled], minlength=len(schema.classes))) if n < FOLDS]
    if rare:
        raise DataError(f"{prepared}: the class `{rare[0]}` has fewer than {FOLDS} training rows: too few to judge by")
    update("asking models about rows that they have not seen")
    probabilities = out_of_fold(rows[labelled], target[labelled], len(schema.classes))
    doubtful = labelled[issues(target[labelled], probabilities)]
    of = dict(zip(labelled, probabilities, strict=True))
    with (folder / SUSPECTS).open("w") as file:
        for row in doubtful:
            suggested = int(of[row].argmax())
            line: dict[str, Any] = {
                "place": int(row), "label": schema.classes[target[row]], "suggested": schema.classes[suggested],
                "probability_of_label": round(float(of[row][target[row]]), 4), "probability": round(float(of[row][suggested]), 4),
            }  # fmt: skip
            if keys is None:  # what is encrypted is not written in clear
                line["inputs"] = np.round(rows[row][:MOST_SHOWN], 4).tolist()
            file.write(json.dumps(line) + "\n")
    share = len(doubtful) / max(1, len(labelled))
    return f"{len(doubtful):,} of {len(labelled):,} labels ({share:.1%}) are doubtful: {folder / SUSPECTS}"


def out_of_fold(rows: np.ndarray, target: np.ndarray, classes: int, seed: int = 0) -> np.ndarray:
    """`[rows, classes]`: what models say of rows that they were not trained on."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    scores: Any = cross_val_predict(make_pipeline(StandardScaler(), SVC()), rows, target, cv=folds, method="decision_function")
    scores = scores[:, None] if scores.ndim == 1 else scores
    calibrated: Any = LogisticRegression(max_iter=1000)  # distances to probabilities (Platt, 1999), of several classes at once
    return np.asarray(cross_val_predict(calibrated, scores, target, cv=folds, method="predict_proba"))


def issues(target: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Places of the rows whose labels are suspect, the most suspect first. target: given labels `[rows]`."""
    classes = probabilities.shape[1]
    at = np.arange(len(target))
    usual = np.array([probabilities[target == c, c].mean() if (target == c).any() else 1.0 for c in range(classes)])
    confident = np.where(probabilities >= usual, probabilities, -1.0)
    counted = confident.max(axis=1) >= 0
    truth = np.where(counted, confident.argmax(axis=1), target)
    off = counted & (truth != target)
    own, other = probabilities[at, target], probabilities[at, truth]
    places = np.flatnonzero(off & (other > own))
    return places[np.argsort(own[places] - other[places], kind="stable")]
