"""A model in two stages on two cores, beside the same model in one process on one core.

    uv run --group bench python bench/pipeline.py [repeats]

Each stage is a process with one thread, as each would own a device; the one process has one thread too, and computes the
whole step at once. Shown on a small transformer and on a convolutional network, with activations kept and recomputed.
Gradients are of the first step. A stage's memory is the peak of its process above what TensorFlow takes
before there is a model.
"""

import resource
import shutil
import sys
import tempfile
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import finish, in_turn

RATE, BATCH, MICRO, STEPS = 0.05, 64, 8, 4
TRANSFORMER = """
import keras
from keras import layers


def build(schema, hp):
    inputs = keras.Input((64, 16))
    x = layers.Dense(256)(inputs)
    for _ in range(8):
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(4, 64)(y, y)])
        y = layers.LayerNormalization()(x)
        y = layers.Dense(1024, activation="relu")(y)
        x = layers.Add()([x, layers.Dense(256)(y)])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(x))
"""
CONV = """
import keras
from keras import layers


def build(schema, hp):
    inputs = keras.Input((64, 16))
    x = layers.Reshape((32, 32, 1))(inputs)
    for i in range(8):
        y = layers.Conv2D(48, 3, padding="same", activation="relu")(layers.LayerNormalization()(x))
        x = y if i == 0 else layers.Add()([x, y])
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(x))
"""


