"""Figures of predictions, from states that are merged: a worker sums up its rows, and the sum of all is what scikit-learn says of
all rows at once, to rounding.

Counts, sums and confusion are plain sums. What depends on the order of the scores (areas under curves) keeps each class's
scores, sorted, in four bytes a row: a probability as a float32 has no sign, so its bits, moved up by one, leave room for "is of
the class", and such whole numbers sort as the probabilities do. Sorted runs of many workers may lie in files; they are read
range by range, so memory is bounded however many rows there are.

Intervals are by the Poisson bootstrap (Chamandy et al., Estimating uncertainty for massive data streams, 2012): each row counts
Poisson(1) times. Of more rows than `MOST_KEPT`, a random part is resampled, and deviations from the part's own figure shrink by
the square root of its share (Bickel, Götze and van Zwet, Resampling fewer than n observations, 1997).
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.schema import Schema

BINS = 15
"""Of confidence, equally wide, as in Guo et al. (On calibration of modern neural networks, 2017)."""
POINTS = 200
"""Of a curve that is drawn."""
MOST_KEPT = 1 << 16
"""Rows that are resampled, and looked through for slices, at most."""
RANGE = 1 << 24
"""Scores that are held at a time when curves are computed."""
SMALLEST = float(np.finfo(np.float64).eps)
MEANT = (
    "accuracy", "balanced_accuracy", "roc_auc", "average_precision", "log_loss", "brier", "ece", "mcc", "top_3", "top_5",
    "mae", "rmse", "r2",
)  # fmt: skip
"""Figures of which several targets have a mean."""
LOWER = ("log_loss", "brier", "ece", "mae", "rmse")
"""Of which less is better."""


@dataclass
class Classified:
    """What is to be known of rows with classes, but the order of their scores."""

    confusion: np.ndarray
    """int64 `[truth, guess]`"""
    ranks: np.ndarray
    """int64 `[classes]`: how many rows have so many classes before the true one."""
    loss: float
    """Sum of -log of the truth's probability."""
    brier: float
    bins: np.ndarray
    """Of each bin of confidence: rows, sum of confidences, rows that are right."""
    runs: list[list[np.ndarray | Path]]
    """Of each class (of two: of the second), sorted runs of `keys`."""

    @classmethod
    def of(cls, target: np.ndarray, outputs: np.ndarray) -> "Classified":
        """target: class indices `[rows]`; outputs: probabilities `[rows, classes]`, float32."""
        rows, classes = outputs.shape
        at = np.arange(rows)
        guess, confidence, truth = outputs.argmax(axis=1), outputs.max(axis=1), outputs[at, target]
        right = guess == target
        if classes == 2:
            ranks = np.array([right.sum(), rows - right.sum()])
        else:
            ranks = np.bincount(_before(target, outputs), minlength=classes)
        place = _bin(confidence)
        return cls(
            np.bincount(target * classes + guess, minlength=classes * classes).reshape(classes, classes),
            ranks,
            float(losses(truth).sum()),
            float(briers(target, outputs).sum()),
            np.array([np.bincount(place, weights, BINS) for weights in (None, confidence, right)], np.float64),
            [[np.sort(keys(outputs[:, c], target == c))] for c in _ranked(classes)],
        )

    def merge(self, other: "Classified") -> "Classified":
        runs = [a + b for a, b in zip(self.runs, other.runs, strict=True)]
        return Classified(
            self.confusion + other.confusion, self.ranks + other.ranks, self.loss + other.loss, self.brier + other.brier,
            self.bins + other.bins, runs,
        )  # fmt: skip

    def spill(self, folder: Path, name: str) -> None:
        """Put the runs into files, which whoever merges can read."""
        for c, runs in enumerate(self.runs):
            for i, run in enumerate(runs):
                file = folder / f"{name}-{c}-{i}.npy"
                np.save(file, np.asarray(run))
                runs[i] = file

    def figures(self, schema: Schema) -> dict[str, Any]:
        rows = int(self.confusion.sum())
        found: dict[str, Any] = {"rows": rows}
        curves = [_curves(runs) for runs in self.runs]
        areas = [curve["roc_auc"] for curve in curves]
        if len(self.confusion) == 2:
            areas = [areas[0], areas[0]]
        found |= {name: float(value[0]) for name, value in of_confusion(self.confusion[None]).items()}
        known = [a for a in areas if a is not None]
        found["roc_auc"] = float(np.mean(known)) if known else None
        precise = [c["average_precision"] for c in curves if c["average_precision"] is not None]
        found["average_precision"] = float(np.mean(precise)) if precise else None
        found |= {"log_loss": self.loss / rows, "brier": self.brier / rows, "ece": float(_ece(self.bins[None])[0])}
        found |= {f"top_{k}": float(self.ranks[:k].sum() / rows) for k in (3, 5) if len(self.ranks) > k}
        each = {name: value[0] for name, value in per_class(self.confusion[None]).items()}
        support = self.confusion.sum(axis=1)
        found["macro"] = {name: float(each[name].mean()) for name in each}
        found["weighted"] = {name: float(each[name] @ support / rows) for name in each}
        found["micro"] = dict.fromkeys(each, found["accuracy"])
        found["classes"] = [
            {
                "class": schema.classes[c],
                **{name: float(values[c]) for name, values in each.items()},
                "roc_auc": areas[c],
                "rows": int(support[c]),
            }
            for c in range(len(support))
        ]
        found["confusion"] = self.confusion.tolist()
        found["calibration"] = [
            {"confidence": conf / n, "accuracy": right / n, "rows": int(n)} for n, conf, right in self.bins.T if n
        ]
        names = schema.classes[1:] if len(self.confusion) == 2 else schema.classes
        found["curves"] = [
            {"class": name, **curve["drawn"]} for name, curve in zip(names, curves, strict=False) if curve["drawn"]
        ]
        return found


