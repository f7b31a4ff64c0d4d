"""The user's model: `def build(schema, hp) -> keras.Model`, imported, built and held against the schema.

Every mistake in it becomes a ModelError that names the user's own file and line.
"""

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..cluster.runtime import project_imports
from ..datasets.schema import Schema
from ..errors import ModelError
from ..project import Model, Train

if TYPE_CHECKING:
    import keras


def build(model: Model, schema: Schema, folder: Path) -> "keras.Model":
    """The project's model for `schema`, with weights of its own drawing. Raises ModelError."""
    import keras

    module_name, function_name = model.build.split(":")
    file = folder / f"{module_name}.py"
    if not file.is_file():
        raise ModelError(f"{file}: not found: model.build is `{model.build}`")
    project_imports(folder)
    spec = importlib.util.spec_from_file_location(f"heliograph_project_{module_name}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ModelError(f"{_place(error, file)}: does not import: {_what(error)}") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ModelError(f"{file}: has no function `{function_name}`: model.build is `{model.build}`")
    try:
        built = function(schema, SimpleNamespace(**model.hp))
    except Exception as error:
        raise ModelError(f"{_place(error, file)}: {function_name} failed: {_what(error)}") from None
    if not isinstance(built, keras.Model):
        raise ModelError(f"{file}: {function_name} returned {type(built).__name__}, not a keras.Model")
    _check_shapes(built, schema, f"{file}: {function_name}")
    return built


def compile_parts(train: Train, schema: Schema) -> tuple[Callable[..., Any], "keras.optimizers.Optimizer"]:
    """The loss (a value a row) and the optimizer of `train`. Raises ModelError for a name or parameter Keras does not know."""
    import keras

    name = train.loss or ("sparse_categorical_crossentropy" if schema.classes else "mean_squared_error")
    try:
        loss: Any = keras.losses.get(name)  # a function gives a value a row as it is
        if isinstance(loss, keras.losses.Loss):
            loss.reduction = "none"
    except (ValueError, TypeError):
        raise ModelError(f"train.loss: `{name}` is not a Keras loss") from None
    parameters = train.optimizer.model_dump(exclude={"name"})
    try:
        optimizer: Any = keras.optimizers.get({"class_name": train.optimizer.name, "config": parameters})
    except (ValueError, TypeError) as error:
        raise ModelError(f"train.optimizer: `{train.optimizer.name}` with {parameters}: {_what(error)}") from None
    return loss, optimizer


def _check_shapes(model: "keras.Model", schema: Schema, where: str) -> None:
    import numpy as np

    try:
        inputs, outputs = model.inputs, model.outputs
    except AttributeError:
        raise ModelError(f"{where} returned a model without known inputs: build it with keras.Input") from None
    expected = schema.inputs
    if len(inputs) != len(expected):
        raise ModelError(f"{where}: the model has {len(inputs)} inputs, the schema {len(expected)}: {_shapes(expected)}")
    for tensor in inputs:
        name = tensor.name if len(expected) > 1 else next(iter(expected))
        if name not in expected:
            raise ModelError(f"{where}: input `{tensor.name}`: the schema's inputs are {_shapes(expected)}")
        if tuple(tensor.shape[1:]) != expected[name]:
            raise ModelError(f"{where}: input `{name}` has the shape {tuple(tensor.shape[1:])}, the data {expected[name]}")
    if len(outputs) != 1 or tuple(outputs[0].shape[1:]) != (schema.outputs,):
        found = ", ".join(str(tuple(o.shape[1:])) for o in outputs)
        per = f"a probability for each of {len(schema.classes)} classes" if schema.classes else "one value"
        raise ModelError(f"{where}: the model answers {found} for a row, ({schema.outputs},) is needed: {per}")
    # Called once for every task: it is also what lets Keras export the model.
    probe = {name: np.zeros((1, *shape), np.float32) for name, shape in expected.items()}
    answer = model(probe if len(probe) > 1 else next(iter(probe.values())), training=False)
    total = float(np.sum(answer))
    if schema.classes and abs(total - 1) > 1e-3:
        raise ModelError(f"{where}: the outputs add up to {total:.3g}, not to 1: end with a softmax")


def _shapes(inputs: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"`{n}` {s}" for n, s in inputs.items())


def _place(error: Exception, file: Path) -> str:
    """`model.py:12`: the last line of the project's own code that the error came through."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    own = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == file.parent]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else str(file)


def _what(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__
