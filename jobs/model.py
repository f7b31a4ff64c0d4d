"""The user's model: `def build(schema, hp) -> keras.Model`, imported, built and held against the schema.

Every mistake in it becomes a ModelError that names the user's own file and line.
"""

import functools
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..cluster.runtime import project_imports
from ..datasets.schema import Schema
from ..datasets.shards import Manifest
from ..errors import ModelError
from ..project import Model, Task, Train
from .tasks import Losses, Meter, joined

if TYPE_CHECKING:
    import keras
    import tensorflow as tf


def build(model: Model, schema: Schema, folder: Path) -> "keras.Model":
    """The project's model for `schema`, with weights of its own drawing, or those that it starts from. Raises ModelError."""
    if model.start:
        from .transfer import started

        return started(model.start, schema)
    if model.preset:
        from .presets import preset

        built, where = preset(model.preset, schema, model.hp), f"the preset `{model.preset}`"
    else:
        built, where = _own(model, schema, folder)
    if schema.tasks:
        built = joined(built, schema, where)
    check_shapes(built, schema, where)
    return built


def _own(model: Model, schema: Schema, folder: Path) -> tuple["keras.Model", str]:
    """What the project's function returns, and where that is."""
    import keras

    module_name, function_name = model.build.split(":")
    file = folder / f"{module_name}.py"
    if not file.is_file():
        raise ModelError(f"{file}: not found: model.build is `{model.build}`; a ready-made model: `model: {{preset: tabular}}`")
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
    return built, f"{file}: {function_name}"


@dataclass(frozen=True)
class Parts:
    """What a training needs besides the model."""

    loss: Callable[[Any, Any], Any]
    """(target, outputs) -> a loss a row, `[rows]`; weights of classes and smoothing of labels are in it."""
    optimizer: "keras.optimizers.Optimizer"
    meters: Callable[[], list[Any]]
    """Keras metrics, the mean loss first, made anew by each call."""
    target: "tf.TensorSpec"
    """Of the rows' targets."""


def compile_parts(train: Train, schema: Schema, manifest: Manifest | None = None, schedule: Any = None) -> Parts:
    """Loss, optimizer and metrics of `train`, each tried on an output of the schema's shape.

    manifest: of the data, for balanced weights of classes and the shares of rows that have a target. schedule: the learning rate
    (default: the optimizer's).
    Raises ModelError for a name or parameter Keras does not know, and for a loss or a metric that does not fit the output.
    """
    import keras

    parameters = train.optimizer.model_dump(exclude={"name"})
    if schedule is not None:
        parameters["learning_rate"] = schedule
    if train.ema:
        parameters |= {"use_ema": True, "ema_momentum": train.ema}
    try:
        optimizer: Any = keras.optimizers.get({"class_name": train.optimizer.name, "config": parameters})
    except (ValueError, TypeError) as error:
        given = train.optimizer.model_dump(exclude={"name"})
        raise ModelError(f"train.optimizer: `{train.optimizer.name}` with {given}: {_what(error)}") from None
    class_rows = manifest.class_rows if manifest else []
    alone = [(train_of(train, part.target) if schema.tasks else train, part) for part, _ in schema.parts]
    for settings, part in alone:
        one = Parts(_loss(settings, part, class_rows), optimizer, functools.partial(_meters, settings, part), _target(part))
        _try_on(one, settings, part)
        if not schema.tasks:
            return one
    rows = max(1, manifest.rows("train")) if manifest else 1
    losses = Losses(
        schema, [_loss(settings, part, ()) for settings, part in alone],
        [train.tasks.get(part.target, Task()).weight for _, part in alone],
        [1 - lacking / rows for lacking in manifest.lacking] if manifest else [], train.balance == "uncertainty",
    )  # fmt: skip

    def meters() -> list[Any]:
        own = [Meter(m, i, schema) for i, (settings, part) in enumerate(alone) for m in _meters(settings, part)[1:]]
        return [keras.metrics.Mean("loss"), *own]

    return Parts(losses, optimizer, meters, _target(schema))


def train_of(train: Train, target: str) -> Train:
    """As one of several targets trains."""
    task = train.tasks.get(target, Task())
    return train.model_copy(update={"loss": task.loss, "metrics": task.metrics})


def _meters(train: Train, schema: Schema) -> list[Any]:
    import keras

    names = train.metrics if train.metrics is not None else ["accuracy" if schema.classes else "mae"]
    return [keras.metrics.Mean("loss"), *(_meter(name, schema) for name in names)]


def _target(schema: Schema) -> "tf.TensorSpec":
    import tensorflow as tf

    shape = (None, len(schema.tasks)) if schema.tasks else (None,)
    return tf.TensorSpec(shape, tf.int64 if schema.classes else tf.float32)


