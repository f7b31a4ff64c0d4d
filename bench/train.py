"""Training speed, beside what people use today.

    uv run --group bench python bench/train.py [repeats]

Three claims, each measured in turn with its peer:
- two workers against Ray's documented way (`TensorflowTrainer`, legacy `tf_keras`, `to_tf`), same model and global batch;
- one worker against plain `keras.Model.fit` with its defaults, the rows in memory;
- two workers against one on a model that is bound by computing: what share of the speed of two processes that never speak
  to each other is kept.

Steps per second are of whole epochs after the first one, which compiles. Ours read encrypted shards through Ray Data and
write checkpoints and metrics meanwhile; Ray's path reads plain Parquet; neither validates.
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import answer, child, finish, in_turn

ROWS, BATCH, EPOCHS = 12_800, 128, 6
MODEL = """
import keras
from keras import layers


def build(schema, hp):
    x = inputs = keras.Input((784,))
    for units in (256, 256):
        x = layers.Dense(units, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(x))
"""
CONV = """
import keras
from keras import layers


def build(schema, hp):
    inputs = keras.Input((784,))
    x = layers.Reshape((28, 28, 1))(inputs)
    for filters in (16, 32, 32):
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(x))
"""


def rows(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ten noisy patterns."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, count)
    x = rng.normal(size=(10, 784))[y] + 3 * rng.normal(size=(count, 784))
    return x.astype("float32"), y


def write_rows(folder: Path, count: int) -> None:
    x, y = rows(count)
    pixels = pa.FixedShapeTensorArray.from_numpy_ndarray(x)
    for i in range(8):
        piece = slice(i * count // 8, (i + 1) * count // 8)
        table = pa.table({"x": pixels[piece], "y": y[piece]})
        pq.write_table(table, folder / f"{i}.parquet")


def prepared(folder: Path, count: int, code: str):
    """A job on `count` rows, prepared and sealed."""
    from heliograph.cluster.keys import DATA_KEY, KeyStore
    from heliograph.jobs.prepare import prepare
    from heliograph.jobs.worker import Job
    from heliograph.project import Data, Model, Optimizer, Split, Train

    folder.mkdir(parents=True)
    write_rows(folder, count)
    (folder / "model.py").write_text(code)
    keys = KeyStore(folder / "keys")
    keys.rotate(DATA_KEY)
    (folder / "prepared").mkdir()
    data = Data(source="*.parquet", target="y", split=Split(validation=0.0, test=0.02), preprocess=[])
    prepare(data, folder, keys, folder / "prepared", lambda *_: None)
    train = Train(epochs=EPOCHS, batch_size=BATCH, optimizer=Optimizer())
    return Job("bench", train, Model(), folder, folder / "prepared", keys, folder / "run")


def ours(job, **settings) -> tuple[float, float]:
    """(steps per second after the first epoch, last loss)."""
    from dataclasses import replace

    from heliograph.jobs.train import train

    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir()
    job = replace(job, train=job.train.model_copy(update=settings))
    train(job, lambda *_: None, lambda text: print(text, file=sys.stderr))
    lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    steps, seconds = lines[-1]["step"] - lines[0]["step"], sum(line["seconds"] for line in lines[1:])
    return steps / seconds, lines[-1]["loss"]


def ray_legacy(folder: Path, out: Path) -> float:
    """Steps per second of Ray's documented way, two workers."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.tensorflow import TensorflowTrainer

    def loop(config: dict) -> None:
        import time

        import ray.train
        import tensorflow as tf
        import tf_keras
        from ray.train.tensorflow import prepare_dataset_shard

        tf.config.threading.set_intra_op_parallelism_threads(1)
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        with strategy.scope():
            layers = [tf_keras.layers.Dense(256, activation="relu") for _ in range(2)]
            model = tf_keras.Sequential([tf_keras.Input((784,)), *layers, tf_keras.layers.Dense(10, activation="softmax")])
            model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        shard = ray.train.get_dataset_shard("train")
        ends = [time.monotonic()]
        steps = 0
        for _ in range(config["epochs"]):
            # fit deals a batch out to the workers, so it is the global one here.
            batches = shard.to_tf(feature_columns="x", label_columns="y", batch_size=config["batch"], drop_last=True)
            done = model.fit(prepare_dataset_shard(batches), epochs=1, verbose=0)
            ends.append(time.monotonic())
            steps = int(model.optimizer.iterations.numpy())
            assert done.history["loss"][0] > 0
        if ray.train.get_context().get_world_rank() == 0:
            each = steps / config["epochs"]
            Path(config["out"]).write_text(str(each * (len(ends) - 2) / (ends[-1] - ends[1])))

    out.unlink(missing_ok=True)
    # Read once, before, into Ray's memory and Ray's own tensor type: `to_tf` does not know Arrow's.
    files = [str(f) for f in sorted(folder.glob("*.parquet"))]
    data = ray.data.read_parquet(files).map_batches(lambda batch: batch, batch_format="numpy").materialize()
    TensorflowTrainer(
        loop,
        train_loop_config={"epochs": EPOCHS, "batch": BATCH, "out": str(out)},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name="legacy", storage_path=str(folder / "legacy")),
        datasets={"train": data},
    ).fit()
    return float(out.read_text())


