"""The schema: which columns a model reads, what each holds, and what it predicts.

It is inferred once from the source, travels in the bundle, and checks every request: training rows and request rows
become the same columns through two functions, `typed` and `parse_instances`.

Columns are, by kind:

    number   float64 `[rows]`, NaN where empty
    time     float64 `[rows]`, seconds since 1970 UTC, NaN where empty
    tensor   float32 `[rows, *shape]`
    text     Arrow strings, null where empty
    image    Arrow binary, an encoded image each
    list     Arrow lists of float64
"""

import base64
import contextlib
import hashlib
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt
from pydantic import BaseModel, ConfigDict

from ..cluster.storage import read_json
from ..errors import DataError, RequestError
from ..project import Data, Kind

Column = np.ndarray | pa.Array
Columns = dict[str, Any]
"""A `Column` a name, all with the same number of rows."""
MOST_CLASSES = 100
"""A target of numbers with more values than these is a regression, unless `data.task` says otherwise."""
PIXEL = np.float32(1 / 255)
LARGEST = float(np.finfo(np.float32).max)


class Feature(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    kind: Kind = "number"
    shape: tuple[int, ...] = ()
    """Of one row of a tensor."""
    optional: bool = False
    """Whether it may be empty."""

    def empty(self, rows: int) -> "Column":
        """A column of empty cells."""
        if self.kind in ("number", "time"):
            return np.full(rows, np.nan)
        return pa.nulls(rows, ARROW[self.kind])


class Task(BaseModel):
    """One of several targets."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    classes: tuple[str | int, ...] = ()
    scale: tuple[float, float] = (0.0, 1.0)


class Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    task: Literal["classification", "regression", "several"]
    target: str
    classes: tuple[str | int, ...] = ()
    """The labels in the order of the model's outputs (classification)."""
    scale: tuple[float, float] = (0.0, 1.0)
    """Mean and deviation of the training rows' target (regression)."""
    tasks: tuple[Task, ...] = ()
    """Of several targets each, in the order in which the model's outputs stand beside each other."""
    features: tuple[Feature, ...]
    inputs: dict[str, tuple[int, ...]] = {}
    """The model's inputs and their shapes, without the batch: what preprocessing makes of the features."""
    ids: tuple[str, ...] = ()
    """Inputs that are ids of words, and no quantities."""
    vocabulary: dict[str, int] = {}
    """How many ids there are, of each input of words."""

    @classmethod
    def read(cls, folder: Path) -> "Schema":
        """The schema of what `prepare` made, or of a bundle."""
        return cls.model_validate(read_json(folder / "schema.json"))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of a model with one input."""
        if len(self.inputs) != 1:
            raise ValueError(f"this schema has {len(self.inputs)} inputs: use schema.inputs ({self.inputs})")
        return next(iter(self.inputs.values()))

    @property
    def outputs(self) -> int:
        """Numbers that the model answers for a row: a probability per class, or one value; of several targets, all of these."""
        return sum(len(t.classes) or 1 for t in self.tasks) or len(self.classes) or 1

    @property
    def parts(self) -> "list[tuple[Schema, slice]]":
        """A schema for each target alone, and which of the outputs are its own."""
        if not self.tasks:
            return [(self, slice(0, self.outputs))]
        found, at = [], 0
        for task in self.tasks:
            kind = "classification" if task.classes else "regression"
            of_task = {"target": task.name, "classes": task.classes, "scale": task.scale, "tasks": ()}
            alone = self.model_copy(update={"task": kind, **of_task})
            found.append((alone, slice(at, at + alone.outputs)))
            at += alone.outputs
        return found

    def columns(self, table: pa.Table) -> Columns:
        """The features of a table that `typed` made, or of a test shard."""
        return {f.name: column_of(table.column(f.name), f.kind) for f in self.features}


def require(columns: list[str], names: list[str], where: str) -> None:
    """Raises DataError for the first of `columns` that is not among `names`."""
    for column in columns:
        if column not in names:
            raise DataError(f"{where}: has no column `{column}`: its columns are {listed(names)}")


def infer(head: pa.Table, data: Data, where: str) -> tuple[Feature, ...]:
    """The features of a source by the types and values of its first rows. Raises DataError, which names `where`."""
    weight = [data.weight] if data.weight else []
    targets = data.targets
    chosen = data.features or [n for n in head.column_names if n not in (*targets, PATH, *weight)]
    require([*targets, *weight, *chosen, *data.types], head.column_names, where)
    if both := [name for name in targets if name in chosen]:
        raise DataError(f"{where}: `{both[0]}` is the target, it cannot be a feature too")
    if not chosen:
        raise DataError(f"{where}: has no column but the target `{', '.join(targets)}`")
    return tuple(_feature(n, head.column(n), data.types.get(n), where) for n in chosen)


PATH = "path"
"""A column that sources of images add for people; no feature unless named."""


def _feature(name: str, column: pa.ChunkedArray, kind: Kind | None, where: str) -> Feature:
    kind = kind or _kind(column)
    if kind is None:
        advice = "say what it holds in data.types, or leave it out of data.features"
        raise DataError(f"{where}: column `{name}` is {column.type}: {advice}")
    if kind != "tensor":
        return Feature(name=name, kind=kind)
    if isinstance(column.type, pa.BaseExtensionType):
        return Feature(name=name, kind=kind, shape=tuple(column.type.shape))
    first = next((np.asarray(v.as_py()) for v in column if v.is_valid), None)
    if first is None or first.dtype == object:
        raise DataError(f"{where}: column `{name}`: its first row is no tensor")
    return Feature(name=name, kind=kind, shape=first.shape)


def _kind(column: pa.ChunkedArray) -> Kind | None:
    """What a column seems to hold; None for what cannot be used."""
    kind = kind_of(column.type)
    if kind == "list":
        lengths = pc.unique(pc.list_value_length(column).drop_null())  # pyright: ignore[reportAttributeAccessIssue]
        return "tensor" if len(lengths) == 1 else "list"
    return kind


def kind_of(kind: pa.DataType) -> Kind | None:
    """What an Arrow type holds; None for what cannot be used."""
    if isinstance(kind, pa.BaseExtensionType):
        return "tensor" if hasattr(kind, "shape") else None
    if _is_list(kind):
        inner = kind.value_type
        while _is_list(inner):
            inner = inner.value_type
        if not (pt.is_integer(inner) or pt.is_floating(inner)):
            return None
        return "list" if inner is kind.value_type or inner == kind.value_type else "tensor"
    tests: list[tuple[Any, Kind]] = [
        (pt.is_integer, "number"), (pt.is_floating, "number"), (pt.is_boolean, "number"), (pt.is_decimal, "number"),
        (pt.is_null, "number"), (pt.is_string, "text"), (pt.is_large_string, "text"), (pt.is_dictionary, "text"),
        (pt.is_timestamp, "time"), (pt.is_date, "time"), (pt.is_binary, "image"), (pt.is_large_binary, "image"),
    ]  # fmt: skip
    return next((found for test, found in tests if test(kind)), None)


def _is_list(kind: pa.DataType) -> bool:
    return pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind)


class Bad:
    """Which rows of a table are not usable, and the first reason of each."""

    def __init__(self, rows: int):
        self.mask = np.zeros(rows, bool)
        self.reasons: dict[int, tuple[str, str]] = {}

    def add(self, mask: np.ndarray, column: str, reason: str) -> None:
        for row in np.flatnonzero(mask & ~self.mask):
            self.reasons[int(row)] = (column, reason)
        self.mask |= mask


def typed(table: pa.Table, features: tuple[Feature, ...], bad: Bad) -> Columns:
    """A source's rows as columns of their kinds; what does not fit its kind is noted in `bad`, and NaN, null or zeros here.

    An optional feature that the table lacks is empty."""
    out: Columns = {}
    for feature in features:
        name = feature.name
        there = name in table.column_names or not feature.optional
        column = table.column(name) if there else pa.chunked_array([pa.nulls(len(table))])
        given_null = column.is_null().to_numpy()
        if feature.kind in ("number", "time"):
            values = numbers(column) if feature.kind == "number" else _times(column)
            bad.add(np.isnan(values) & ~given_null & ~_is_nan(column), name, f"not a {feature.kind}")
            bad.add(np.isinf(values), name, "infinite")
            bad.add(np.abs(values) > LARGEST, name, "too large for float32")
            empty = np.isnan(values)
        elif feature.kind == "tensor":
            values, unfit = _tensors(column, feature.shape)
            bad.add(unfit, name, f"not numbers in the shape {list(feature.shape)}")
            bad.add(np.asarray(~np.isfinite(values).reshape(len(values), -1).all(axis=1)), name, "holds NaN or infinity")
            empty = given_null
        else:
            values = _cast(column, {"text": pa.string(), "image": pa.binary(), "list": pa.list_(pa.float64())}[feature.kind])
            bad.add(values.is_null().to_numpy(zero_copy_only=False) & ~given_null, name, f"not a {feature.kind}")
            empty = given_null
        if not feature.optional:
            bad.add(empty, name, "empty")
        out[name] = values
    return out


def _is_nan(column: pa.ChunkedArray) -> np.ndarray:
    if not pt.is_floating(column.type):
        return np.zeros(len(column), bool)
    return pc.is_nan(column).fill_null(False).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]


def one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def numbers(column: pa.ChunkedArray) -> np.ndarray:
    """float64, NaN for what is empty or no number."""
    if pt.is_null(column.type):
        return np.full(len(column), np.nan)
    try:
        if pt.is_string(column.type) or pt.is_large_string(column.type):
            column = pc.utf8_trim_whitespace(column)  # pyright: ignore[reportAttributeAccessIssue]
        return pc.cast(column, pa.float64(), safe=False).to_numpy().astype(np.float64, copy=False)
    except (pa.ArrowException, ValueError):
        return np.array([_number(v) for v in column.to_pylist()], np.float64)


def _number(value: Any) -> float:
    try:
        return float(value) if value is not None else math.nan
    except (ValueError, TypeError):
        return math.nan


def _times(column: pa.ChunkedArray) -> np.ndarray:
    """Seconds since 1970 UTC, NaN for what is empty or no time."""
    kind = column.type
    if pt.is_integer(kind) or pt.is_floating(kind):
        return numbers(column)
    if pt.is_timestamp(kind) or pt.is_date(kind):
        micros = pc.cast(pc.cast(column, pa.timestamp("us"), safe=False), pa.int64())
        return pc.divide(pc.cast(micros, pa.float64()), 1e6).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
    return np.array([_time(v) for v in column.to_pylist()], np.float64)


def _time(value: Any) -> float:
    """Seconds of an ISO 8601 text (UTC unless it says another zone) or of a number; NaN where it is neither."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    try:
        when = datetime.fromisoformat(str(value).strip())
    except ValueError:
        return math.nan
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def _tensors(column: pa.ChunkedArray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(float32 `[rows, *shape]`, which rows do not have that shape)."""
    rows = len(column)
    if not column.null_count:
        try:
            return to_numpy(column).astype(np.float32, copy=False).reshape(rows, *shape), np.zeros(rows, bool)
        except (ValueError, TypeError, pa.ArrowInvalid):
            pass
    out, unfit = np.zeros((rows, *shape), np.float32), np.zeros(rows, bool)
    for i, value in enumerate(column):
        if value.is_valid:
            try:
                row = np.asarray(value.as_py(), np.float32)
                unfit[i] = row.shape != shape and row.size != math.prod(shape)
                if not unfit[i]:
                    out[i] = row.reshape(shape)
            except (ValueError, TypeError):
                unfit[i] = True
    return out, unfit


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    """Null for what cannot be cast."""
    try:
        return one_array(column.cast(kind) if column.type != kind else column)
    except (pa.ArrowException, NotImplementedError):
        made = []
        for value in column.to_pylist():
            try:
                made.append(pa.scalar(value, kind).as_py())
            except (pa.ArrowException, TypeError, ValueError):
                made.append(None)
        return pa.array(made, kind)


def number_target(column: pa.ChunkedArray, data: Data) -> bool:
    """Whether the target is numbers, by its first rows. Raises DataError for what cannot be predicted."""
    kind = column.type.value_type if pt.is_dictionary(column.type) else column.type
    if kind_of(kind) == "text":
        return data.task == "regression" or data.types.get(data.one) == "number"
    if kind_of(kind) != "number":
        raise DataError(f"target `{data.one}` is {kind}: numbers or text can be predicted")
    return data.types.get(data.one) != "text"


def targets(column: pa.ChunkedArray, data: Data, number: bool, bad: Bad) -> Column:
    """The target as it is: float64, or Arrow strings; an infinite one, or an empty one where all need one, is noted in `bad`."""
    empty = column.is_null().to_numpy() | (_is_nan(column) if number else False)
    if not data.unlabelled:
        bad.add(empty, data.one, "empty")
    if not number:
        return _cast(column, pa.string())
    values = numbers(column)
    bad.add(np.isnan(values) & ~empty, data.one, "not a number")
    bad.add(np.isinf(values), data.one, "infinite")
    bad.add(np.abs(values) > LARGEST, data.one, "too large for float32")
    return values


class Labels:
    """The distinct values of a target, over many tables: no more than can be classes."""

    MOST = 10_000

    def __init__(self, values: set | None = None, whole: bool = True):
        self.values, self.whole = values or set(), whole

    def add(self, column: Column) -> None:
        if isinstance(column, np.ndarray):
            column = column[np.isfinite(column)]
            self.whole = self.whole and bool((column == np.floor(column)).all())
            found = np.unique(column).tolist()
        else:
            found = column.drop_null().unique().to_pylist()
        if len(self.values) <= self.MOST:
            self.values.update(found[: self.MOST + 1])

    def classes(self, data: Data, where: str) -> tuple[str | int, ...]:
        """The labels in their order; none for a regression. Raises DataError for a target that is no use."""
        name = f"{where}: target `{data.one}`"
        if not self.values:
            raise DataError(f"{name} is empty in every row")
        text = any(isinstance(v, str) for v in self.values)
        regression = not text and (not self.whole or len(self.values) > MOST_CLASSES)
        task = data.task or ("regression" if regression else "classification")
        if len(self.values) < 2:
            raise DataError(f"{name} has one value only ({next(iter(self.values))!r}): there is nothing to tell apart")
        if task == "regression":
            return ()
        if not self.whole:
            raise DataError(f"{name} has fractions: classes are whole numbers or text")
        if len(self.values) > self.MOST:
            raise DataError(f"{name} has more than {self.MOST:,} values: too many to be classes")
        return tuple(sorted(v if text else int(v) for v in self.values))


def without_target(column: Column) -> np.ndarray:
    """Which rows have none: bool `[rows]`."""
    return np.isnan(column) if isinstance(column, np.ndarray) else column.is_null().to_numpy(zero_copy_only=False)


def class_index(column: Column, schema: Schema) -> np.ndarray:
    """A target as int64 class indices, or float32 values; -1 or NaN where there is none."""
    if schema.task == "regression":
        return np.asarray(column, np.float32)
    if isinstance(column, np.ndarray):
        found = np.searchsorted(np.array(schema.classes, np.float64), column)
        return np.where(np.isnan(column), -1, found).astype(np.int64)
    found = pc.index_in(column, pa.array(schema.classes))  # pyright: ignore[reportAttributeAccessIssue]
    return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def column_of(column: pa.ChunkedArray, kind: Kind) -> Column:
    return to_numpy(column) if kind in ("number", "time", "tensor") else one_array(column)


def to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """A column of numbers as an array `[rows, *shape]`, without a copy where the type allows one block.

    Ray's own tensor type and Arrow's differ in name only: both store a list of numbers and know the shape.
    """
    array = one_array(column)
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        shape = tuple(kind.shape)
        flat = array.storage.flatten() if len(array) else array.storage.values
        return flat.to_numpy(zero_copy_only=False).reshape(len(array), *shape)
    if pt.is_fixed_size_list(kind):
        return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), kind.list_size)
    if pt.is_list(kind) or pt.is_large_list(kind):
        if pt.is_list(kind.value_type) or pt.is_large_list(kind.value_type):
            return np.array(array.to_pylist())
        return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), -1)
    return array.to_numpy(zero_copy_only=False)


def arrow_column(values: Column) -> pa.Array:
    """A column as Arrow: `[rows, …]` numbers as fixed-shape tensors."""
    if not isinstance(values, np.ndarray) or values.ndim == 1:
        return values if isinstance(values, pa.Array) else pa.array(values)
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))


def prediction_columns(outputs: np.ndarray, schema: Schema, left_out: np.ndarray | None = None) -> dict[str, pa.Array]:
    """The model's outputs `[rows, schema.outputs]` as Arrow columns: `prediction`, and the probabilities of the classes.

    left_out: rows without a prediction, `[rows]` booleans."""
    if schema.tasks:
        named = {a.target: prediction_columns(outputs[:, of], a, left_out) for a, of in schema.parts}
        return {f"{target} {name}": values for target, found in named.items() for name, values in found.items()}
    if not schema.classes:
        return {"prediction": pa.array(np.ascontiguousarray(outputs[:, 0]), mask=left_out)}
    chosen = pa.array(outputs.argmax(axis=1), mask=left_out)
    return {"prediction": pa.array(schema.classes).take(chosen), "probabilities": arrow_column(outputs)}


def as_fed(values: np.ndarray) -> np.ndarray:
    """An input as the model gets it: float32, the bytes of images from 0 to 1."""
    return values.astype(np.float32) * PIXEL if values.dtype == np.uint8 else values.astype(np.float32, copy=False)


def parse_instances(instances: Any, schema: Schema, exact: bool = True) -> Columns:
    """Rows of a request, as JSON gave them, to columns.

    A row is `{feature: value}`; where there is one feature only, the value alone will do. An image is
    `{"b64": "…"}`, a time is ISO 8601 or seconds since 1970; what is optional may be null or left out. exact: whether a
    boolean may lie among the numbers, which takes a look at each.
    Raises RequestError, whose text names features and shapes but never repeats a value.
    """
    if not isinstance(instances, list) or not instances:
        raise RequestError('"instances" must be a list of at least one row')
    names = [f.name for f in schema.features]
    if len(names) == 1 and not isinstance(instances[0], dict):
        return {names[0]: _parse_column(instances, schema.features[0], exact)}
    optional = {f.name for f in schema.features if f.optional}
    rows = []
    for i, given in enumerate(instances):
        alone = len(names) == 1 and not (isinstance(given, dict) and given.keys() != {"b64"})
        row = {names[0]: given} if alone else given
        if not isinstance(row, dict):
            raise RequestError(f"row {i}: must be an object with {listed(names)}")
        if row.keys() != set(names):
            missing, extra = [n for n in names if n not in row and n not in optional], [n for n in row if n not in names]
            if missing or extra:
                text = f"lacks {listed(missing)}" if missing else f"has {len(extra)} unknown features"
                raise RequestError(f"row {i}: {text}; the features are {listed(names)}")
        rows.append(row)
    return {f.name: _parse_column([row.get(f.name) for row in rows], f, exact) for f in schema.features}


def parse_columns(given: Any, schema: Schema, exact: bool = True) -> Columns:
    """The same for columns: `{feature: [value, …]}`, or one list where there is one feature. Raises RequestError."""
    names = [f.name for f in schema.features]
    if len(names) == 1 and isinstance(given, list):
        given = {names[0]: given}
    if not isinstance(given, dict) or not all(isinstance(v, list) for v in given.values()):
        raise RequestError(f'"inputs" must be an object with a list for each of {listed(names)}')
    missing = [f.name for f in schema.features if f.name not in given and not f.optional]
    if extra := [n for n in given if n not in names]:
        raise RequestError(f'"inputs" has {len(extra)} unknown features; the features are {listed(names)}')
    if missing:
        raise RequestError(f'"inputs" lacks {listed(missing)}; the features are {listed(names)}')
    counts = {len(v) for v in given.values()}
    if len(counts) != 1 or counts == {0}:
        raise RequestError('the columns of "inputs" must have the same number of rows, at least one')
    (rows,) = counts
    return {f.name: _parse_column(given[f.name], f, exact) if f.name in given else f.empty(rows) for f in schema.features}


def _parse_column(values: list[Any], feature: Feature, exact: bool) -> Column:
    if feature.kind in ("number", "tensor") and not exact:
        plain = _plain_numbers(values, feature)
        if plain is not None:
            return plain
    parsed = [_parse(value, feature, i) for i, value in enumerate(values)]
    if feature.kind in ("number", "time"):
        return np.array(parsed, np.float64)
    return np.stack(parsed) if feature.kind == "tensor" else pa.array(parsed, ARROW[feature.kind])


ARROW = {"text": pa.string(), "image": pa.binary(), "list": pa.list_(pa.float64())}


def _plain_numbers(values: list[Any], feature: Feature) -> np.ndarray | None:
    """All rows at once, where they are numbers of the right shape; None where each must be looked at."""
    try:
        found = np.asarray(values)
    except (ValueError, OverflowError):
        return None
    if found.dtype.kind not in "iuf" or found.shape[1:] != feature.shape:
        return None
    if not -LARGEST <= found.min() <= found.max() <= LARGEST:  # not of a NaN either
        return None
    return found.astype(np.float64 if feature.kind == "number" else np.float32)


def column_from_array(values: np.ndarray, feature: Feature) -> Column:
    """Numbers `[rows]`, `[rows, *shape]` of a tensor or `[rows, length]` of lists, of any number type, to a column.

    Raises RequestError."""
    with np.errstate(over="ignore"):
        found = values.astype(np.float32 if feature.kind == "tensor" else np.float64)
    fine = np.abs(found) <= LARGEST
    if feature.optional and feature.kind in ("number", "time"):
        fine |= np.isnan(found)
    if not fine.all():
        row = int(np.argmin(fine.reshape(len(fine), -1).all(axis=1)))
        raise RequestError(f"row {row}: `{feature.name}` holds NaN, infinity or a number too large for float32")
    if feature.kind != "list":
        return found
    offsets = np.arange(len(found) + 1, dtype=np.int32) * found.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(found.reshape(-1)))


def column_from_bytes(values: list[bytes], feature: Feature, base64_images: bool = False) -> Column:
    """Texts in UTF-8, or encoded images, to a column. Raises RequestError."""
    if feature.kind == "image":
        try:
            return pa.array([base64.b64decode(v, validate=True) for v in values] if base64_images else values, pa.binary())
        except ValueError:
            raise RequestError(f"`{feature.name}` must be base64") from None
    try:
        return pa.array([v.decode() for v in values], pa.string())
    except UnicodeDecodeError:
        raise RequestError(f"`{feature.name}` must be UTF-8") from None


def _parse(value: Any, feature: Feature, row: int) -> Any:
    if value is None and feature.optional:
        return math.nan if feature.kind in ("number", "time") else None
    if feature.kind == "tensor":
        return _tensor(value, feature, row)
    found = None
    if feature.kind == "number" and isinstance(value, int | float) and abs(value) <= LARGEST:
        found = float(value)
    elif feature.kind == "time" and math.isfinite(seconds := _time(value)):
        found = seconds
    elif feature.kind == "text" and isinstance(value, str):
        found = value
    elif feature.kind == "list" and isinstance(value, list) and _only_numbers(value, 1):
        found = [float(v) for v in value]
    elif feature.kind == "image" and isinstance(value, dict):
        with contextlib.suppress(KeyError, TypeError, ValueError):  # binascii.Error is a ValueError
            found = base64.b64decode(value["b64"], validate=True)
    if found is None:
        raise RequestError(f"row {row}: `{feature.name}` must be {MUST_BE[feature.kind]}")
    return found


MUST_BE = {
    "number": "a finite number that float32 can hold",
    "time": "a time: ISO 8601 text, or seconds since 1970",
    "text": "text",
    "list": "a list of finite numbers",
    "image": 'an encoded image, as {"b64": "…"}',
}


def _tensor(value: Any, feature: Feature, row: int) -> np.ndarray:
    if not _only_numbers(value, len(feature.shape)):
        raise RequestError(f"row {row}: `{feature.name}` must hold finite numbers in the shape {list(feature.shape)}")
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(value, dtype=np.float32)
    except (ValueError, OverflowError):
        raise RequestError(f"row {row}: `{feature.name}` is ragged; its shape is {list(feature.shape)}") from None
    if array.shape != feature.shape:
        raise RequestError(f"row {row}: `{feature.name}` has the shape {list(array.shape)}; its shape is {list(feature.shape)}")
    if not np.isfinite(array).all():
        raise RequestError(f"row {row}: `{feature.name}` holds a number too large for float32")
    return array


def to_instances(columns: Columns, schema: Schema) -> list[dict[str, Any]]:
    """The inverse of `parse_instances`: rows that JSON can hold."""
    made = {}
    for feature in schema.features:
        values = columns[feature.name].tolist()
        if feature.kind in ("number", "time"):
            values = [v if math.isfinite(v) else None for v in values]
        elif feature.kind == "image":
            values = [{"b64": base64.b64encode(v).decode()} for v in values]
        made[feature.name] = values
    return [dict(zip(made, row, strict=True)) for row in zip(*made.values(), strict=True)]


def _only_numbers(value: Any, depth: int) -> bool:
    """Whether a value is finite numbers in lists that are nested no deeper than `depth`."""
    if isinstance(value, list):
        return depth > 0 and all(_only_numbers(v, depth - 1) for v in value)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def hash64(content: bytes | pa.Buffer, salt: bytes = b"") -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, salt=salt).digest(), "big")


def listed(names: list[str]) -> str:
    shown = ", ".join(f"`{n}`" for n in names[:12])
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "")