def _loss(train: Train, schema: Schema, class_rows: Sequence[int]) -> Callable[[Any, Any], Any]:
    import keras
    import tensorflow as tf

    name = train.loss or ("sparse_categorical_crossentropy" if schema.classes else "mean_squared_error")
    try:
        loss: Any = keras.losses.get(name)  # a function gives a value a row as it is
        if isinstance(loss, keras.losses.Loss):
            loss.reduction = "none"
    except (ValueError, TypeError):
        raise ModelError(f"train.loss: `{name}` is not a Keras loss") from None
    if not schema.classes and (train.label_smoothing or train.class_weights):
        raise ModelError("train: label_smoothing and class_weights need classes, and this target is a number")
    if train.label_smoothing and name != "sparse_categorical_crossentropy":
        raise ModelError("train.label_smoothing: needs the default loss, sparse_categorical_crossentropy")
    weights = tf.constant(_class_weights(train, schema, class_rows), tf.float32)
    classes = len(schema.classes)

    def per_row(target: Any, outputs: Any) -> Any:
        if train.label_smoothing:
            smooth = train.label_smoothing
            rows = keras.losses.categorical_crossentropy(tf.one_hot(target, classes), outputs, label_smoothing=smooth)
        else:
            rows = loss(target, outputs)
        return rows * tf.gather(weights, target) if train.class_weights else rows

    return per_row


def _class_weights(train: Train, schema: Schema, class_rows: Sequence[int]) -> list[float]:
    """A weight a class; balanced ones are rows / (classes × rows of the class), as scikit-learn has it."""
    given = train.class_weights
    if given is None or not schema.classes:
        return [1.0]
    if given == "balanced":
        return [sum(class_rows) / (len(class_rows) * max(1, n)) for n in class_rows] or [1.0] * len(schema.classes)
    names = [str(c) for c in schema.classes]
    if unknown := given.keys() - set(names):
        raise ModelError(f"train.class_weights: `{min(unknown)}` is no class: the classes are {', '.join(names)}")
    return [given.get(name, 1.0) for name in names]


def _meter(name: str, schema: Schema) -> Any:
    import keras

    if name in ("accuracy", "acc"):
        return keras.metrics.SparseCategoricalAccuracy("accuracy") if schema.classes else keras.metrics.MeanMetricWrapper(
            keras.metrics.get("accuracy"), "accuracy"
        )  # fmt: skip
    try:
        meter = keras.metrics.get(name)
    except (ValueError, TypeError):
        raise ModelError(f"train.metrics: `{name}` is not a Keras metric") from None
    if not isinstance(meter, keras.metrics.Metric):
        meter = keras.metrics.MeanMetricWrapper(meter, name)
    meter.name = name
    return meter


def _try_on(parts: Parts, train: Train, schema: Schema) -> None:
    """Compute loss and metrics once for two rows of nothing. Raises ModelError where their shapes do not fit."""
    import numpy as np
    import tensorflow as tf

    outputs = tf.fill((2, schema.outputs), 1 / schema.outputs)
    target = tf.constant(np.zeros(2), parts.target.dtype)
    shown = f"an output of shape (rows, {schema.outputs}) and a target of shape (rows,)"
    try:
        rows = parts.loss(target[:, None] if schema.outputs == 1 else target, outputs)
    except Exception as error:
        raise ModelError(f"train.loss: `{train.loss}` does not fit {shown}: {_what(error)}") from None
    if rows.shape.rank == 0 or tuple(rows.shape) != (2,):
        raise ModelError(f"train.loss: `{train.loss}` does not fit {shown}: it answers {tuple(rows.shape)} for 2 rows, not (2,)")
    for meter in parts.meters()[1:]:
        try:
            meter.update_state(target, outputs)
            float(meter.result())
        except Exception as error:
            raise ModelError(f"train.metrics: `{meter.name}` does not fit {shown}: {_what(error)}") from None


def check_shapes(model: "keras.Model", schema: Schema, where: str) -> None:
    import numpy as np

    try:
        inputs, outputs = model.inputs, model.outputs
    except AttributeError:
        raise ModelError(f"{where} returned a model without known inputs: build it with keras.Input") from None
    expected = schema.inputs
    if len(inputs) != len(expected):
        raise ModelError(f"{where}: the model has {len(inputs)} inputs, the schema {len(expected)}: {shapes(expected)}")
    for tensor in inputs:
        name = tensor.name if len(expected) > 1 else next(iter(expected))
        if name not in expected:
            raise ModelError(f"{where}: input `{tensor.name}`: the schema's inputs are {shapes(expected)}")
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


def shapes(inputs: dict[str, tuple[int, ...]]) -> str:
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