def keras_fit() -> None:
    """A child: `keras.Model.fit` as everybody writes it."""

    space: dict = {}
    exec(MODEL, space)
    model = space["build"](None, None)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    x, y = rows(int(ROWS * 0.98))
    model.fit(x, y, batch_size=BATCH, epochs=1, verbose=0)
    started = time.monotonic()
    done = model.fit(x, y, batch_size=BATCH, epochs=EPOCHS - 1, verbose=0)
    seconds = time.monotonic() - started
    print(json.dumps({"steps_per_second": (EPOCHS - 1) * -(-len(x) // BATCH) / seconds, "loss": done.history["loss"][-1]}))


def alone(folder: str, batch: str) -> None:
    """A child: one worker in a Ray of its own, on the CPUs that it is pinned to."""
    from heliograph.cluster.runtime import LocalCluster

    with LocalCluster(1) as cluster:
        cluster.start()
        steps, loss = ours(prepared(Path(folder), 4096, CONV), batch_size=int(batch), workers=1)
    print(json.dumps({"steps_per_second": steps, "loss": loss}))


def main(repeats: int) -> None:
    from heliograph.cluster.runtime import LocalCluster

    losses: dict[str, float] = {}

    def kept(name: str, run: Callable[[], tuple[float, float]]) -> Callable[[], float]:
        def once() -> float:
            steps, losses[name] = run()
            return steps

        return once

    with tempfile.TemporaryDirectory(dir="/tmp") as temp:
        base = Path(temp)

        def apart() -> float:
            """Two that do not speak: the sum of half steps is what two workers could reach."""
            folders = [base / f"alone-{time.monotonic_ns()}-{i}" for i in range(2)]
            both = [child(__file__, "alone", str(f), str(BATCH // 2), cpus=str(i)) for i, f in enumerate(folders)]
            return sum(answer(process)["steps_per_second"] for process in both) / 2

        with LocalCluster(2) as cluster:
            cluster.start()
            job, conv = prepared(base / "mlp", ROWS, MODEL), prepared(base / "conv", 4096, CONV)
            contenders = {
                "Ray legacy, 2 workers": lambda: ray_legacy(base / "mlp", base / "legacy.txt"),
                "heliograph, 2 workers": kept("two", lambda: ours(job, workers=2)),
                "keras fit, 1 process": lambda: answer(child(__file__, "keras-fit"))["steps_per_second"],
                "heliograph, 1 worker": kept("one", lambda: ours(job, workers=1)),
                "conv apart, 2 processes": apart,
                "conv heliograph, 2 workers": kept("conv", lambda: ours(conv, workers=2)),
            }
            found = {name: median(values) for name, values in in_turn(repeats, contenders, "steps/s").items()}
    finish(
        {
            "two_worker_vs_ray_legacy": found["heliograph, 2 workers"] / found["Ray legacy, 2 workers"],
            "one_worker_vs_keras_fit": found["heliograph, 1 worker"] / found["keras fit, 1 process"],
            "scaling_efficiency": found["conv heliograph, 2 workers"] / found["conv apart, 2 processes"],
            "loss_gap": abs(losses["two"] - losses["one"]) / losses["one"],
        }
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["keras-fit"]:
            keras_fit()
        case ["alone", folder, batch]:
            alone(folder, batch)
        case given:
            main(int(given[0]) if given else 3)
