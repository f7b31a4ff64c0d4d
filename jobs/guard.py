"""What an endpoint knows of the training rows without having one: their distributions, their mean, and how familiar a row looks.

`reference.json` holds histograms of the features (from the profile) and of the model's answers, and the mean row that
explanations start from. `guard.npz` holds two judges of familiarity, fitted on training rows as the model reads them: an
isolation forest (Liu, Ting and Zhou, 2008) and an autoencoder, whose error a row that is unlike them makes large; beside them
counts the number that is farthest from its mean. All are arrays, since a bundle holds no code.
"""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from ..cluster.sealed import Seal, read
from ..cluster.storage import read_json
from ..datasets.profile import Profile
from ..datasets.schema import Columns, Schema
from ..datasets.shards import Manifest
from .engine import Engine
from .evaluate import Sources
from .export import sample

REFERENCE, GUARD = "reference.json", "guard.npz"
BINS = 20
MOST_ROWS = 5000
MOST_NUMBERS = 512
"""Of a row, that the judges see: more are mixed to so many at random (Johnson and Lindenstrauss, 1984)."""
TREES, ROWS_OF_TREE = 100, 256
HELD = 0.995
"""The share of held-out rows that are familiar."""
FEWEST = 100
"""Requests' rows, before anything is said of their distribution."""
MOVED = 0.2
"""Population stability index from which on a feature counts as moved."""


class Distribution(BaseModel):
    """Shares of the training rows. Numbers: `BINS` equal bins between low and high, with one below, one above and one empty.
    Text: the most frequent values, the others, and empty."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    low: float = 0.0
    high: float = 0.0
    values: tuple[str, ...] = ()
    shares: tuple[float, ...]
    rows: int

    @property
    def size(self) -> int:
        return len(self.shares)


class Reference(BaseModel):
    """mean: of each input, the mean training row. features: distributions of what requests bring; answers: of what they get.
    ranges: of each column of numbers, its least, mean and largest number."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    mean: dict[str, Any]
    features: tuple[Distribution, ...]
    answers: tuple[Distribution, ...]
    ranges: dict[str, tuple[float, float, float]] = {}

    @classmethod
    def read(cls, bundle: Path, seal: Seal | None) -> "Reference":
        return cls.model_validate_json(read(bundle / REFERENCE, seal))


def reference(engine: Engine, sources: Sources, columns: Columns) -> Reference:
    """columns: raw test rows, of which the answers' distribution is."""
    profile = Profile.model_validate(read_json(sources.prepared / "profile.json"))
    known, features = {c.name: c for c in profile.columns}, []
    rows = Manifest.read(sources.prepared).rows("train")
    for feature in engine.schema.features:
        column, values = known[feature.name], columns[feature.name]
        if isinstance(values, np.ndarray) and values.ndim > 1:  # whose histogram is of single numbers, and not of rows
            features.append(_of_numbers(feature.name, _brightness(values)))
        elif column.histogram:
            counts = [0, *column.histogram, 0, column.missing * sum(column.histogram) / max(1e-9, 1 - column.missing)]
            features.append(_shared(feature.name, np.array(counts), rows, low=column.edges[0], high=column.edges[-1]))
        elif column.top and column.missing < 1:
            counted = [n for _, n in column.top]
            there = rows * (1 - column.missing)
            rest = max(0.0, there - sum(counted))
            counts = np.array([*counted, rest, rows * column.missing])
            features.append(_shared(feature.name, counts, rows, values=tuple(v for v, _ in column.top)))
    outputs = engine.predict(columns)
    inputs, _ = sample(sources.prepared, sources.keys, "train", MOST_ROWS)
    words = engine.schema.ids
    mean = {n: (np.zeros(v.shape[1:]) if n in words else v.mean(axis=0)).tolist() for n, v in inputs.items()}
    ranges = {c.name: (c.low, c.mean, c.high) for c in profile.columns if c.low is not None and c.mean is not None}
    answers = tuple(_of_answers(outputs, engine.schema))
    return Reference(mean=mean, features=tuple(features), answers=answers, ranges=ranges)  # pyright: ignore[reportArgumentType]


