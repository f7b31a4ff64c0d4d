"""Tests of what a model does, written in a few lines of the project file (`evaluate.behaviour`): Ribeiro et al., Beyond accuracy:
behavioral testing of NLP models with CheckList (2020), for any features."""

import operator
import re
from typing import Any

import numpy as np
import pyarrow as pa

from ..datasets.schema import Columns, Feature, Schema, parse_instances
from ..errors import DataError, RequestError
from ..project import FILE
from ..settings import hint
from ..trust import Behaviour
from .engine import Engine
from .slices import parsed

CHANGE = r"(?P<sign>[+*-]|noise) *(?P<by>\d+(?:\.\d+)?(?:e-?\d+)?)"
BOUND = r"(?P<sign>>=|<=) *(?P<value>-?\d+(?:\.\d+)?)"
STAYS = 0.01
"""Of the spread of all answers: how far a number may move that stays."""
SLACK = 1e-6


def require_fits(tests: list[Behaviour], schema: Schema) -> None:
    """Raises DataError for a test that speaks of columns, classes or values that are not there."""
    for i, test in enumerate(tests):
        where = f"{FILE}: evaluate.behaviour[{i}]"
        if schema.tasks:
            raise DataError(f"{where}: a model of several targets has no tests of behaviour yet: leave it out")
        known = {f.name: f for f in schema.features}
        for column, change in test.change.items():
            if column not in known:
                raise DataError(f"{where}.change: no feature is called `{column}`: {hint(column, list(known))}")
            _require_change(known[column], change, f"{where}.change.{column}")
        if test.where:
            parsed([test.where], schema, f"evaluate.behaviour[{i}].where")
        names = [str(c) for c in schema.classes]
        if test.test == "direction" and names and test.of not in names:
            raise DataError(f"{where}.of: found {test.of!r}: name the class whose probability is meant: {', '.join(names)}")
        if test.test == "minimum":
            if names and test.expect not in names:
                raise DataError(f"{where}.expect: `{test.expect}` is no class: there are {', '.join(names)}")
            if not names and not re.fullmatch(BOUND, test.expect or ""):
                raise DataError(f"{where}.expect: found {test.expect!r}: a number is expected `>= 3` or `<= 3`")
            try:
                parse_instances(test.rows, schema)
            except RequestError as error:
                raise DataError(f"{where}.rows: {error}") from None


def _require_change(feature: Feature, change: Any, where: str) -> None:
    relative = isinstance(change, str) and re.fullmatch(CHANGE, change)
    if feature.kind in ("number", "time", "tensor"):
        plain = isinstance(change, (int, float)) and feature.kind != "tensor"
        if not (relative or plain):
            raise DataError(f"{where}: found {change!r}: a {feature.kind} becomes a number, `+ 5`, `* 1.1` or `noise 0.05`")
    elif feature.kind != "text" or not isinstance(change, str):
        raise DataError(f"{where}: found {change!r}: of a column of {feature.kind}, only text can become another text")


def run(tests: list[Behaviour], engine: Engine, columns: Columns, seed: int = 0) -> list[dict[str, Any]]:
    """columns: raw test rows. Each: {name, test, rows, passed (share), ok}; no row to try it on is not ok."""
    return [_one(test, engine, columns, seed) for test in tests]


def _one(test: Behaviour, engine: Engine, columns: Columns, seed: int) -> dict[str, Any]:
    schema = engine.schema
    if test.test == "minimum":
        outputs = engine.predict(parse_instances(test.rows, schema))
        passed = _as_expected(outputs, test.expect or "", schema)
    else:
        if test.where:
            mask = next(parsed([test.where], schema, "")[0].masks(columns))[1]
            columns = {n: v[mask] if isinstance(v, np.ndarray) else v.filter(pa.array(mask)) for n, v in columns.items()}
        rows = len(next(iter(columns.values())))
        passed = _changed(test, engine, columns, seed) if rows else np.empty(0, bool)
    share = float(passed.mean()) if len(passed) else 0.0
    return {"name": test.name, "test": test.test, "rows": len(passed), "passed": share, "ok": share >= test.share}


def _as_expected(outputs: np.ndarray, expect: str, schema: Schema) -> np.ndarray:
    if schema.classes:
        return outputs.argmax(axis=1) == [str(c) for c in schema.classes].index(expect)
    found = re.fullmatch(BOUND, expect)
    assert found
    return (operator.ge if found["sign"] == ">=" else operator.le)(outputs[:, 0], float(found["value"]))


def _changed(test: Behaviour, engine: Engine, columns: Columns, seed: int) -> np.ndarray:
    schema = engine.schema
    other = dict(columns)
    for column, change in test.change.items():
        other[column] = _moved(columns[column], change, np.random.default_rng(seed))
    before, after = engine.predict(columns), engine.predict(other)
    if test.test == "invariance":
        if schema.classes:
            return before.argmax(axis=1) == after.argmax(axis=1)
        return np.abs(after - before)[:, 0] <= STAYS * np.ptp(before)
    of = [str(c) for c in schema.classes].index(test.of or "") if schema.classes else 0
    gap = after[:, of] - before[:, of]
    return gap >= -SLACK if test.expect == "up" else gap <= SLACK


def _moved(values: Any, change: Any, rng: np.random.Generator) -> Any:
    found = re.fullmatch(CHANGE, change) if isinstance(change, str) else None
    if not isinstance(values, np.ndarray):
        return pa.array([change] * len(values), values.type)
    if found is None:
        return np.full_like(values, change)
    by = float(found["by"])
    match found["sign"]:
        case "+":
            moved = values + by
        case "-":
            moved = values - by
        case "*":
            moved = values * by
        case _:
            moved = values + rng.uniform(-by, by, values.shape) * (np.nanmax(values) - np.nanmin(values))
    return moved.astype(values.dtype)
