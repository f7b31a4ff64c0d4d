"""Averages of a training's weights: what is validated and exported in the place of the last ones.

train.ema   a moving average over all steps, which Keras' optimizer keeps
train.swa   the mean of the weights at the ends of the epochs, from one on (Izmailov et al., Averaging Weights Leads to Wider
            Optima, 2018); batch normalisation then collects its statistics anew, for these weights, from the training rows
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster.keys import KeyStore
from ..project import Train
from .export import sample
from .layers import leaves
from .steps import fed

BATCH, BATCHES = 128, 200
"""Of training rows, from which statistics are collected."""


class Averages:
    """Made in the strategy's scope."""

    def __init__(self, train: Train, model: Any, optimizer: Any):
        import keras

        self.train, self.model, self.optimizer = train, model, optimizer
        averaged = model.trainable_variables if train.swa else []
        self.means = [keras.Variable(np.zeros(v.shape, np.float32), trainable=False, name="mean") for v in averaged]
        self.count = keras.Variable(0, dtype="int32", trainable=False, name="averaged")

    @property
    def variables(self) -> list[Any]:
        """That checkpoints keep."""
        return [*self.means, self.count] if self.train.swa else []

    def end_of(self, epoch: int) -> None:
        """Take up the weights that an epoch has ended with."""
        if not self.train.swa or epoch < self.train.swa:
            return
        count = int(np.asarray(self.count)) + 1
        for mean, variable in zip(self.means, self.model.trainable_variables, strict=True):
            before = np.asarray(mean)
            mean.assign(before + (np.asarray(variable) - before) / count)
        self.count.assign(count)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Inside, the model has the average, where one is asked for and there is one."""
        variables = self.model.trainable_variables
        averaged = bool(self.train.swa and int(np.asarray(self.count)))
        if not (self.train.ema or averaged):
            yield
            return
        kept = [np.array(v) for v in variables]
        if averaged:
            for variable, mean in zip(variables, self.means, strict=True):
                variable.assign(np.asarray(mean))
        else:
            self.optimizer.finalize_variable_values(variables)
        yield
        for variable, value in zip(variables, kept, strict=True):
            variable.assign(value)


def collect_statistics(model: Any, prepared: Path, keys: KeyStore | None) -> None:
    """Let batch normalisation find the moving means and variances of the model's weights as they are, from training rows."""
    import keras

    norms = [layer for layer in leaves(model) if isinstance(layer, keras.layers.BatchNormalization)]
    if not norms:
        return
    inputs, target = sample(prepared, keys, "train", BATCH * BATCHES)
    kept = [layer.momentum for layer in norms]
    for done, at in enumerate(range(0, len(target), BATCH)):
        for layer in norms:
            layer.momentum = done / (done + 1)  # so that all batches count alike
        model(fed({name: values[at : at + BATCH] for name, values in inputs.items()}), training=True)
    for layer, momentum in zip(norms, kept, strict=True):
        layer.momentum = momentum
