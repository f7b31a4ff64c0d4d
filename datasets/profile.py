"""A profile of the data: what each column holds, how the classes balance, and whether the splits are alike.

Counts, means and ranges are exact, of the training rows. Histograms, drift and near duplicates are of a sample of up to
20,000 rows, drawn by the rows' hashes. Equal rows have equal hashes and so stand in one split; a near duplicate is a row of
the test split that lies closer to a training row than a hundredth of the usual distance between two rows.
"""

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from .preprocess import Statistics, finite
from .schema import Column, Columns, Schema, class_index
from .shards import target_columns

BINS, TOP = 20, 10
NEAR = 0.01
MOST_NEAR = (500, 5000)
"""Rows of the test split that are compared, and of the training split with each."""


class ColumnProfile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    kind: str
    missing: float
    """Share of the training rows."""
    distinct: int | None = None
    """Values of text, as far as they are counted."""
    low: float | None = None
    high: float | None = None
    mean: float | None = None
    deviation: float | None = None
    edges: list[float] = []
    histogram: list[int] = []
    top: list[tuple[str, int]] = []
    """The most frequent values of text."""
    drift: float | None = None
    """Between training and test rows: Kolmogorov and Smirnov's statistic, or the total variation of text; 0 to 1."""


class Profile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rows: dict[str, int]
    bad_rows: int = 0
    columns: list[ColumnProfile]
    classes: dict[str, int] = {}
    """Training rows of the sample."""
    sample: int
    repeated: int
    """Rows of the sample that equal another one."""
    near_duplicates: int
    """Rows of the test split's sample that are nearly in training."""
    warnings: list[str]


def profile(
    sample: tuple[np.ndarray, Columns],
    schema: Schema,
    raw: dict[str, Statistics],
    rows: dict[str, int],
    ranges: list[tuple[Any, float, int, int]],
) -> Profile:
    """sample: hashes, and the columns with the target. raw: statistics of the training rows. ranges: of the splits' hashes."""
    hashes, columns = sample
    member = {split: np.flatnonzero((hashes >= first) & (hashes < end)) for split, _, first, end in ranges}
    train, test = member["train"], member["test"]
    described = []
    for feature in schema.features:
        stat, values = raw.get(feature.name, Statistics(rows=0, missing=0)), columns[feature.name]
        made = ColumnProfile(name=feature.name, kind=feature.kind, missing=round(stat.missing / max(1, stat.rows), 6))
        if stat.moments:
            m = stat.moments
            made.low, made.high, made.mean, made.deviation = m.low, m.high, m.mean, m.deviation
            if m.high > m.low and np.isfinite(m.high - m.low):
                counts, edges = np.histogram(finite(values[train]), BINS, (m.low, m.high))
                made.histogram, made.edges = counts.tolist(), edges.tolist()
        if stat.counts:
            made.distinct = len(stat.counts)
            made.top = sorted(stat.counts.items(), key=lambda item: (-item[1], item[0]))[:TOP]
        made.drift = _drift(values, train, test)
        described.append(made)
    classes = {}
    for name, (alone, _) in zip(target_columns(len(schema.parts)), schema.parts, strict=True):
        prefix = f"{alone.target} " if schema.tasks else ""
        labels = class_index(columns[name], alone)[train] if alone.classes else np.empty(0, int)
        classes |= {f"{prefix}{c}": int((labels == i).sum()) for i, c in enumerate(alone.classes)}
    near = _near(schema, columns, train, test)
    return Profile(
        rows=rows, columns=described, classes=classes, sample=len(hashes), repeated=len(hashes) - len(np.unique(hashes)),
        near_duplicates=near, warnings=_warnings(described, classes, near, len(train), len(test)),
    )  # fmt: skip


def _drift(values: Column, train: np.ndarray, test: np.ndarray) -> float | None:
    if not len(train) or not len(test):
        return None
    if isinstance(values, np.ndarray):
        a, b = np.sort(finite(values[train])), np.sort(finite(values[test]))
        if not len(a) or not len(b):
            return None
        at = np.concatenate([a, b])
        gap = np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)
        return round(float(np.abs(gap).max()), 4)
    if str(values.type) != "string":
        return None
    known = values.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False) + 1
    shares = [np.bincount(known[rows], minlength=known.max() + 1) / len(rows) for rows in (train, test)]
    return round(float(np.abs(shares[0] - shares[1]).sum() / 2), 4)


def _near(schema: Schema, columns: Columns, train: np.ndarray, test: np.ndarray) -> int:
    parts = []
    for feature in schema.features:
        values = columns[feature.name]
        if isinstance(values, np.ndarray):
            wide = np.nan_to_num(values.astype(np.float64).reshape(len(values), -1))
            spread = wide.std(axis=0)
            parts.append((wide - wide.mean(axis=0)) / np.where(spread > 0, spread, 1.0))
        elif str(values.type) == "string":
            known = values.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
            parts.append(known[:, None] * 1e3)  # texts are equal or far
    if not parts or len(train) < 2 or not len(test):
        return 0
    points = np.concatenate(parts, axis=1)
    a, b = points[test[: MOST_NEAR[0]]], points[train[: MOST_NEAR[1]]]
    squares = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T, 0)
    return int((squares.min(axis=1) < NEAR**2 * np.median(squares)).sum())


def _warnings(columns: list[ColumnProfile], classes: dict[str, int], near: int, train: int, test: int) -> list[str]:
    out = [f"`{c.name}` has one value only ({c.low:g})" for c in columns if c.deviation == 0 and c.low is not None]
    out += [f"`{c.name}` is empty in {c.missing:.0%} of the rows" for c in columns if c.missing > 0.3]
    # Chance alone makes a drift of this size once in a thousand columns (Kolmogorov's asymptotic quantile).
    bound = 1.95 * ((train + test) / max(1, train * test)) ** 0.5
    out += [
        f"`{c.name}` differs between training and test rows (drift {c.drift:.2f})"
        for c in columns
        if c.kind in ("number", "time") and c.drift is not None and c.drift > bound
    ]
    if near > 0.01 * max(1, min(test, MOST_NEAR[0])):
        out.append(f"{near} of {min(test, MOST_NEAR[0])} test rows are nearly in the training split")
    if classes and min(classes.values()) * 20 < max(classes.values()):
        rare = min(classes, key=classes.__getitem__)
        out.append(f"classes are far out of balance: `{rare}` has {classes[rare]} of {sum(classes.values())} training rows")
    return out
