"""The schema: which columns a model reads, of what shape, and what it predicts.

It is inferred once from the source, travels in the bundle, and checks every request: training rows and request rows
become arrays through the same two functions, `arrays` and `parse_instances`.
"""

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt
from pydantic import BaseModel, ConfigDict

from ..cluster.storage import read_json
from ..errors import DataError, RequestError
from ..project import Data

MOST_CLASSES = 100
"""A target of numbers with more values than these is a regression, unless `data.task` says otherwise."""


class Feature(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    shape: tuple[int, ...]
    """Of one row: `()` for a number, `(8, 8)` for an image of 64 numbers."""


class Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    task: Literal["classification", "regression"]
    target: str
    classes: tuple[str | int, ...] = ()
    """The labels in the order of the model's outputs (classification)."""
    features: tuple[Feature, ...]

    @classmethod
    def read(cls, folder: Path) -> "Schema":
        """The schema of what `prepare` made, or of a bundle."""
        return cls.model_validate(read_json(folder / "schema.json"))

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """The model's inputs and their shapes, without the batch: a tensor column is an input of its own; all numbers
        together are the input `features`."""
        numbers = [f for f in self.features if f.shape == ()]
        tensors = {f.name: f.shape for f in self.features if f.shape != ()}
        return ({"features": (len(numbers),)} if numbers else {}) | tensors

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of a model with one input."""
        if len(self.inputs) != 1:
            raise ValueError(f"this schema has {len(self.inputs)} inputs: use schema.inputs ({self.inputs})")
        return next(iter(self.inputs.values()))

    @property
    def outputs(self) -> int:
        """Numbers that the model answers for a row: a probability per class, or one value."""
        return len(self.classes) or 1


def require(columns: list[str], names: list[str], where: str) -> None:
    """Raises DataError for the first of `columns` that is not among `names`."""
    for column in columns:
        if column not in names:
            raise DataError(f"{where}: has no column `{column}`: its columns are {_listed(names)}")


def infer(head: pa.Table, column: pa.ChunkedArray, data: Data, where: str) -> Schema:
    """The schema of a source: the features by their types in its first rows, the target by the whole of its column.

    where: names the source in errors. Raises DataError.
    """
    target = data.target
    chosen = data.features or [name for name in head.column_names if name != target]
    if target in chosen:
        raise DataError(f"{where}: `{target}` is the target, it cannot be a feature too")
    if not chosen:
        raise DataError(f"{where}: has no column but the target `{target}`")
    described = tuple(Feature(name=n, shape=_shape(head.column(n), n, where)) for n in chosen)
    classes = _classes(column, data, where)
    return Schema(task="classification" if classes else "regression", target=target, classes=classes, features=described)


def _classes(column: pa.ChunkedArray, data: Data, where: str) -> tuple[str | int, ...]:
    """The labels of the target, in order; none for a regression."""
    name, kind = f"{where}: target `{data.target}`", column.type
    fractional = pt.is_floating(kind)
    if column.null_count:
        raise DataError(f"{name} is empty in {column.null_count} rows: drop or fill them")
    if not (fractional or pt.is_integer(kind) or pt.is_boolean(kind) or pt.is_string(kind) or pt.is_large_string(kind)):
        raise DataError(f"{name} is {kind}: numbers or text can be predicted")
    values = column.unique().to_pylist()
    if fractional and not all(map(math.isfinite, values)):
        raise DataError(f"{name} holds NaN or infinity: drop or fill those rows")
    numbers = fractional or pt.is_integer(kind)
    whole = not fractional or all(v == int(v) for v in values)
    task = data.task or ("regression" if numbers and (not whole or len(values) > MOST_CLASSES) else "classification")
    if task == "regression":
        if not numbers:
            raise DataError(f"{name} is {kind}: a regression needs numbers")
        return ()
    if not whole:
        raise DataError(f"{name} has fractions: classes are whole numbers or text")
    if len(values) < 2:
        raise DataError(f"{name} has one class only ({values[0]!r}): there is nothing to tell apart")
    return tuple(sorted(v if isinstance(v, str) else int(v) for v in values))


def arrays(table: pa.Table, schema: Schema) -> dict[str, np.ndarray]:
    """The features as float32 arrays `[rows, *shape]`, by name. Raises DataError for empty cells and NaN."""
    out = {}
    for feature in schema.features:
        try:
            values = to_numpy(table.column(feature.name)).astype(np.float32)
            out[feature.name] = values.reshape(len(table), *feature.shape)
        except (ValueError, TypeError, pa.ArrowInvalid):
            raise DataError(
                f"column `{feature.name}`: not every row has the shape {list(feature.shape)} of its first row"
            ) from None
        bad = len(table) - int(np.isfinite(out[feature.name]).reshape(len(table), -1).all(axis=1).sum())
        if bad:
            raise DataError(f"column `{feature.name}`: empty, NaN or infinite in {bad} rows: drop or fill them")
    return out


def labels(table: pa.Table, schema: Schema) -> np.ndarray:
    """The target as int64 class indices, or float32 values."""
    column = table.column(schema.target)
    if schema.task == "regression":
        return column.to_numpy().astype(np.float32)
    if not isinstance(schema.classes[0], str):
        column = pc.cast(column, pa.int64())
    order = pa.array(schema.classes)
    return pc.index_in(column, order).to_numpy().astype(np.int64)  # pyright: ignore[reportAttributeAccessIssue]


def to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """A column as an array `[rows, *shape]`, without a copy where the type allows one block.

    Ray's own tensor type and Arrow's differ in name only: both store a list of numbers and know the shape.
    """
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        shape = tuple(kind.shape)
        flat = array.storage.flatten() if len(array) else array.storage.values
        return flat.to_numpy(zero_copy_only=False).reshape(len(array), *shape)
    if pt.is_fixed_size_list(kind):
        return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), kind.list_size)
    if pt.is_list(kind) or pt.is_large_list(kind):
        return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), -1)
    return array.to_numpy(zero_copy_only=False)


def tensor_column(values: np.ndarray) -> pa.Array:
    """`[rows, …]` as an Arrow column: numbers as they are, the rest as fixed-shape tensors."""
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))


def parse_instances(instances: Any, schema: Schema) -> dict[str, np.ndarray]:
    """Rows of a request, as JSON gave them, to float32 arrays `[rows, *shape]` by feature.

    A row is `{feature: value}`; where there is one feature only, the value alone will do.
    Raises RequestError, whose text names features and shapes but never repeats a value.
    """
    if not isinstance(instances, list) or not instances:
        raise RequestError('"instances" must be a list of at least one row')
    names = [f.name for f in schema.features]
    rows = []
    for i, given in enumerate(instances):
        row = {names[0]: given} if len(names) == 1 and not isinstance(given, dict) else given
        if not isinstance(row, dict):
            raise RequestError(f"row {i}: must be an object with {_listed(names)}")
        if row.keys() != set(names):
            missing, extra = [n for n in names if n not in row], [n for n in row if n not in names]
            text = f"lacks {_listed(missing)}" if missing else f"has {len(extra)} unknown features"
            raise RequestError(f"row {i}: {text}; the features are {_listed(names)}")
        rows.append(row)
    out = {}
    for feature in schema.features:
        values = []
        for i, row in enumerate(rows):
            values.append(_number_array(row[feature.name], feature, i))
        out[feature.name] = np.stack(values)
    return out


def _number_array(value: Any, feature: Feature, row: int) -> np.ndarray:
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


def _only_numbers(value: Any, depth: int) -> bool:
    """Whether a value is finite numbers in lists that are nested no deeper than `depth`."""
    if isinstance(value, list):
        return depth > 0 and all(_only_numbers(v, depth - 1) for v in value)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shape(column: pa.ChunkedArray, name: str, where: str) -> tuple[int, ...]:
    """The shape of one row of a column. Raises DataError where it holds no numbers."""
    kind = column.type
    if pt.is_integer(kind) or pt.is_floating(kind) or pt.is_boolean(kind):
        return ()
    if isinstance(kind, pa.BaseExtensionType) and hasattr(kind, "shape"):
        return tuple(kind.shape)
    if pt.is_fixed_size_list(kind) and _is_number(kind.value_type):
        return (kind.list_size,)
    if (pt.is_list(kind) or pt.is_large_list(kind)) and _is_number(kind.value_type):
        first = next((v for v in column if v.is_valid), None)
        return (len(first),) if first is not None else (0,)
    raise DataError(f"{where}: column `{name}` is {kind}: features are numbers so far; name the usable ones in data.features")


def _is_number(kind: pa.DataType) -> bool:
    return pt.is_integer(kind) or pt.is_floating(kind)


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"`{n}`" for n in names[:12])
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "")