def _shared(name: str, counts: np.ndarray, rows: int, **how: Any) -> Distribution:
    return Distribution(name=name, shares=tuple((counts / counts.sum()).tolist()), rows=rows, **how)


def _of_numbers(name: str, values: np.ndarray) -> Distribution:
    low, high = float(values.min()), float(values.max())
    high = high if high > low else low + 1.0
    counts = np.bincount(_bins(values, low, high), minlength=BINS + 3)
    return _shared(name, counts, len(values), low=low, high=high)


def _of_answers(outputs: np.ndarray, schema: Schema) -> list[Distribution]:
    if schema.tasks:
        return []
    if not schema.classes:
        return [_of_numbers("prediction", outputs[:, 0])]
    counts = np.bincount(outputs.argmax(axis=1), minlength=len(schema.classes))
    classes = tuple(str(c) for c in schema.classes)
    predicted = _shared("prediction", np.append(counts, [0, 0]), len(outputs), values=classes)
    return [predicted, _of_numbers("confidence", outputs.max(axis=1))]


def _brightness(values: np.ndarray) -> np.ndarray:
    """One number of a tensor a row: its mean."""
    return values.reshape(len(values), -1).mean(axis=1)


def _bins(values: np.ndarray, low: Any, high: Any) -> np.ndarray:
    """0: below, 1 … BINS, then above, and empty."""
    with np.errstate(invalid="ignore"):
        place = np.floor((values - low) / (high - low) * BINS)
        place = np.where(values == high, BINS - 1, place)
    return np.where(np.isnan(values), BINS + 2, np.clip(place, -1, BINS) + 1).astype(np.int64)


class Counts:
    """Rows of requests by the bins of a reference; plain arrays of whole numbers."""

    def __init__(self, known: Reference):
        self.known = known.model_copy(update={"mean": {}})  # as large as a row, and not needed where counts travel
        self.numbers = [d for d in known.features if not d.values]
        self.low = np.array([d.low for d in self.numbers])
        self.high = np.array([d.high for d in self.numbers])
        self.found = {d.name: np.zeros(d.size, np.int64) for d in known.features}
        self.answers = {d.name: np.zeros(d.size, np.int64) for d in known.answers}

    def add(self, columns: Columns, outputs: np.ndarray) -> None:
        if self.numbers:
            values = [columns[d.name] for d in self.numbers]
            table = np.stack([_brightness(v) if v.ndim > 1 else v for v in values], axis=1)
            places = _bins(table, self.low, self.high) + np.arange(len(self.numbers)) * (BINS + 3)
            counts = np.bincount(places.ravel(), minlength=len(self.numbers) * (BINS + 3)).reshape(-1, BINS + 3)
            for d, row in zip(self.numbers, counts, strict=True):
                self.found[d.name] += row
        for d in self.known.features:
            if d.values:
                self.found[d.name] += _counted(columns[d.name], d.values)
        for d in self.known.answers:
            if d.values:
                self.answers[d.name] += np.bincount(outputs.argmax(axis=1), minlength=d.size)
            else:
                values = outputs.max(axis=1) if d.name == "confidence" else outputs[:, 0]
                self.answers[d.name] += np.bincount(_bins(values, d.low, d.high), minlength=d.size)

    def merge(self, other: "Counts") -> "Counts":
        """Of both; counts of another reference take this one's place."""
        if other.known is not self.known and other.known != self.known:
            return other
        both = Counts(self.known)
        for own, a, b in ((both.found, self.found, other.found), (both.answers, self.answers, other.answers)):
            for name in own:
                own[name] = a[name] + b[name]
        return both

    def shifts(self) -> list["Shift"]:
        """The largest first; none while there are too few rows."""
        pairs = [(d, self.found[d.name]) for d in self.known.features]
        pairs += [(d.model_copy(update={"name": f"({d.name})"}), self.answers[d.name]) for d in self.known.answers]
        found = [s for d, counts in pairs if (s := shift(d, counts))]
        return sorted(found, key=lambda s: -s.psi)


