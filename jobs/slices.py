"""Parts of the rows: those that a project names, and those that its model does worst on."""

import itertools
import math
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ..datasets.schema import Columns, Schema, _time
from ..errors import DataError
from ..project import FILE
from ..settings import hint
from ..trust import SLICE

SIGNS: dict[str, Any] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
MOST_VALUES = 20
"""Of a column, that become slices."""
FEWEST = 20
"""Rows of a slice that is looked for."""
PAIRED = 12
"""Of the worst single slices, that are tried together."""
LEVEL = 0.05
"""Of false discoveries among the slices that are named (Benjamini and Hochberg, 1995)."""


@dataclass(frozen=True)
class Slice:
    """text: as it was written. sign: None for each value of the column."""

    text: str
    column: str
    sign: str | None = None
    value: float | str | None = None

    def masks(self, columns: Columns) -> Iterator[tuple[str, np.ndarray]]:
        """(name, which rows) of each part."""
        values = columns[self.column]
        if self.sign is not None:
            yield self.text, _compared(values, self.sign, self.value)
            return
        known, codes = _coded(values)
        for i, name in enumerate(known):
            yield f"{self.column} == {name}", codes == i


def _compared(values: Any, sign: str, value: Any) -> np.ndarray:
    if isinstance(values, np.ndarray):
        return SIGNS[sign](values, value)
    known, codes = _coded(values)
    return SIGNS[sign](codes, known.index(value) if value in known else -2)


def _coded(values: Any) -> tuple[list[str], np.ndarray]:
    """(distinct values as text, the number of each row's; -1 where it is empty)."""
    if isinstance(values, np.ndarray):
        found, codes = np.unique(values, return_inverse=True)
        return [f"{v:g}" for v in found], np.where(np.isnan(values), -1, codes)
    found = values.dictionary_encode()
    return found.dictionary.to_pylist(), found.indices.fill_null(-1).to_numpy(zero_copy_only=False)


def parsed(texts: list[str], schema: Schema, where: str) -> list[Slice]:
    """Raises DataError for a column that is not there, or that cannot be compared so."""
    return [_parsed(text, schema, f"{FILE}: {where}[{i}]: `{text}`") for i, text in enumerate(texts)]


def _parsed(text: str, schema: Schema, where: str) -> Slice:
    found = re.fullmatch(SLICE, text)
    assert found
    column, sign, value = found["column"], found["sign"], found["value"]
    kinds = {f.name: f.kind for f in schema.features}
    kind = kinds.get(column)
    if kind is None:
        raise DataError(f"{where}: no feature is called `{column}`: {hint(column, list(kinds))}")
    if kind not in ("number", "text", "time"):
        raise DataError(f"{where}: `{column}` holds a {kind} a row: name a column of numbers, text or times")
    if sign is None:
        return Slice(text.strip(), column)
    if kind == "text":
        if sign not in ("==", "!="):
            raise DataError(f"{where}: `{column}` is text: compare it with == or !=")
        return Slice(text.strip(), column, sign, value.strip("\"'"))
    number = _time(value.strip("\"'")) if kind == "time" else _number(value)
    if math.isnan(number):
        raise DataError(f"{where}: `{column}` is a {kind}, and `{value}` is none")
    return Slice(text.strip(), column, sign, number)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def comparable(schema: Schema) -> list[str]:
    """Features that slices can be made of."""
    return [f.name for f in schema.features if f.kind in ("number", "text", "time")]


def worst(columns: dict[str, pa.Array], losses: np.ndarray, most: int) -> list[dict[str, Any]]:
    """The parts with the largest mean loss: values of text, quarters of numbers, and pairs of them (as in Chung et al., Slice
    Finder, 2019), where Welch's test holds the difference for real. losses: `[rows]`.

    Each: {slice, mask, rows, p}, the largest difference first."""
    single = [s for name, values in columns.items() for s in _parts(name, values)]
    judged = [(text, (column,), mask, *_welch(mask, losses)) for text, column, mask in single if _large(mask)]
    judged.sort(key=lambda j: -j[3])
    pairs = []
    for a, b in itertools.combinations(judged[:PAIRED], 2):
        mask = a[2] & b[2]
        if a[1] != b[1] and _large(mask):
            gap, p = _welch(mask, losses)
            if gap > max(a[3], b[3]):
                pairs.append((f"{a[0]} and {b[0]}", a[1] + b[1], mask, gap, p))
    every = judged + pairs
    bound = _bound([p for *_, p in every])
    chosen = sorted((j for j in every if j[4] <= bound and j[3] > 0), key=lambda j: -j[3])[:most]
    return [{"slice": text, "mask": mask, "rows": int(mask.sum()), "p": p} for text, _, mask, _, p in chosen]


def _large(mask: np.ndarray) -> bool:
    rows = int(mask.sum())
    return FEWEST <= rows <= len(mask) - FEWEST


def _parts(name: str, values: pa.Array) -> Iterator[tuple[str, str, np.ndarray]]:
    if pa.types.is_string(values.type):
        known, codes = _coded(values)
        counts = np.bincount(codes[codes >= 0], minlength=len(known))
        for i in np.argsort(-counts, kind="stable")[:MOST_VALUES]:
            yield f"{name} == {known[i]}", name, codes == i
        return
    numbers = values.to_numpy(zero_copy_only=False)
    there = numbers[np.isfinite(numbers)]
    edges = np.unique(np.quantile(there, [0, 0.25, 0.5, 0.75, 1])) if len(there) else []
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        last = i == len(edges) - 2
        mask = (numbers >= low) & ((numbers <= high) if last else (numbers < high))
        yield f"{low:.4g} <= {name} {'<=' if last else '<'} {high:.4g}", name, mask


def _welch(mask: np.ndarray, losses: np.ndarray) -> tuple[float, float]:
    """(how much larger the mean loss is inside than outside, the probability that chance makes it so)."""
    from scipy import stats

    inside, outside = losses[mask], losses[~mask]
    gap = float(inside.mean() - outside.mean())
    error = math.sqrt(inside.var(ddof=1) / len(inside) + outside.var(ddof=1) / len(outside))
    return gap, float(stats.norm.sf(gap / error)) if error else float(gap <= 0)


def _bound(found: list[float]) -> float:
    """The largest p that is no false discovery."""
    ordered = sorted(found)
    passed = [p for i, p in enumerate(ordered) if p <= LEVEL * (i + 1) / len(ordered)]
    return passed[-1] if passed else -1.0
