"""Several tasks: one model that answers several targets, and what it is trained by.

The user's model has an output for each target, by its name. Inside, they stand beside each other in one output (`Schema.parts`
says whose is where), so whatever handles a model of one target (engines, exports, compression, endpoints) handles this one; only
what a person or a client sees has the names again.

The loss of a row is the sum over the targets that it has. A target that few rows have counts as much as one that all have: its
loss is divided by the share of the training rows that have it.
"""

from typing import Any

from ..datasets.schema import Schema
from ..errors import ModelError
from .layers import free
from .steps import filled


def joined(model: Any, schema: Schema, where: str) -> Any:
    """A model with an output for each target, by name, as one with all of them beside each other. Raises ModelError."""
    import keras

    outputs = model.output
    names = [alone.target for alone, _ in schema.parts]
    if not isinstance(outputs, dict):
        outputs = dict(zip(model.output_names, model.outputs, strict=True)) if len(model.outputs) > 1 else {}
    if missing := [name for name in names if name not in outputs]:
        has = ", ".join(outputs) or "one without a name"
        raise ModelError(f"{where}: no output is called `{missing[0]}` but {has}: return keras.Model(inputs, {{target: output}})")
    for alone, _ in schema.parts:
        shape = tuple(outputs[alone.target].shape[1:])
        if shape != (alone.outputs,):
            per = f"a probability for each of {len(alone.classes)} classes" if alone.classes else "one value"
            raise ModelError(f"{where}: output `{alone.target}` is {shape} for a row, ({alone.outputs},) is needed: {per}")
    together = keras.layers.Concatenate(name=free(model, "targets"))([outputs[name] for name in names])
    return keras.Model(model.inputs if len(model.inputs) > 1 else model.inputs[0], together, name=model.name)


def named(model: Any, schema: Schema) -> Any:
    """The other way round: outputs by name."""
    import keras

    together = model.outputs[0]
    outputs = {alone.target: together[:, of] for alone, of in schema.parts}
    return keras.Model(model.inputs if len(model.inputs) > 1 else model.inputs[0], outputs, name=model.name)


class Losses:
    """The loss of a row over several targets. losses: of each target alone; weights: of each; shares: of the training rows that
    have it. uncertainty: learn a weight exp(-s) for each, with the penalty s (Kendall, Gal and Cipolla, 2018)."""

    def __init__(self, schema: Schema, losses: list[Any], weights: list[float], shares: list[float], uncertainty: bool):
        import keras

        self.parts, self.losses, self.weights = schema.parts, losses, weights
        self.shares = [max(share, 1e-6) for share in shares] or [1.0] * len(losses)
        self.variables = [keras.Variable(0.0, name=f"uncertainty_{i}") for i in range(len(losses))] if uncertainty else []

    def __call__(self, target: Any, outputs: Any) -> Any:
        import tensorflow as tf

        total = tf.zeros(tf.shape(outputs)[:1])
        for i, (alone, of) in enumerate(self.parts):
            own, here, has = tf.cast(outputs[:, of], tf.float32), *given(target, i, alone)
            rows = tf.where(has, self.losses[i](here if alone.classes else here[:, None], own), 0.0)
            weight = self.weights[i] / self.shares[i]
            if self.variables:
                s = tf.convert_to_tensor(self.variables[i])
                total += weight * tf.where(has, tf.exp(-s) * rows + s, 0.0)
            else:
                total += weight * rows
        return total

    def learned(self) -> dict[str, float]:
        """The weight of each target, where it is learnt."""
        import numpy as np

        learnt = zip(self.parts, self.variables, strict=False)
        return {f"{alone.target}_weight": float(np.exp(-np.asarray(variable))) for (alone, _), variable in learnt}


def given(target: Any, i: int, alone: Schema) -> tuple[Any, Any]:
    """(the values of a target `[rows]`, as its loss takes them, something where there is none; whether there is one)."""
    import tensorflow as tf

    values, has = filled(target[:, i])
    return (tf.cast(values, tf.int64) if alone.classes else values), has


class Meter:
    """A Keras metric of one of several targets, of the rows that have it."""

    def __init__(self, metric: Any, i: int, schema: Schema):
        self.metric, self.i, (self.alone, self.of) = metric, i, schema.parts[i]
        self.name = f"{self.alone.target}_{metric.name}"
        self.variables, self.result, self.reset_state = metric.variables, metric.result, metric.reset_state

    def update_state(self, target: Any, outputs: Any) -> None:
        import tensorflow as tf

        values, has = given(target, self.i, self.alone)
        own = outputs[:, self.of]
        self.metric.update_state(values if self.alone.classes else values[:, None], own, sample_weight=tf.cast(has, tf.float32))