def _before(target: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """How many classes of each row `[rows]` are before the true one; of equal ones the last is first, as scikit-learn has it."""
    truth = outputs[np.arange(len(target)), target][:, None]
    later = np.arange(outputs.shape[1]) > target[:, None]
    return ((outputs > truth) | ((outputs == truth) & later)).sum(axis=1)


def _bin(confidence: np.ndarray) -> np.ndarray:
    return np.minimum((confidence * np.float32(BINS)).astype(np.int64), BINS - 1)


def _ranked(classes: int) -> list[int]:
    """Classes whose scores are kept: of two, the first one's order is the second one's, backwards."""
    return [1] if classes == 2 else list(range(classes))


def losses(truth: np.ndarray) -> np.ndarray:
    """-log of the truth's probabilities `[rows]`, as scikit-learn's `log_loss` bounds it."""
    return -np.log(np.clip(truth.astype(np.float64), SMALLEST, 1 - SMALLEST))


def briers(target: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Squared distance `[rows]` of the probabilities from the truth; of two classes, of the second one's alone."""
    if outputs.shape[1] == 2:
        return np.square(outputs[:, 1].astype(np.float64) - (target == 1))
    wide = outputs.astype(np.float64)
    truth = wide[np.arange(len(wide)), target]
    return np.square(wide).sum(axis=1) - 2 * truth + 1


def keys(scores: np.ndarray, of_class: np.ndarray) -> np.ndarray:
    """uint32 `[rows]` that sort as the probabilities do; the last bit says whether a row is of the class."""
    bits = np.ascontiguousarray(scores, np.float32).view(np.uint32)
    return (bits << np.uint32(1)) | of_class.astype(np.uint32)


def _ranges(runs: list[np.ndarray | Path]) -> Iterator[np.ndarray]:
    """All keys of a class, sorted, the highest scores first, in pieces that end between two scores."""
    opened = [np.load(run, mmap_mode="r") if isinstance(run, Path) else run for run in runs]
    total = sum(map(len, opened))
    pieces = max(1, -(-total // RANGE))
    sample = np.sort(np.concatenate([run[:: max(1, len(run) >> 10)] for run in opened]))
    edges = [int(sample[len(sample) * i // pieces]) & ~1 for i in range(1, pieces)]
    bounds = [0, *dict.fromkeys(edges), 1 << 32]
    for low, high in reversed(list(itertools.pairwise(bounds))):
        ends = [np.searchsorted(run, [low, min(high, (1 << 32) - 1)]) for run in opened]
        parts = [run[a : b if high < 1 << 32 else None] for run, (a, b) in zip(opened, ends, strict=True)]
        yield parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts))


def _curves(runs: list[np.ndarray | Path]) -> dict[str, Any]:
    """Of a class against the rest: exact areas under the ROC and (average precision) the precision-recall curve, and points."""
    above = above_of = 0
    twice, precise = 0, 0.0
    points = [np.zeros((2, 1), np.int64)]
    thresholds = [np.array([np.inf])]
    for piece in _ranges(runs):
        if not len(piece):
            continue
        falling = piece[::-1]
        ends = np.append(np.flatnonzero((falling[1:] >> 1) != (falling[:-1] >> 1)), len(falling) - 1)
        of = np.cumsum(falling & np.uint32(1), dtype=np.int64)[ends] + above_of
        seen = ends + 1 + above
        fresh_of = np.diff(of, prepend=above_of)
        other = seen - of
        fresh = np.diff(other, prepend=above - above_of)
        twice += int((fresh * (2 * of - fresh_of)).sum())
        precise += float((fresh_of * (of / seen)).sum())
        thin = slice(None, None, max(1, len(of) // (4 * POINTS)))
        points.append(np.array([other[thin], of[thin]]))
        thresholds.append((falling[ends[thin]] >> np.uint32(1)).view(np.float32).astype(np.float64))
        above, above_of = int(seen[-1]), int(of[-1])
    without = above - above_of
    if not above_of or not without:
        return {"roc_auc": None, "average_precision": None, "drawn": None}
    falses, trues = np.concatenate([*points, [[without], [above_of]]], axis=1)
    cut = np.append(np.concatenate(thresholds), 0.0)
    some = np.unique(np.linspace(0, len(cut) - 1, min(len(cut), POINTS)).astype(int))
    drawn = {
        "false_positive_rate": np.round(falses[some] / without, 6).tolist(),
        "recall": np.round(trues[some] / above_of, 6).tolist(),
        "precision": np.round(np.where(some > 0, trues[some] / np.maximum(1, trues[some] + falses[some]), 1.0), 6).tolist(),
        "threshold": [round(float(t), 6) if math.isfinite(t) else None for t in cut[some]],
    }
    return {"roc_auc": twice / (2 * without * above_of), "average_precision": precise / above_of, "drawn": drawn}


def per_class(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """confusion: `[samples, truth, guess]` → precision, recall and F1 `[samples, classes]`, 0 where nothing can be divided."""
    right = np.diagonal(confusion, axis1=1, axis2=2).astype(np.float64)
    guessed, true = confusion.sum(axis=1), confusion.sum(axis=2)
    return {
        "precision": right / np.maximum(guessed, 1e-300),
        "recall": right / np.maximum(true, 1e-300),
        "f1": 2 * right / np.maximum(guessed + true, 1e-300),
    }


def of_confusion(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """confusion: `[samples, truth, guess]` → figures `[samples]`. MCC of several classes is Gorodkin's (2004)."""
    each = per_class(confusion)
    rows = confusion.sum(axis=(1, 2)).astype(np.float64)
    right = np.trace(confusion, axis1=1, axis2=2).astype(np.float64)
    guessed, true = confusion.sum(axis=1).astype(np.float64), confusion.sum(axis=2).astype(np.float64)
    there = true > 0
    balanced = (each["recall"] * there).sum(axis=1) / np.maximum(there.sum(axis=1), 1)
    above = right * rows - (guessed * true).sum(axis=1)
    below = np.sqrt((rows**2 - (guessed**2).sum(axis=1)) * (rows**2 - (true**2).sum(axis=1)))
    return {
        "accuracy": right / np.maximum(rows, 1e-300),
        "balanced_accuracy": balanced,
        "mcc": np.where(below > 0, above / np.where(below > 0, below, 1), 0.0),
        **{name: values.mean(axis=1) for name, values in each.items()},
    }


def _ece(bins: np.ndarray) -> np.ndarray:
    """bins: `[samples, 3, BINS]` → expected calibration error `[samples]`."""
    return np.abs(bins[:, 1] - bins[:, 2]).sum(axis=1) / np.maximum(bins[:, 0].sum(axis=1), 1e-300)


@dataclass
class Regressed:
    """What is to be known of rows with numbers: merged pairwise (Chan, Golub and LeVeque, 1979)."""

    rows: int
    mean: float
    squares: float
    """Sum of squared deviations of the targets from their mean."""
    absolute: float
    squared: float
    """Sums of the errors."""

    @classmethod
    def of(cls, target: np.ndarray, outputs: np.ndarray) -> "Regressed":
        """target `[rows]`; outputs `[rows, 1]`."""
        y, error = target.astype(np.float64), outputs[:, 0].astype(np.float64) - target
        mean = float(y.mean())
        return cls(len(y), mean, float(np.square(y - mean).sum()), float(np.abs(error).sum()), float(np.square(error).sum()))

    def merge(self, other: "Regressed") -> "Regressed":
        rows, gap = self.rows + other.rows, other.mean - self.mean
        return Regressed(
            rows, self.mean + gap * other.rows / rows, self.squares + other.squares + gap**2 * self.rows * other.rows / rows,
            self.absolute + other.absolute, self.squared + other.squared,
        )  # fmt: skip

    def spill(self, folder: Path, name: str) -> None: ...

    def figures(self, schema: Schema) -> dict[str, Any]:
        """`r2` is null for a single row."""
        r2 = None
        if self.rows > 1:
            r2 = 1 - self.squared / self.squares if self.squares else float(self.squared == 0)
        return {"rows": self.rows, "mae": self.absolute / self.rows, "rmse": math.sqrt(self.squared / self.rows), "r2": r2}


State = Classified | Regressed


def state(target: np.ndarray, outputs: np.ndarray, schema: Schema) -> State | None:
    """Of one target's rows, those that have it; None where no row has."""
    has = target >= 0 if schema.classes else np.isfinite(target)
    if not has.any():
        return None
    if not has.all():
        target, outputs = target[has], outputs[has]
    return Classified.of(target.astype(np.int64), outputs) if schema.classes else Regressed.of(target, outputs)


def states(target: np.ndarray, outputs: np.ndarray, schema: Schema) -> list[State | None]:
    """Of each of the schema's targets."""
    if not schema.tasks:
        return [state(target, outputs, schema)]
    return [state(_alone(target[:, i], alone), outputs[:, of], alone) for i, (alone, of) in enumerate(schema.parts)]


def _alone(target: np.ndarray, schema: Schema) -> np.ndarray:
    """One of several targets, which beside each other are numbers, NaN where there is none."""
    return np.where(np.isfinite(target), target, -1).astype(np.int64) if schema.classes else target


def merged(a: list[State | None], b: list[State | None]) -> list[State | None]:
    pairs: Any = zip(a, b, strict=True)
    return [x.merge(y) if x and y else x or y for x, y in pairs]


def written(found: list[State | None], schema: Schema, rows: int) -> dict[str, Any]:
    """Figures of the schema's task; of several each under its name, of the rows that have it, and means over those that have
    a figure."""
    if not schema.tasks:
        return found[0].figures(schema) if found[0] else {"rows": 0}
    tasks = {
        alone.target: one.figures(alone) if one else {"rows": 0} for (alone, _), one in zip(schema.parts, found, strict=True)
    }
    means = {}
    for name in MEANT:
        every = [figures[name] for figures in tasks.values() if figures.get(name) is not None]
        means |= {name: float(np.mean(every))} if every else {}
    return {"rows": rows, **means, "tasks": tasks}


def figures(target: np.ndarray, outputs: np.ndarray, schema: Schema) -> dict[str, Any]:
    """Of all rows at once: target `[rows]`, or `[rows, tasks]` of several; outputs `[rows, schema.outputs]`."""
    return written(states(target, outputs, schema), schema, len(target))


# Intervals


Weighted = Callable[[np.ndarray], dict[str, np.ndarray]]
"""Weights of rows `[samples, rows]` to figures `[samples]`."""


def weighted(target: np.ndarray, outputs: np.ndarray, schema: Schema) -> Weighted:
    """The figures of one target's rows as functions of the rows' weights."""
    return _weighted_classes(target, outputs) if schema.classes else _weighted_numbers(target, outputs)


def _weighted_classes(target: np.ndarray, outputs: np.ndarray) -> Weighted:
    rows, classes = outputs.shape
    at = np.arange(rows)
    guess, confidence = outputs.argmax(axis=1), outputs.max(axis=1)
    cells = target * classes + guess
    place = _bin(confidence)
    table = np.zeros((rows, 2 + 2 * BINS), np.float32)
    table[:, 0], table[:, 1] = losses(outputs[at, target]), briers(target, outputs)
    table[at, 2 + place], table[at, 2 + BINS + place] = confidence, guess == target
    hits = {}
    if classes > 3:
        before = _before(target, outputs)
        hits = {f"top_{k}": (before < k).astype(np.float32) for k in (3, 5) if classes > k}
    areas = [_Area(outputs[:, c], target == c) for c in _ranked(classes)]

    def figures_of(weights: np.ndarray) -> dict[str, np.ndarray]:
        total = weights.sum(axis=1)
        confusion = np.stack([np.bincount(cells, w, classes * classes) for w in weights]).reshape(-1, classes, classes)
        sums = (weights @ table).astype(np.float64)
        bins = np.zeros((len(weights), 3, BINS))
        bins[:, 0, 0], bins[:, 1], bins[:, 2] = total, sums[:, 2 : 2 + BINS], sums[:, 2 + BINS :]
        found = of_confusion(confusion)
        found |= {"log_loss": sums[:, 0] / total, "brier": sums[:, 1] / total, "ece": _ece(bins)}
        found |= {name: weights @ hit / total for name, hit in hits.items()}
        both = [area(weights) for area in areas]
        with np.errstate(invalid="ignore"):
            for i, name in enumerate(("roc_auc", "average_precision")):
                found[name] = _mean([pair[i] for pair in both])
        return found

    return figures_of


def _mean(each: list[np.ndarray]) -> np.ndarray:
    """Over the classes that have it, `[samples]`."""
    stacked = np.stack(each)
    known = np.isfinite(stacked)
    return np.where(known, stacked, 0).sum(axis=0) / np.where(known.any(axis=0), known.sum(axis=0), np.nan)


class _Area:
    """Areas of one class against the rest, by weights."""

    def __init__(self, scores: np.ndarray, of_class: np.ndarray):
        self.order = np.argsort(scores, kind="stable")[::-1]
        falling = scores[self.order]
        starts = np.append(0, np.flatnonzero(falling[1:] != falling[:-1]) + 1)
        self.starts = None if len(starts) == len(falling) else starts
        self.of = of_class[self.order].astype(np.float32)

    def __call__(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        every = weights[:, self.order]
        of = every * self.of
        if self.starts is not None:
            every, of = np.add.reduceat(every, self.starts, axis=1), np.add.reduceat(of, self.starts, axis=1)
        seen, true = np.cumsum(every, axis=1), np.cumsum(of, axis=1)  # whole numbers below 2^24, exact in float32
        total, without = true[:, -1].astype(np.float64), (seen[:, -1] - true[:, -1]).astype(np.float64)
        pairs = np.einsum("ij,ij->i", every - of, true - of / 2, dtype=np.float64)
        precise = np.einsum("ij,ij->i", of, true / np.maximum(seen, 1), dtype=np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            return pairs / (total * without), np.where(without > 0, precise / total, np.nan)


def _weighted_numbers(target: np.ndarray, outputs: np.ndarray) -> Weighted:
    y, error = target.astype(np.float64), outputs[:, 0].astype(np.float64) - target
    y = y - y.mean()
    table = np.stack([np.abs(error), np.square(error), y, np.square(y)], axis=1)

    def figures_of(weights: np.ndarray) -> dict[str, np.ndarray]:
        total = weights.sum(axis=1)
        absolute, squared, mean, squares = (weights @ table).T / total
        with np.errstate(invalid="ignore", divide="ignore"):
            return {"mae": absolute, "rmse": np.sqrt(squared), "r2": 1 - squared / (squares - mean**2)}

    return figures_of


def draws(rows: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """float32 weights `[some samples, rows]`: Poisson(1) each."""
    generator = np.random.default_rng(seed)
    below = np.cumsum(np.exp(-1.0) / np.array([math.factorial(k) for k in range(9)]))
    edges = np.round(below[:8] * 65536).astype(np.int64)
    table = np.searchsorted(edges, np.arange(65536), "right").astype(np.uint8)  # to 2^-16, beyond 7 never
    at_once = max(1, (1 << 22) // max(1, rows))
    for first in range(0, samples, at_once):
        number = min(at_once, samples - first)
        yield table[generator.integers(0, 65536, (number, rows), np.uint16)].astype(np.float32)


def intervals(
    estimate: dict[str, Any], target: np.ndarray, outputs: np.ndarray, schema: Schema, rows: int, samples: int, confidence: float,
    seed: int = 0,
) -> dict[str, list[float]]:  # fmt: skip
    """figure → [low, high], each around the estimate of all `rows`, of which target and outputs are a random part or all."""
    of = weighted(target, outputs, schema)
    own = {name: float(value[0]) for name, value in of(np.ones((1, len(target)), np.float32)).items()}
    found: dict[str, list[np.ndarray]] = {}
    for weights in draws(len(target), samples, seed):
        for name, values in of(weights).items():
            found.setdefault(name, []).append(values)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    shrink = math.sqrt(min(1.0, len(target) / max(1, rows)))
    out = {}
    for name, parts in found.items():
        every = np.concatenate(parts)
        every = every[np.isfinite(every)]
        middle = estimate.get(name)
        if middle is None or len(every) < samples / 2:
            continue
        low, high = np.quantile(every, tails)
        ends = middle + shrink * (low - own[name]), middle + shrink * (high - own[name])
        out[name] = [float(min(ends[0], middle)), float(max(ends[1], middle))]
    return out
