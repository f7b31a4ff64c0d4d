"""What a recipe's step changes in an ordinary training (`worker.py`), which otherwise is the same: as many workers, checkpoints,
watched, interrupted and continued.

    distil    the loss of a step is the teachers' too
    prune     an update leaves at zero what a mask says, and masks grow between calls
    channels  the model is a narrower one from the start
    qat       layers see their weights and inputs rounded

`keras.distillation.Distiller` is not used: its losses are means of one worker's batch inside Keras' `fit`, and its default one
takes probabilities for logits. Here the loss is a row's, so a step is the same for any number of workers, like all others.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster.keys import KeyStore
from ..datasets.schema import Schema
from ..errors import ModelError
from ..project import Model
from ..recipes import Channels, Distil, Prune, Qat, Trains
from .channels import narrowed
from .engine import called, keras_model
from .layers import leaves, matched
from .model import build

RAMP = 0.7
"""The share of a pruning's steps in which more and more goes; in the rest the weights that stay settle."""
PAUSES = 100
"""Times that masks grow."""
KERNELS = ("kernel", "depthwise_kernel", "pointwise_kernel", "recurrent_kernel")
TABLES = ("embeddings",)
"""What is looked up: it has no inputs, so no pattern among them."""
SMALLEST = 1e-7


@dataclass(frozen=True)
class Shrinking:
    """A step of a recipe, as a job of training has it; folders hold a `model.keras` each, or are its file."""

    step: Trains
    source: Path
    teachers: tuple[Path, ...]
    keys: KeyStore
    where: str
    """For errors: the step's place in the project file."""

    def model(self, schema: Schema, own: Model, project: Path) -> Any:
        """The model as the training begins with it. Raises ModelError."""
        step = self.step
        if isinstance(step, Distil):
            own = own.model_copy(
                update={
                    "build": step.build or own.build,
                    "preset": None if step.build else own.preset,
                    "hp": {**own.hp, **step.hp},
                    "start": None,
                    "fuse": None,
                }
            )
            return build(own, schema, project)
        model = keras_model(self.source, self.keys)
        return called(narrowed(model, step.share, step.layers, self.where)) if isinstance(step, Channels) else model


class Shaping:
    """What a training is told by no step at all; each step overrides what it changes."""

    variables: tuple[Any, ...] = ()
    """That checkpoints keep."""
    guide: "Callable[[Any], tuple[Any, Any]] | None" = None
    """Inputs of training rows to (the model's outputs, a loss a row that is added)."""
    labels = 1.0
    """The share of the labels' loss, where there is a guide."""

    def hook(self, optimizer: Any) -> None: ...

    def pause(self, step: int) -> int:
        """Steps that may be done after `step` before `grow` is called."""
        return 1 << 30

    def grow(self, step: int) -> None: ...

    def finish(self, plain: Any) -> None:
        """Bring a model that got the trained weights to what the step promises."""


def shaped(job: Shrinking | None, model: Any, schema: Schema, end: int) -> Shaping:
    """Called in the strategy's scope. end: steps of the training. Raises ModelError."""
    match job.step if job else None:
        case Prune() as step:
            return _Pruning(step, model, end, job.where if job else "")
        case Distil() as step if job:
            return _Taught(step, model, [keras_model(place, job.keys) for place in job.teachers], schema, job.where)
        case Qat():
            _round_in(model)
    return Shaping()


# Pruning