def _counted(column: pa.Array, values: tuple[str, ...]) -> np.ndarray:
    place = {v: i for i, v in enumerate(values)}
    found = np.zeros(len(values) + 2, np.int64)
    for value in column.to_pylist():
        found[len(values) + 1 if value is None else place.get(value, len(values))] += 1
    return found


@dataclass(frozen=True)
class Shift:
    """How far requests are from training. psi: population stability index, less what chance adds; ks: the largest distance of the
    cumulative shares (Kolmogorov and Smirnov), of text half the sum of all distances."""

    name: str
    rows: int
    psi: float
    ks: float
    moved: bool


def shift(known: Distribution, counts: np.ndarray) -> Shift | None:
    """None while there are too few rows."""
    rows = int(counts.sum())
    if rows < FEWEST:
        return None
    expected, found = np.array(known.shares), counts / rows
    floor = 0.5 / max(rows, known.rows)
    a, b = np.maximum(expected, floor), np.maximum(found, floor)
    used = (expected > 0) | (found > 0)
    chance = (used.sum() - 1) * (1 / rows + 1 / max(1, known.rows))
    psi = max(0.0, float(((b - a) * np.log(b / a))[used].sum()) - chance)
    gaps = expected - found
    ks = float(np.abs(gaps).sum() / 2 if known.values else np.abs(np.cumsum(gaps)).max())
    return Shift(known.name, rows, round(psi, 4), round(ks, 4), psi >= MOVED)


# Familiarity