def peak() -> float:
    """Megabytes that this process has ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def job(folder: Path, code: str, **pipeline: Any):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from heliograph.jobs.prepare import prepare
    from heliograph.jobs.worker import Job
    from heliograph.project import Data, Model, Optimizer, Pipeline, Split, Train

    if not folder.exists():
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(1100, 64, 16)).astype("float32"), rng.integers(0, 10, 1100)
        table = pa.table({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(x), "y": y})
        pq.write_table(table, folder / "rows.parquet")
        (folder / "model.py").write_text(code)
        (folder / "prepared").mkdir()
        data = Data(source="*.parquet", target="y", split=Split(validation=0.0, test=0.02), preprocess=[], encrypt=False)
        prepare(data, folder, None, folder / "prepared", lambda *_: None)
    train = Train(epochs=1000, batch_size=BATCH, optimizer=Optimizer(name="sgd", learning_rate=RATE), metrics=[])
    train = train.model_copy(update={"pipeline": Pipeline(stages=2, micro_batches=MICRO, **pipeline)})
    run = Path(tempfile.mkdtemp(dir=folder))
    return Job("bench", train, Model(), folder, folder / "prepared", None, run, batch_size=BATCH)


class One:
    """The whole model in one process with one thread."""

    def __init__(self, given: Any):
        import keras
        import tensorflow as tf
        from heliograph.datasets.ingest import Part, blocks
        from heliograph.datasets.schema import Schema
        from heliograph.datasets.shards import Manifest
        from heliograph.jobs.model import build, compile_parts
        from heliograph.jobs.rate import rate
        from heliograph.jobs.steps import HOST, Feed, Objective, Steps

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        tf.constant(0.0)
        self.base = peak()
        schema, manifest = Schema.read(given.prepared), Manifest.read(given.prepared)
        keras.utils.set_random_seed(given.train.seed)
        self.model = build(given.model, schema, given.project)
        parts = compile_parts(given.train, schema, [], rate(given.train, 10**6)[0])
        parts.optimizer.build(self.model.trainable_variables)
        specs = (schema.inputs, parts.target)
        self.steps = Steps(
            self.model, Objective(parts.loss), parts.optimizer, parts.meters(), tf.distribute.get_strategy(), specs, 0, 1
        )
        part = Part(given.prepared, manifest, "train", None, 0, 1, BATCH, given.train.seed)
        self.feed, self.host = Feed(blocks(part, 0, 10**6), "CPU:0"), np.zeros(HOST, np.float32)
        self.left: deque = deque()

    def run(self, count: int) -> tuple[float, list[float]]:
        """(seconds, losses) of some steps."""
        losses, started = [], time.perf_counter()
        for _ in range(count):
            if not self.left:
                block = next(self.feed)
                self.left.extend((block, i) for i in range(block.steps))
            block, i = self.left.popleft()
            losses.append(float(self.steps.train(block, i, 1, self.host).steps[0, 0]))
        return time.perf_counter() - started, losses

    def gradient(self) -> list[np.ndarray]:
        """Of the first step, before it is done."""
        import keras
        import tensorflow as tf

        block = next(self.feed)
        self.left.extend((block, i) for i in range(block.steps))
        edge = int(block.edges[1])
        with tf.GradientTape() as tape:
            outputs = self.model(block.rows[0]["x"][:edge], training=True)
            loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(block.rows[1][:edge], outputs))
        return [np.asarray(g) for g in tape.gradient(loss, [v.value for v in self.model.trainable_variables])]

    def memory(self) -> float:
        return peak() - self.base


def measured_stage() -> type:
    """`Stage`, that can say how much memory it took at most."""
    from heliograph.jobs.stage import Stage

    class Measured(Stage):
        def __init__(self, *given: Any):
            import tensorflow as tf

            tf.config.threading.set_intra_op_parallelism_threads(1)
            tf.config.threading.set_inter_op_parallelism_threads(1)
            tf.constant(0.0)
            self.base = peak()
            super().__init__(*given)

        def apply(self, *squares: float) -> Any:
            if not hasattr(self, "first"):
                self.first = {place: np.array(g) for place, g in zip(self.weight_places, self.total, strict=True)}
            return super().apply(*squares)

        def first_gradient(self) -> dict[int, np.ndarray]:
            return self.first

        def memory(self) -> float:
            return peak() - self.base

    return Measured


class Two:
    """The same in stages (times replicas)."""

    def __init__(self, given: Any, workers: int = 1):
        import ray
        from heliograph.jobs import pipeline

        pipeline.Stage = measured_stage()  # pyright: ignore[reportAttributeAccessIssue]
        self.run_of = pipeline._Pipeline(replace(given, train=given.train.model_copy(update={"workers": workers})), {"CPU": 0.1})
        for actor in self.run_of.actors[0]:
            actor.load.remote("train", 0, 10**5)
        self.ray = ray

    def run(self, count: int) -> tuple[float, float]:
        """(seconds, what an ideal pipeline of these stages would have taken)."""
        seen: list[Any] = []
        pipe = self.run_of
        flying = deque(pipe._submit() for _ in range(2))
        started = time.perf_counter()
        self.losses: list[float] = []
        for done in range(count):
            step = flying.popleft()
            pipe._finish(step)
            self.losses.append(float(sum(self.ray.get(step[0]))))
            seen.append([d[2] for d in self.ray.get(step[2])])
            if done + 2 < count:
                flying.append(pipe._submit())
        seconds = time.perf_counter() - started
        slowest = np.array(seen).max(axis=1).sum()
        return seconds, slowest * (MICRO + 1) / MICRO

    def memory(self) -> float:
        return max(self.ray.get([stage[0].memory.remote() for stage in self.run_of.actors]))


def compare(name: str, code: str, folder: Path, repeats: int) -> dict[str, float]:
    import ray

    one = ray.remote(One).options(num_cpus=0.1).remote(job(folder, code))
    gradient: Any = ray.get(one.gradient.remote())
    ray.get(one.run.remote(1))
    gaps = {}
    two: dict[str, Two] = {}
    for kind, given, workers in (
        ("kept", job(folder, code, recompute="never"), 1),
        ("recomputed", job(folder, code, recompute="always"), 1),
        ("replicas", job(folder, code, recompute="never"), 2),
    ):
        two[kind] = Two(given, workers)
        two[kind].run_of._finish(two[kind].run_of._submit())
        found: Any = ray.get([stage[0].first_gradient.remote() for stage in two[kind].run_of.actors])
        own = {place: g for each in found for place, g in each.items()}
        gaps[kind] = max(float(np.abs(own[i] - g).max()) for i, g in enumerate(gradient))
        scale = max(np.abs(g).max() for g in gradient)
        print(f"{name}: {kind}: gradient gap to one process {gaps[kind]:.1e} (the largest is {scale:.2g})", flush=True)
        if kind == "replicas":
            two.pop(kind).run_of.close()
    cut = two["kept"].run_of.cut
    print(f"{name}: cut behind operation {cut.places[0]}, forward seconds of the stages {cut.seconds}", flush=True)
    ideals: dict[str, list[float]] = {"kept": [], "recomputed": []}

    def piped(kind: str) -> float:
        seconds, ideal = two[kind].run(STEPS + 2)
        ideals[kind].append(ideal / seconds)
        return (STEPS + 2) / seconds

    def alone() -> float:
        return STEPS / ray.get(one.run.remote(STEPS))[0]

    speeds = in_turn(
        repeats,
        {
            f"{name}, one process": alone,
            f"{name}, kept": lambda: piped("kept"),
            f"{name}, recomputed": lambda: piped("recomputed"),
        },
        "steps/s",
    )
    speeds = {key.split(", ")[1]: median(values) for key, values in speeds.items()}
    memory = two["kept"].memory() / ray.get(one.memory.remote())
    lean = two["recomputed"].memory() / ray.get(one.memory.remote())
    print(f"{name}: peak memory of a stage: {memory:.2f} of one process's with activations kept, {lean:.2f} recomputed")
    for each in two.values():
        each.run_of.close()
    ray.kill(one)
    return {
        "gradient_gap": max(gaps.values()),
        "efficiency_vs_ideal": min(median(values) for values in ideals.values()),
        "speedup_kept": speeds["kept"] / speeds["one process"],
        "speedup_recompute": speeds["recomputed"] / speeds["one process"],
        "peak_memory_ratio": max(memory, lean),
    }


def main(repeats: int) -> None:
    from heliograph.cluster.runtime import LocalCluster

    base = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        with LocalCluster(2) as cluster:
            cluster.start()
            found = {n: compare(n, code, base / n, repeats) for n, code in (("transformer", TRANSFORMER), ("conv", CONV))}
    finally:
        shutil.rmtree(base, ignore_errors=True)
    for name, figures in found.items():
        print(name, {k: float(f"{v:.4g}") for k, v in figures.items()})
    largest = ("gradient_gap", "peak_memory_ratio")
    finish({k: (max if k in largest else min)(f[k] for f in found.values()) for k in found["conv"]})


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