class _Pruning(Shaping):
    def __init__(self, step: Prune, model: Any, end: int, where: str):
        import keras

        self.step, self.end = step, end
        self.kernels = kernels(model, step.layers, where)
        if step.pattern:
            self.kernels = [kernel for kernel in self.kernels if kernel.name not in TABLES]
            m = int(step.pattern.split(":")[1])
            if (short := next((k for k in self.kernels if _inputs(k) < m), None)) is not None:
                raise ModelError(f"{where}.pattern: `{short.path}` has {_inputs(short)} inputs, fewer than {m}: name `layers`")
        self.masks = [keras.Variable(np.ones(k.shape, np.float32), trainable=False, name="mask") for k in self.kernels]
        self.variables = tuple(self.masks)
        self.every = max(1, int(RAMP * end) // PAUSES)

    def hook(self, optimizer: Any) -> None:
        masks = {optimizer._var_key(kernel): mask for kernel, mask in zip(self.kernels, self.masks, strict=True)}
        update = optimizer.update_step

        def masked(gradient: Any, variable: Any, rate: Any) -> Any:
            mask = masks.get(optimizer._var_key(variable))
            if mask is None:
                return update(gradient, variable, rate)
            kept = mask.value
            update(gradient * kept, variable, rate)
            return variable.assign(variable * kept)

        optimizer.update_step = masked

    def pause(self, step: int) -> int:
        return self.every - step % self.every

    def grow(self, step: int) -> None:
        """Masks as the schedule has them after a step; what they take from the weights is zero from now on."""
        if step % self.every and step != self.end:
            return
        done = min(1.0, step / max(1.0, RAMP * self.end))
        share = 1 - (1 - done) ** 3
        values = [np.asarray(kernel) for kernel in self.kernels]
        pattern, sparsity = self.step.pattern, self.step.sparsity
        kept = of_pattern(values, pattern, share) if pattern else largest(values, sparsity * share)
        for kernel, mask, value, keep in zip(self.kernels, self.masks, values, kept, strict=True):
            mask.assign(keep)
            kernel.assign(value * keep)

    def finish(self, plain: Any) -> None:
        own = {kernel.path: kernel for kernel in _all_kernels(plain)}
        for kernel, mask in zip(self.kernels, self.masks, strict=True):
            own[kernel.path].assign(np.asarray(own[kernel.path]) * np.asarray(mask))


def kernels(model: Any, patterns: list[str], where: str) -> list[Any]:
    """The weights of the layers that patterns mean, biases and the like left out. Raises ModelError for one that means none."""
    layers = {layer.name: layer for layer in leaves(model)}
    names = matched(patterns, layers, f"{where}.layers")
    found = [v for name in layers if name in names for v in _kernels(layers[name])]
    if not found:
        raise ModelError(f"{where}.layers: {', '.join(sorted(names)[:6])}: have no kernels, so nothing can be pruned")
    return found


def _kernels(layer: Any) -> Iterator[Any]:
    return (v for v in layer.weights if v.name in (*KERNELS, *TABLES) and len(v.shape) > 1)


def _all_kernels(model: Any) -> list[Any]:
    return [v for layer in leaves(model) for v in _kernels(layer)]


def largest(values: list[np.ndarray], sparsity: float) -> list[np.ndarray]:
    """Masks (1 or 0, float32) that leave the share `1 - sparsity` of the numbers of all arrays together, the largest."""
    sizes = np.concatenate([np.abs(v).ravel() for v in values])
    gone = min(len(sizes) - 1, round(sparsity * len(sizes)))
    if gone <= 0:
        return [np.ones(v.shape, np.float32) for v in values]
    threshold = np.partition(sizes, gone)[gone]
    return [(np.abs(v) >= threshold).astype(np.float32) for v in values]


def of_pattern(values: list[np.ndarray], pattern: str, share: float = 1.0) -> list[np.ndarray]:
    """Masks that leave of each `M` numbers in a row of inputs the `N` largest, `pattern` being `N:M`; while `share` is below 1,
    only in the smaller ones of such groups. What is left over of a row, less than `M`, stays."""
    n, m = map(int, pattern.split(":"))
    masks = []
    for value in values:
        flat = np.abs(value).reshape(-1, value.shape[-1]).T  # an output's weights in a row
        groups = flat[:, : flat.shape[1] // m * m].reshape(-1, m)
        keep = np.ones_like(groups)
        gone = np.argsort(groups, axis=1)[:, : m - n]
        np.put_along_axis(keep, gone, 0, axis=1)
        lost = np.take_along_axis(groups, gone, axis=1).sum(axis=1)
        keep[np.argsort(lost)[round(share * len(groups)) :]] = 1
        whole = np.ones(flat.shape, np.float32)
        whole[:, : flat.shape[1] // m * m] = keep.reshape(len(flat), -1)
        masks.append(np.ascontiguousarray(whole.T).reshape(value.shape).astype(np.float32))
    return masks


def _inputs(kernel: Any) -> int:
    return math.prod(kernel.shape[:-1])


def sparsity(model: Any) -> float:
    """The share of zeros in all kernels."""
    every = [np.asarray(k) for k in _all_kernels(model)]
    return float(sum((v == 0).sum() for v in every) / max(1, sum(v.size for v in every)))


# Distillation


class _Taught(Shaping):
    def __init__(self, step: Distil, student: Any, teachers: list[Any], schema: Schema, where: str):
        import keras

        self.labels = step.labels
        inner = step.features.items()
        of_student = [_layer(student, name, f"{where}.features") for name, _ in inner]
        of_teacher = [_layer(teachers[0], name, f"{where}.features") for _, name in inner]
        for (own, other), a, b in zip(inner, of_student, of_teacher, strict=True):
            if a.output.shape[1:-1] != b.output.shape[1:-1]:
                shapes = f"{tuple(a.output.shape[1:])} and {tuple(b.output.shape[1:])}"
                raise ModelError(f"{where}.features: `{own}` and `{other}` have the shapes {shapes}: all but the last must agree")
        turned = [_turn(a.output.shape[-1], b.output.shape[-1]) for a, b in zip(of_student, of_teacher, strict=True)]
        watched = keras.Model(student.inputs, [student.outputs[0], *(layer.output for layer in of_student)])
        first = keras.Model(teachers[0].inputs, [teachers[0].outputs[0], *(layer.output for layer in of_teacher)])
        for teacher in teachers:
            teacher.trainable = False
            found, made = tuple(teacher.outputs[0].shape[1:]), tuple(student.outputs[0].shape[1:])
            if found != made or len(teacher.inputs) != len(student.inputs):
                raise ModelError(f"{where}.teachers: one of them answers {found}, the student {made}: they must be of one task")
        parts = [(of, step.temperature if alone.classes else 0.0) for alone, of in schema.parts]

        def guide(inputs: Any) -> tuple[Any, Any]:
            import tensorflow as tf

            answered = watched(inputs, training=True)
            outputs, *own = answered if isinstance(answered, (list, tuple)) else [answered]
            told = first(_for(teachers[0], inputs), training=False)
            wanted, *others = told if isinstance(told, (list, tuple)) else [told]
            every = [wanted, *(t(_for(t, inputs), training=False) for t in teachers[1:])]
            wanted = tf.add_n([tf.cast(w, tf.float32) for w in every]) / len(every)
            outputs = tf.cast(outputs, tf.float32)
            far = [distance(wanted[:, of], outputs[:, of], t) for of, t in parts]
            loss = (1 - step.labels) * tf.add_n(far)
            for a, b, turn in zip(own, others, turned, strict=True):
                loss += _unlike(tf.cast(a, tf.float32) @ turn[0], tf.cast(b, tf.float32) @ turn[1])
            return outputs, loss

        self.guide = guide


def distance(wanted: Any, outputs: Any, temperature: float) -> Any:
    """A loss a row `[rows]`. Of probabilities: T² KL(wanted ‖ outputs), both softened by the temperature T, whose gradient is as
    large as that of the labels' loss (Hinton, Vinyals and Dean, 2015, section 2); of numbers (T is 0): the squared error."""
    import tensorflow as tf

    if not temperature:
        return tf.reduce_mean(tf.square(wanted - outputs), axis=-1)
    logs = [tf.nn.log_softmax(tf.math.log(tf.maximum(p, SMALLEST)) / temperature) for p in (wanted, outputs)]
    return temperature**2 * tf.reduce_sum(tf.exp(logs[0]) * (logs[0] - logs[1]), axis=-1)


def _unlike(a: Any, b: Any) -> Any:
    """Mean squared difference a row of features that are brought to one size."""
    import tensorflow as tf

    flat = [tf.math.l2_normalize(tf.reshape(x, [tf.shape(x)[0], -1]), axis=-1) for x in (a, b)]
    return tf.reduce_sum(tf.square(flat[0] - flat[1]), axis=-1)


def _turn(own: int, other: int) -> tuple[Any, Any]:
    """What both features' last axis is multiplied with, so that they are of one width: nothing where they are, else random
    orthonormal columns for the wider one, which keep distances (Johnson and Lindenstrauss, 1984)."""
    import tensorflow as tf

    narrow, wide = sorted((own, other))
    random = np.linalg.qr(np.random.default_rng(0).normal(size=(wide, narrow)))[0]
    turn = [tf.constant(random if w > narrow else np.eye(w), tf.float32) for w in (own, other)]
    return turn[0], turn[1]


def _layer(model: Any, name: str, where: str) -> Any:
    found = next((layer for layer in model.layers if layer.name == name), None)
    if found is None:
        raise ModelError(f"{where}: no layer `{name}`: the model has {', '.join(layer.name for layer in model.layers[:12])}")
    return found


def _for(model: Any, inputs: Any) -> Any:
    """Inputs by name as a model takes them; one alone is a tensor."""
    return {t.name: inputs[t.name] for t in model.inputs} if isinstance(inputs, dict) else inputs


# Quantisation-aware training


def _round_in(model: Any) -> None:
    """Let each layer with a kernel see it, and what comes in, rounded to 8 bits; gradients pass as if it were not (straight
    through, Bengio, Léonard and Courville, 2013). The layers' classes are exchanged, which reaches those inside of others."""
    for layer in model._flatten_layers(include_self=False):
        if isinstance(getattr(type(layer), "kernel", None), property) or "kernel" in vars(layer):
            layer.__class__ = _rounded(type(layer))


def _rounded(kind: type) -> type:
    class Rounded(kind):
        @property
        def kernel(self) -> Any:
            kernel = vars(self)["kernel"] if "kernel" in vars(self) else super().kernel
            return by_channel(kernel)

        @kernel.setter
        def kernel(self, value: Any) -> None:
            self.__dict__["kernel"] = value

        def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return super().call(as_a_whole(inputs), *args, **kwargs)

    return Rounded


def by_channel(kernel: Any) -> Any:
    """Symmetric, to -127 … 127 of each output channel (the last axis)."""
    import tensorflow as tf

    value = tf.convert_to_tensor(kernel)
    most = tf.reduce_max(tf.abs(value), axis=list(range(len(value.shape) - 1)), keepdims=True)
    unit = tf.maximum(most, SMALLEST) / 127.0
    return value + tf.stop_gradient(tf.round(value / unit) * unit - value)


def as_a_whole(values: Any) -> Any:
    """To 256 steps between the least and the largest number there is, zero among them."""
    import tensorflow as tf

    low, high = tf.minimum(tf.reduce_min(values), 0.0), tf.maximum(tf.reduce_max(values), 0.0)
    unit = tf.maximum(high - low, SMALLEST) / 255.0
    return values + tf.stop_gradient(tf.round(values / unit) * unit - values)