class Guard:
    """Judges rows as the model reads them. A score above 1 is unlike the training rows."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.a = arrays
        self.layers = [(arrays[f"w{i}"], arrays[f"b{i}"]) for i in range(int(arrays["layers"]))]

    @classmethod
    def fit(cls, inputs: dict[str, np.ndarray], held: dict[str, np.ndarray], seed: int = 0) -> "Guard":
        """inputs: training rows; held: rows that nothing is fitted on, which say how large scores become."""
        from sklearn.ensemble import IsolationForest
        from sklearn.neural_network import MLPRegressor

        rows = _flat(inputs)
        arrays: dict[str, Any] = {}
        deviation = rows.std(axis=0)
        arrays["mean"], arrays["scale"] = rows.mean(axis=0), np.maximum(deviation, 0.05 * max(float(deviation.mean()), 1e-9))
        if rows.shape[1] > MOST_NUMBERS:
            draw = np.random.default_rng(seed).normal(size=(rows.shape[1], MOST_NUMBERS)) / rows.shape[1] ** 0.5
            arrays["mix"] = draw.astype(np.float32)
        seen = _seen(rows, arrays)
        forest: Any = IsolationForest
        forest = forest(n_estimators=TREES, max_samples=min(ROWS_OF_TREE, len(seen)), random_state=seed).fit(seen)
        arrays |= _trees(forest, min(ROWS_OF_TREE, len(seen)))
        wide = seen.shape[1]
        narrow = max(1, wide // 4)
        outer = max(narrow, min(64, wide))
        coder = MLPRegressor(
            hidden_layer_sizes=(outer, narrow, outer), max_iter=150, random_state=seed, early_stopping=len(seen) >= 200,
            activation="tanh",
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it could have learnt on
            coder.fit(seen, seen if wide > 1 else seen.ravel())
        for i, (w, b) in enumerate(zip(coder.coefs_, coder.intercepts_, strict=True)):
            arrays |= {f"w{i}": w.astype(np.float32), f"b{i}": b.astype(np.float32)}
        arrays["layers"] = np.array(len(coder.coefs_))
        made = cls(arrays)
        each = made._each(_flat(held))
        arrays["middle"], arrays["spread"] = np.median(each, axis=0), np.maximum(each.std(axis=0), 1e-9)
        arrays["limit"] = np.array(max(float(np.quantile(made._strangeness(each), HELD)), 1e-3))
        return made

    def scores(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """`[rows]`, in units of the limit."""
        return self._strangeness(self._each(_flat(inputs))) / self.a["limit"]

    def _strangeness(self, each: np.ndarray) -> np.ndarray:
        """`[rows]`: by whichever judge a row is strangest, in deviations of the held-out rows."""
        return ((each - self.a["middle"]) / self.a["spread"]).max(axis=1)

    def _each(self, flat: np.ndarray) -> np.ndarray:
        """`[rows, 3]`: of the forest, of the autoencoder, and of the farthest number; larger is stranger."""
        seen = _seen(flat, self.a)
        farthest = np.abs((flat - self.a["mean"]) / self.a["scale"]).max(axis=1)
        at = np.zeros((len(seen), TREES), np.int64)
        trees = np.arange(TREES)
        feature, edge, left, right = (self.a[n] for n in ("feature", "edge", "left", "right"))
        rows = np.arange(len(seen))[:, None]
        for _ in range(int(self.a["depth"])):
            value = seen[rows, np.maximum(feature[trees, at], 0)]
            after = np.where(value <= edge[trees, at], left[trees, at], right[trees, at])
            at = np.where(feature[trees, at] < 0, at, after)
        isolated = 2.0 ** (-self.a["length"][trees, at].mean(axis=1) / float(self.a["usual"]))
        hidden = seen
        for i, (w, b) in enumerate(self.layers):
            hidden = hidden @ w + b
            hidden = np.tanh(hidden) if i < len(self.layers) - 1 else hidden
        error = np.log(np.square(hidden - seen).mean(axis=1) + 1e-6)
        return np.stack([isolated, error, np.log1p(farthest)], axis=1)

    def dump(self) -> bytes:
        out = io.BytesIO()
        np.savez_compressed(out, allow_pickle=False, **self.a)
        return out.getvalue()

    @classmethod
    def read(cls, bundle: Path, seal: Seal | None) -> "Guard":
        with np.load(io.BytesIO(read(bundle / GUARD, seal)), allow_pickle=False) as found:
            return cls({name: found[name] for name in found.files})


def _flat(inputs: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([v.reshape(len(v), -1) for _, v in sorted(inputs.items())], axis=1).astype(np.float32)


def _seen(rows: np.ndarray, arrays: dict[str, np.ndarray]) -> np.ndarray:
    scaled = np.clip((rows - arrays["mean"]) / arrays["scale"], -10, 10)
    return scaled @ arrays["mix"] if "mix" in arrays else scaled


def _usual(rows: np.ndarray) -> np.ndarray:
    """Mean length of a path in a tree over so many rows (Liu, Ting and Zhou, 2008)."""
    safe = np.maximum(rows, 2).astype(float)
    found = 2 * (np.log(safe - 1) + np.euler_gamma) - 2 * (safe - 1) / safe
    return np.where(rows < 2, 0.0, np.where(rows == 2, 1.0, found))


def _trees(forest: Any, rows: int) -> dict[str, np.ndarray]:
    """An isolation forest as arrays `[trees, nodes]`; `length`: of the path that ends in a leaf."""
    trees = [t.tree_ for t in forest.estimators_]
    most = max(t.node_count for t in trees)
    shape = (len(trees), most)
    out = {name: np.zeros(shape, np.int32) for name in ("left", "right")} | {"feature": np.full(shape, -2, np.int32)}
    edge, length, deepest = np.zeros(shape), np.zeros(shape), 0
    for i, (tree, columns) in enumerate(zip(trees, forest.estimators_features_, strict=True)):
        inner = tree.children_left >= 0
        n = tree.node_count
        out["left"][i, :n] = np.maximum(tree.children_left, 0)
        out["right"][i, :n] = np.maximum(tree.children_right, 0)
        out["feature"][i, :n] = np.where(inner, columns[np.maximum(tree.feature, 0)], -2)
        edge[i, :n] = tree.threshold
        depth = np.zeros(n)
        for node in range(n):  # parents stand before their children
            if inner[node]:
                depth[tree.children_left[node]] = depth[tree.children_right[node]] = depth[node] + 1
        length[i, :n] = depth + _usual(tree.n_node_samples)
        deepest = max(deepest, int(depth.max()))
    usual = _usual(np.array(rows))
    out |= {"depth": np.array(deepest), "usual": usual}
    return out | {"edge": edge.astype(np.float32), "length": length.astype(np.float32)}
