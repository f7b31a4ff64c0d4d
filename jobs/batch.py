"""`batch_size: auto`: the largest batch that fits, found by trial on the hardware that will train.

A worker of its own runs real steps on rows of zeros, twice as many each time, until memory is short (a GPU says so; on a CPU
it is most of what the machine has to spare), or an epoch would have fewer than eight steps, which learns badly.
"""

from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ..datasets.ingest import Block
from ..datasets.schema import Schema
from ..datasets.shards import Manifest
from ..project import Model, Train
from .model import build, compile_parts
from .steps import HOST, Feed, Objective, Steps

SMALLEST = 32
FEWEST_STEPS = 8
SHARE = 0.7
"""Of a machine's free memory."""


def largest_batch(train: Train, model: Model, project: Path, prepared: Path, here: int) -> int:
    """Rows of a step over all workers, when there are as few of them as `train.workers` allows.

    here: how many of them share this machine's memory.
    """
    import keras
    import tensorflow as tf

    schema, manifest = Schema.read(prepared), Manifest.read(prepared)
    keras.mixed_precision.set_global_policy(train.precision)
    net = build(model, schema, project)
    parts = compile_parts(train, schema, manifest)
    objective = Objective(parts.loss)
    parts.optimizer.build([*net.trainable_variables, *objective.variables])
    specs = (schema.inputs, parts.target)
    strategy = tf.distribute.get_strategy()
    steps = Steps(net, objective, parts.optimizer, parts.meters(), strategy, specs, 0, 1, train.accumulate)
    process = psutil.Process()
    budget = process.memory_info().rss + SHARE * psutil.virtual_memory().available / here
    workers, most = train.fewest_workers, max(SMALLEST, manifest.rows("train") // FEWEST_STEPS)
    fits, rows = SMALLEST, SMALLEST
    while rows <= most:
        try:
            steps.train(_zeros(schema, parts.target, -(-rows // workers)), 0, 1, np.zeros(HOST, np.float32))
        except tf.errors.ResourceExhaustedError:
            break
        if process.memory_info().rss > budget:
            break
        fits, rows = rows, 2 * rows
    return fits


def _zeros(schema: Schema, target: Any, rows: int) -> Any:
    inputs = {name: np.zeros((rows, *shape), np.float32) for name, shape in schema.inputs.items()}
    ones, edges, everyone = np.ones(rows, np.float32), np.array([0, rows], np.int32), np.array([rows], np.float32)
    block = Block(inputs, np.zeros((rows, *target.shape[1:]), target.dtype.as_numpy_dtype), ones, edges, everyone, {})
    return next(Feed(iter([block]), "CPU:0"))
