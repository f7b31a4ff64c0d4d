"""Train: Keras 3 under MultiWorkerMirroredStrategy on Ray Train, one replica a worker.

The step is our own: one `tf.function` that loops over several `strategy.run`, with loss and metrics kept in ON_READ
variables that are reduced once an epoch. Keras' `fit` reduces scalars between workers at every step and trips over
per-replica batches (keras-team/keras#20585); at two workers our step was measured at 2.5–4 times either Keras.

A step's gradient is the sum over its rows divided by the rows of *all* workers, so that two workers make the step that
one makes. After each epoch every rank gathers every rank's weights digest; only when all are equal does rank 0 publish
the checkpoint, aside and by one rename. Whatever happens then, training goes on from the last one published.
"""

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster.keys import KeyStore
from ..cluster.runtime import LOOPBACK, keep_on_loopback
from ..cluster.storage import publish_folder, read_json, write_bytes, write_json
from ..datasets.ingest import Part, batches
from ..datasets.schema import Schema
from ..datasets.shards import TARGET, Manifest
from ..errors import ModelError
from ..project import Model, Train
from .engine import Engine
from .model import build, compile_parts

STEPS_PER_CALL = 10
KEPT_CHECKPOINTS = 2
METRICS = "metrics.jsonl"
EXPORT_ROWS = 256
EXPORT_GAP = 1e-4
"""How far ONNX may be from Keras: of a probability, or of the largest value where values are larger than 1."""


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; keys go by reference."""

    train: Train
    model: Model
    project: Path
    prepared: Path
    keys: KeyStore | None
    folder: Path
    """checkpoints/, metrics.jsonl, tensorboard/ and at the end model.keras, model.onnx, result.json."""


def train(job: Job, update: Callable[..., None]) -> None:
    """Train on the cluster until the last epoch is in `job.folder`. Raises ModelError for a model that does not fit."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from .backend import KerasConfig, Trainer

    gpus = ray.cluster_resources().get("GPU", 0) >= job.train.workers
    trainer = Trainer(
        _worker,
        train_loop_config={"job": job},
        backend_config=KerasConfig(),
        scaling_config=ScalingConfig(num_workers=job.train.workers, use_gpu=gpus),
        run_config=RunConfig(
            name="train",
            storage_path=str(job.folder / "ray"),
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    shutil.rmtree(job.folder / "ray", ignore_errors=True)
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)

    # In a thread, so that Ctrl-C reaches the main thread at once (Ray Train would catch it and wait).
    thread = threading.Thread(target=fit, daemon=True)
    reached = max((int(c.name.split("-")[1]) for c in (job.folder / "checkpoints").glob("epoch-*")), default=0)
    update(f"starting workers, going on after epoch {reached}" if reached else "starting workers")
    thread.start()
    while thread.is_alive():
        thread.join(0.3)
        _show(job, update)
    if failure:
        raise failure[0]
    shutil.rmtree(job.folder / "ray", ignore_errors=True)


def _show(job: Job, update: Callable[..., None]) -> None:
    with contextlib.suppress(FileNotFoundError, IndexError):
        last = json.loads((job.folder / METRICS).read_text().splitlines()[-1])
        shown = "  ".join(f"{k} {v:.3f}" for k, v in last.items() if k in ("loss", "val_loss", "val_accuracy", "val_mae"))
        update(f"epoch {last['epoch']}/{job.train.epochs}  {shown}", last["epoch"], job.train.epochs)


def _worker(config: dict) -> None:
    """One rank, from start to end."""
    import keras
    import ray.train
    import tensorflow as tf

    job: Job = config["job"]
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    threads = max(1, (os.cpu_count() or 1) // context.get_local_world_size())
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(2)
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)

    schema = Schema.read(job.prepared)
    manifest = Manifest.read(job.prepared)
    keras.utils.set_random_seed(job.train.seed)
    strategy: Any = _multi_worker() if workers > 1 else tf.distribute.get_strategy()
    with strategy.scope():
        model = build(job.model, schema, job.project)
        loss, optimizer = compile_parts(job.train, schema)
        optimizer.build(model.trainable_variables)
        meters = _meters(schema)
    state = _State(job.folder / "checkpoints", [*model.variables, *optimizer.variables], strategy, rank)
    done, history = state.restore()

    part = Part(job.prepared, manifest, "train", job.keys, rank, workers, job.train.batch_size, job.train.seed)
    held_out = Part(job.prepared, manifest, "validation", job.keys, rank, workers, 4 * job.train.batch_size, None)
    steps = _Steps(model, loss, optimizer, meters, strategy)
    epochs = range(done + 1, job.train.epochs + 1)
    rows = iter(_pipeline(batches(part, epochs), schema))
    held_out_rows = iter(_pipeline(batches(held_out, epochs), schema)) if held_out.rows else None
    board = _Board(job.folder / "tensorboard", history) if rank == 0 else None
    for epoch in epochs:
        started = time.monotonic()
        steps.train(rows, part.steps)
        figures = {"epoch": epoch, "step": epoch * part.steps, **steps.read()}
        seconds = time.monotonic() - started
        if held_out_rows:
            steps.evaluate(held_out_rows, held_out.steps)
            figures |= {f"val_{name}": value for name, value in steps.read().items()}
        figures |= {"seconds": round(seconds, 3), "rows_per_second": round(part.rows / seconds, 1), "workers": workers}
        history = [*history, figures]
        state.publish(epoch, history)
        if board:
            write_bytes(job.folder / METRICS, b"".join(json.dumps(line).encode() + b"\n" for line in history))
            board.write(figures)
    digests = state.digests()
    if rank == 0:
        # Outside the strategy's scope: a plain model with the same weights, which any Keras can load.
        plain = build(job.model, schema, job.project)
        plain.set_weights(model.get_weights())
        gap = _export(plain, held_out if held_out.rows else part, job)
        shape = {"workers": workers, "weights_sha256": digests, "parameters": plain.count_params(), "onnx_gap": gap}
        write_json(job.folder / "result.json", {**shape, **history[-1]})


def _export(model: Any, rows: Part, job: Job) -> float:
    """Save `model.keras` and `model.onnx`; the largest difference between the two on real rows.

    It is done here because TensorFlow is loaded here: its import takes longer than the export.
    """
    import logging

    import tensorflow as tf

    model.save(job.folder / "model.keras", include_optimizer=False)
    logging.disable(logging.WARNING)
    model.export(job.folder / "model.onnx", format="onnx", verbose=False)
    inputs = rows.read_window(0, 1)
    inputs.pop(TARGET)
    inputs = {name: values[:EXPORT_ROWS] for name, values in inputs.items()}
    own = np.asarray(model(_fed({name: tf.constant(values) for name, values in inputs.items()})))
    gap = float(np.abs(own - Engine(job.folder / "model.onnx", job.prepared).forward(inputs)).max())
    if gap > EXPORT_GAP * max(1.0, float(np.abs(own).max())):
        raise ModelError(f"model.onnx answers differently from the Keras model, by {gap:.2g}")
    return gap


def _fed(inputs: dict[str, Any]) -> Any:
    """Inputs as a Keras model takes them: one tensor alone, several by name."""
    return inputs if len(inputs) > 1 else next(iter(inputs.values()))


def _multi_worker() -> Any:
    """MultiWorkerMirroredStrategy. Its thread that watches the peers sleeps 30 s at a time, and the end of training would
    wait for it to wake: one second instead."""
    import tensorflow as tf
    from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended

    CollectiveAllReduceExtended._check_health_interval = 1
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    if all(address.startswith(LOOPBACK) for address in json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"]):
        keep_on_loopback()
    return strategy


def _meters(schema: Schema) -> list[Any]:
    import keras

    if schema.classes:
        return [keras.metrics.Mean("loss"), keras.metrics.SparseCategoricalAccuracy("accuracy")]
    return [keras.metrics.Mean("loss"), keras.metrics.MeanAbsoluteError("mae")]


def _pipeline(source: Any, schema: Schema) -> Any:
    """Batches as a tf.data pipeline that stays two ahead."""
    import tensorflow as tf

    inputs = {name: tf.TensorSpec((None, *shape), tf.float32) for name, shape in schema.inputs.items()}
    target = tf.TensorSpec((None,), tf.int64 if schema.classes else tf.float32)
    signature = (inputs, target, tf.TensorSpec((), tf.float32))
    return tf.data.Dataset.from_generator(lambda: source, output_signature=signature).prefetch(2)


class _Steps:
    """The compiled loops. `train` and `evaluate` move the meters; `read` reads and resets them. Each is called by all ranks
    together: reading an ON_READ variable and averaging are collectives."""

    def __init__(self, model: Any, loss: Any, optimizer: Any, meters: list[Any], strategy: Any):
        import tensorflow as tf

        self._meters = meters
        # What layers keep beside their weights, such as batch normalisation's moving means: each rank's are of its own rows.
        self._statistics = [v for v in model.non_trainable_variables if "float" in v.dtype]
        replicas = strategy.num_replicas_in_sync
        one_value = model.output_shape[-1] == 1

        def forward(inputs: Any, target: Any, training: bool) -> Any:
            outputs = model(_fed(inputs), training=training)
            rows = loss(target[:, None] if one_value else target, outputs)
            meters[0].update_state(rows)
            meters[1].update_state(target, outputs)
            return rows

        def train_step(inputs: Any, target: Any, everyone: Any) -> None:
            with tf.GradientTape() as tape:
                rows = forward(inputs, target, True)
                extra = tf.add_n(model.losses) if model.losses else 0.0
                total = tf.reduce_sum(rows) / everyone + extra / replicas
            gradients = tape.gradient(total, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)

        def evaluate_step(inputs: Any, target: Any, _: Any) -> None:
            forward(inputs, target, False)

        @tf.function
        def train_steps(iterator: Any, count: Any) -> None:
            for _ in tf.range(count):
                strategy.run(train_step, args=next(iterator))

        @tf.function
        def evaluate_steps(iterator: Any, count: Any) -> None:
            for _ in tf.range(count):
                strategy.run(evaluate_step, args=next(iterator))

        @tf.function
        def averages() -> Any:
            context = tf.distribute.get_replica_context
            return strategy.run(lambda: [context().all_reduce("MEAN", tf.identity(v.value)) for v in self._statistics])

        self._train, self._evaluate, self._averages = train_steps, evaluate_steps, averages

    def train(self, iterator: Any, steps: int) -> None:
        import tensorflow as tf

        for start in range(0, steps, STEPS_PER_CALL):
            self._train(iterator, tf.constant(min(STEPS_PER_CALL, steps - start)))
        if self._statistics:
            for variable, value in zip(self._statistics, self._averages(), strict=True):
                variable.assign(value)

    def evaluate(self, iterator: Any, steps: int) -> None:
        import tensorflow as tf

        self._evaluate(iterator, tf.constant(steps))

    def read(self) -> dict[str, float]:
        figures = {meter.name: float(meter.result()) for meter in self._meters}
        for meter in self._meters:
            meter.reset_state()
        return figures


class _State:
    """Weights and optimizer, as checkpoints that all ranks agreed on: `epoch-00003/{state.npz, state.json}`."""

    def __init__(self, folder: Path, variables: list[Any], strategy: Any, rank: int):
        self.folder, self.variables, self.strategy, self.rank = folder, variables, strategy, rank

    def restore(self) -> tuple[int, list[dict]]:
        """(epochs done, their figures) of the newest checkpoint that is whole, which the variables now hold; or (0, [])."""
        for checkpoint in sorted(self.folder.glob("epoch-*"), reverse=True):
            try:
                note = read_json(checkpoint / "state.json")
                with np.load(checkpoint / "state.npz", allow_pickle=False) as file:
                    values = [file[f"arr_{i}"] for i in range(len(self.variables))]
            except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
                continue
            if _digest(values) != note["sha256"]:
                continue
            for variable, value in zip(self.variables, values, strict=True):
                variable.assign(value)
            return note["epoch"], note["history"]
        return 0, []

    def digests(self) -> list[str]:
        """Each rank's SHA-256 of its state, gathered by all."""
        import tensorflow as tf

        own = bytes.fromhex(_digest([np.asarray(v) for v in self.variables]))
        gathered = self.strategy.gather(tf.constant([list(own)], tf.int32), axis=0).numpy()
        return [bytes(row.tolist()).hex() for row in gathered]

    def publish(self, epoch: int, history: list[dict]) -> None:
        digests = self.digests()
        if len(set(digests)) != 1:
            raise RuntimeError(f"the ranks' weights differ after epoch {epoch}: {digests}")
        if self.rank:
            return
        with publish_folder(self.folder / f"epoch-{epoch:05d}") as aside:
            with (aside / "state.npz").open("wb") as file:
                np.savez(file, *map(np.asarray, self.variables))
            write_json(aside / "state.json", {"epoch": epoch, "sha256": digests[0], "history": history})
        for old in sorted(self.folder.glob("epoch-*"))[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)


def _digest(values: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()


class _Board:
    """TensorBoard's scalars. Written anew from the checkpoint's history at each start, so no step is there twice."""

    def __init__(self, folder: Path, history: list[dict]):
        import tensorflow as tf

        shutil.rmtree(folder, ignore_errors=True)
        self._writer: Any = tf.summary.create_file_writer(str(folder))
        for figures in history:
            self.write(figures)

    def write(self, figures: dict) -> None:
        import tensorflow as tf

        with self._writer.as_default():
            for name, value in figures.items():
                if name not in ("epoch", "step", "workers"):
                    tf.summary.scalar(name, value, step=figures["step"])
        self._writer.flush()
